"""Parts from outside this package: modules that register them, `package.module:factory` names, and entry points.

An installed package offers a part in its own pyproject.toml, and it is found by name without being imported first:

    [project.entry-points."dic_repa.encoders"]
    my-encoder = "my_package.module:MyEncoder"
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from dic_repa.errors import UserError, did_you_mean, unknown_name
from dic_repa.progress import detail
from dic_repa.registry import Registry


def import_plugin(name: str) -> ModuleType:
    """Import the module `name`, which is looked for in the current folder too, as `python -m` does.

    A UserError where there is none; what goes wrong inside it is left as it is.
    """
    add_folders([os.getcwd()])
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not name.startswith(f"{error.name}."):
            raise  # the plugin was found, and misses something of its own
        raise UserError(
            f"plugin '{name}' was not found; put {name}.py beside the recipe, run from its folder or install it"
        ) from None
    detail(f"plugin {name}: {getattr(module, '__file__', None)}")
    return module


def add_folders(folders: Iterable[str]) -> None:
    """Let modules be imported from the current folder first, as `python -m` does, and then from `folders`."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    here = sys.path.index(os.getcwd() if os.getcwd() in sys.path else "")
    for folder in reversed([folder for folder in folders if folder not in sys.path]):
        sys.path.insert(here + 1, folder)


def entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """What other installed packages offer in `group`, by name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=group)}


def find_factory(registry: Registry, group: str, name: str) -> Any:
    """The class or function that `name` stands for: one of the `registry`, an entry point of `group`, or
    `package.module:factory`.

    A UserError lists the near names, or says what the module or the entry point lacks.
    """
    if name in registry:
        return registry.get(name)
    offered = entry_points(group)
    if name in offered:
        return _load(registry.kind, offered[name])
    module, colon, attribute = name.partition(":")
    if not colon:
        raise unknown_name(registry.kind, name, {*registry.names(), *offered})
    if not attribute or not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{registry.kind} '{name}' is neither a known name nor of the form package.module:factory")
    found = import_plugin(module)
    if not callable(getattr(found, attribute, None)):
        public = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
        raise UserError(
            f"{registry.kind} '{name}': {module} has no '{attribute}' to call{did_you_mean(attribute, public)}"
        )
    return getattr(found, attribute)


def _load(kind: str, point: importlib.metadata.EntryPoint) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "an installed package"
        raise UserError(
            f"{kind} '{point.name}' of {package} cannot be loaded from {point.value} ({error}); mend or remove it"
        ) from error
