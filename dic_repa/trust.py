"""Code that a file names is not run unless it is trusted: what came with weights, with a run or with prepared data.

A recipe may name modules to import (`plugins: [my_parts]`, `model: {name: "my_parts:Net"}`). One that the user names is
the user's own. One that lies in a run or beside weights may be a stranger's: it is only read, and refused if it names
code, unless the user says `--trust-code`, or in Python

    with trusting_code():
        load("downloads/their-run")          # or load(..., trust_code=True)
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from importlib.machinery import BuiltinImporter, PathFinder
from pathlib import Path
from typing import Any

from dic_repa.errors import UserError, first_few
from dic_repa.files.outputs import MARKER
from dic_repa.runtime.progress import say

# Files beside a recipe.yaml by which it came with weights or a run.
WITH_WEIGHTS = (
    MARKER, "checkpoints", "environment.json", "config.json", "manifest.json", "model.safetensors", "metrics.jsonl",
)  # fmt: skip
_NOT_CODE = ("description", "paper", "folders")  # keys of a recipe that hold text
_SPLITS = ("evaluate.reference", "evaluate.bound")  # 'emoji:train' there is a data set that is known and its split
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextlib.contextmanager
def trusting_code(trust: bool = True) -> Iterator[None]:
    """While entered, files that came with weights may name code, which is imported (not with `trust=False`)."""
    token = _trusted.set(trust or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def is_trusted() -> bool:
    """Whether files that came with weights may name code to run."""
    return _trusted.get()


def came_with_weights(file: Path) -> bool:
    """Whether a recipe's file is that of a run or of a checkpoint, by its name and by what lies beside it."""
    return file.name == "recipe.yaml" and any((file.parent / name).exists() for name in WITH_WEIGHTS)


def check_code(content: Any, file: str | Path, folders: Iterable[str] = ()) -> None:
    """Refuse a file's `content` if it names code to import, or, if it is trusted, say what is imported from where.

    Args:
        folders: where modules are looked for besides the current folder and the installed packages.

    Raises:
        UserError: it names code, and the user has not said --trust-code.
    """
    found = dict.fromkeys(_named_code(content))
    if not found:
        return
    places = [os.getcwd(), *folders, *sys.path]
    named = first_few([f"{key} {name} (from {_origin(name, places)})" for key, name in found], 5)
    if not is_trusted():
        raise UserError(
            f"{file} came with weights or data and names code to run: {named}; read that code, and add --trust-code "
            "(in Python trust_code=True) if you trust it"
        )
    _tell(f"note: trusted code of {file}: {named}")


@functools.cache  # once, however often the file is read
def _tell(line: str) -> None:
    say(line)


def is_factory(name: str) -> bool:
    """Whether a name has the form `package.module:factory`, which `Registry.find` imports."""
    module, _, factory = name.partition(":")
    return all(part.isidentifier() for part in [*module.split("."), factory])


def names_code(content: Any) -> bool:
    """Whether a recipe's plain content names modules to import."""
    return any(_named_code(content))


def _named_code(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys and names of all that would be imported."""
    if isinstance(content, dict):
        for inner, value in content.items():
            if key or inner not in _NOT_CODE:
                yield from _named_code(inner, key or "a key")
                yield from _named_code(value, f"{key}.{inner}" if key else str(inner))
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _named_code(value, key)
    elif isinstance(content, str) and key not in _SPLITS and (key == "plugins" or _is_code(content, key)):
        yield key, content


def _is_code(name: str, key: str) -> bool:
    """Whether a name imports more than dic-repa imports anyway."""
    families = ["torch.optim:"] + ["fdr:"] * key.startswith("evaluate.")
    if key == "model.name":  # none but a model of diffusers itself
        families.append("diffusers:")
    if key.endswith("encoder"):
        families.append("diffusers:" if key.endswith("autoencoder") else "timm:")
    return is_factory(name) and not name.startswith(tuple(families))


def _origin(name: str, places: list[str]) -> str:
    """The file of the module that `name` names, found without running it."""
    top = name.partition(":")[0].partition(".")[0]
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        if BuiltinImporter.find_spec(top) or top in sys.stdlib_module_names:
            return "Python"
        if spec := PathFinder.find_spec(top, places):
            return str(spec.origin or next(iter(spec.submodule_search_locations or ()), "somewhere"))
    return "nowhere on this machine"
