"""What a public recipe does not say: where things are on the machine that trained, and where its progress was shown."""

import re
from typing import Any

from dic_repa.recipe import Recipe
from dic_repa.recipe.files import validate

# How paths begin that lead out of a project; before that of an autoencoder there may be its class.
_ELSEWHERE = re.compile(r"(diffusers:\w+:)?(?:/|~|\.\.(?:[/\\]|$)|[A-Za-z]:[/\\]|\\\\|file:)")


def public_recipe(recipe: Recipe) -> Recipe:
    """A copy of `recipe` without `folders` and trackers, and of each path outside the project only the last name."""
    content = recipe.model_dump(mode="json") | {"folders": []}
    content["train"]["trackers"] = []  # they may name accounts
    cleaned = validate(without_paths(content), "recipe.yaml")
    assert isinstance(cleaned, Recipe)
    return cleaned


def without_paths(content: Any) -> Any:
    """Plain content in which each text that is an absolute path, or leads upwards, is cut to its last name."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_paths(value) for value in content]
    if isinstance(content, str) and (found := _ELSEWHERE.match(content)):
        kind = found[1] or ""
        names = [name for name in re.split(r"[/\\]", content.removeprefix(kind)) if name.strip(".~")]
        return kind + (names[-1] if len(names) > 1 else "private")  # one alone may be a user's name
    return content
