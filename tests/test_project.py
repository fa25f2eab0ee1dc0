"""What the project promises of itself: one version, its types, the oldest Python and torch that it is tested with."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from places import ROOT
from test_floors import FLOORS

import dic_repa
from dic_repa.cli.parts import find_registries

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

GITHUB = ROOT / ".github"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_said_in_one_place():
    assert importlib.metadata.version("dic-repa") == dic_repa.__version__
    assert PYPROJECT["project"]["dynamic"] == ["version"]


def test_the_version_needs_no_torch():
    code = "import dic_repa, sys; print(dic_repa.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [dic_repa.__version__, "False"]


def test_changelog_and_citation_name_the_version():
    changes = re.findall(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert changes[0] == dic_repa.__version__  # the newest comes first
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == dic_repa.__version__


def test_every_package_is_packed_with_its_types():
    tools = PYPROJECT["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "dic_repa").rglob("__init__.py")}
    names = {folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in folders}
    assert set(tools["packages"]) == names | {"dic_repa.encoders", "dic_repa.samplers", "dic_repa.recipes"}
    assert tools["package-data"]["dic_repa"] == ["py.typed"]
    assert (ROOT / "dic_repa" / "py.typed").read_bytes() == b""


def test_the_workflow_tests_the_oldest_python_and_torch():
    jobs = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())["jobs"]
    assert set(jobs) == {"lint", "types", "tests"}
    oldest, newest = jobs["tests"]["strategy"]["matrix"]["include"]
    assert f">={oldest['python']}" == PYPROJECT["project"]["requires-python"]
    (torch,) = [need for need in PYPROJECT["project"]["dependencies"] if need.startswith("torch>=")]
    assert oldest["torch"] == torch.replace("torch>=", "==") + ".0"
    assert newest["torch"].startswith(">=")
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + oldest["python"].replace(".", "")


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda path: path.stem)
def test_issue_forms_can_be_filled_in(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = [field["id"] for field in form["body"]]
    assert len(set(fields)) == len(fields)
    assert all(field["attributes"]["label"] for field in form["body"])


def test_a_bug_report_asks_for_the_environment():
    assert "`dic-repa env`" in (GITHUB / "ISSUE_TEMPLATE" / "bug_report.yml").read_text()


def test_contributors_find_the_files_that_are_named():
    named = set(named_files((ROOT / "CONTRIBUTING.md").read_text()))
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists() and not (ROOT / "dic_repa" / name).exists()]


def test_contributors_see_the_floors_and_every_kind_of_part():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [row.split("|") for row in re.findall(r"^\|(.+)\|$", text, flags=re.MULTILINE)]
    start = next(i for i, row in enumerate(rows) if row[0].strip() == "floor")
    floors = [{Path(name).stem for name in re.findall(r"`([\w./]+)`", row[0])} for row in rows[start + 2 :]]
    assert floors[: len(FLOORS)] == [set(floor) for floor in FLOORS]
    found = {kind.strip(): row for row in rows if len(row) == 3 for kind in row[0].split(",")}
    for registry in find_registries().values():
        _, where, by = found[registry.kind]
        files = [ROOT / name if (ROOT / name).exists() else ROOT / "dic_repa" / name for name in named_files(where)]
        texts = [file.read_text() for file in files if file.is_file()]
        for variable in re.findall(r"`(\w+s)`", by):
            assert any(re.search(rf"\b{variable}\b", part) for part in texts), registry.kind


def named_files(text: str) -> list[str]:
    return re.findall(r"`([\w./]+(?:/|\.py))`", text)


def test_the_changelog_names_modules_that_are_there():
    rows = re.findall(r"^\| .+ \| (.+) \|$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    prefix, found, missing = "", [], []
    for name in re.findall(r"`([a-z_.]+)`", " ".join(rows)):
        prefix = prefix if name.startswith(".") else name.rpartition(".")[0]
        name = prefix + name if name.startswith(".") else name
        (found if importlib.util.find_spec(name) else missing).append(name)
    assert len(found) > 20
    assert not missing


def test_the_architecture_page_has_every_file():
    """Also that the ways through the code name files that are there."""
    ways, _, files = (ROOT / "docs" / "architecture.md").read_text().partition("\n## Every file\n")
    listed = []
    for section in files.split("\n### ")[1:]:
        folder, _, lines = section.partition("\n")
        listed += [folder + name for name in re.findall(r"^- `(\w+\.py)`: \S", lines, flags=re.MULTILINE)]
    there = [path for folder in ("dic_repa", "samplers", "encoders") for path in (ROOT / folder).rglob("*.py")]
    assert sorted(listed) == sorted(path.relative_to(ROOT).as_posix() for path in there)
    named = re.findall(r"`([a-z_]+/\w+\.py)`", ways)
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists() and not (ROOT / "dic_repa" / name).exists()]
