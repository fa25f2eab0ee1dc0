"""Dotted keys such as `train.steps` and `alignments.0.tap`: of a tree, set in one, and compared between two recipes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dic_repa.errors import UserError

if TYPE_CHECKING:
    from dic_repa.recipe import Recipe, SamplingRecipe

_APART = {"description", "paper", "folders"}  # what changes nothing
ABSENT = "-"  # the key does not exist there: its section is null, or the list is shorter


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts and lists of dicts as dotted keys: {'train.steps': 400000, 'alignments.0.tap': 'mid.3', ...}."""
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        items = enumerate(value)
    else:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, inner in items:
        leaves |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return leaves or {prefix: value}


def differences(a: Recipe | SamplingRecipe, b: Recipe | SamplingRecipe) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two resolved recipes differ, with the value of each; not `description`, `paper`
    and `folders`."""
    ours, theirs = (flatten(r.model_dump(mode="json", exclude=_APART)) for r in (a, b))
    keys = {**ours, **theirs}
    pairs = {key: (ours.get(key, ABSENT), theirs.get(key, ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def assign(raw: dict, dotted: str, value: Any, source: str) -> None:
    """Set one dotted key of a raw recipe; `source` is who asks for it."""
    *parents, last = dotted.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}  # a section that the recipe leaves to its defaults
        node = _child(node, part, f"{source} {dotted}")
    if isinstance(node, list):
        _child(node, last, f"{source} {dotted}")
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"{source} {dotted}: '{'.'.join(parents)}' has no keys of its own")


def _child(node: Any, part: str, where: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise UserError(f"{where}: there are {len(node)} entries, from 0; '{part}' is none of them")
        return node[int(part)]
    if isinstance(node, dict):
        return node[part]
    raise UserError(f"{where}: '{part}' is not inside a section")
