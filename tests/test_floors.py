"""The floors of the house: an import goes down or stays, inside functions too."""

import ast

import pytest
from places import ROOT

FLOORS = [
    ["errors", "limits", "runtime", "registry", "trust", "protocols", "conditions", "interpolants", "files"],
    ["samplers", "encoders", "models", "objectives"],
    ["alignment"],
    ["data"],
    ["recipe"],
    ["runs"],
    ["sampling"],
    ["export"],
    ["evaluation"],
    ["publish"],
    ["training"],
    ["bench", "demo", "cli"],
]
LEVEL = {package: level for level, packages in enumerate(FLOORS) for package in packages}
FREE = {"__init__", "__main__"}  # the doors of the house
FILES = sorted(
    [*(ROOT / "dic_repa").rglob("*.py"), *(ROOT / "samplers").glob("*.py"), *(ROOT / "encoders").glob("*.py")]
)


def home(file):
    """The package or module of the house that `file` belongs to."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "dic_repa" else parts[0]


def imported(tree):
    """(line, module) of every import of the house, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "dic_repa":
            names = [f"dic_repa.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("dic_repa."))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_import_goes_up(file):
    own = home(file)
    if own in FREE:
        return
    upward = [
        f"line {line}: {own} imports {package}"
        for line, package in imported(ast.parse(file.read_text()))
        if package in LEVEL and LEVEL[package] > LEVEL[own]
    ]
    assert not upward


def test_every_package_has_a_floor():
    assert {home(file) for file in FILES} - FREE == set(LEVEL)
