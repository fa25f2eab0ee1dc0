"""Recipes compared key by key, with each other and with the paper's row that they began from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dic_repa.recipe import Recipe, SamplingRecipe, list_paper_rows

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


def paper_recipe(recipe: Recipe | SamplingRecipe) -> str | None:
    """The name of the recipe, of those that come with the package, that stands for the same row of a paper."""
    return list_paper_rows().get(recipe.paper.row) if recipe.paper else None
