"""Where a recipe's plugins and its data are looked for: in the current folder, then in the recipe's `folders`.

`load_recipe` adds the folder of the recipe's file to `folders` if it holds what the current folder lacks. A run adds
the folder that it was begun in, so that it finds them when it is resumed or sampled from another folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dic_repa.trust import came_with_weights, is_trusted

if TYPE_CHECKING:
    from dic_repa.recipe import Recipe


def note_folders(recipe: Recipe, files: Iterable[Path]) -> None:
    """Add to the recipe's `folders` those of its `files` (its own and its bases') that hold what is not here.

    Nothing is looked for beside a recipe that came with weights, unless its code is trusted.
    """
    beside = [file.parent for file in files if is_trusted() or not came_with_weights(file)]
    missing = [path for path in _looked_for(recipe) if not any(map(Path.exists, path))]
    _note(recipe, [folder for folder in beside if any((folder / file).exists() for path in missing for file in path)])


def note_current_folder(recipe: Recipe) -> Recipe:
    """`recipe`, or a copy with the current folder among its `folders` if that holds a plugin or the data."""
    if not any(file.exists() for path in _looked_for(recipe) for file in path):
        return recipe
    noted = recipe.model_copy(deep=True)
    _note(noted, [Path.cwd()])
    return noted


def _note(recipe: Recipe, folders: Iterable[Path]) -> None:
    new = dict.fromkeys([*recipe.folders, *(str(folder.resolve()) for folder in folders)])
    if list(new) != recipe.folders:
        recipe.folders = list(new)


def _looked_for(recipe: Recipe) -> list[list[Path]]:
    """The relative paths of each plugin's module, as a file or a folder, and of the data."""
    parts = [recipe.model.name, *(name for a in recipe.alignments for name in (a.encoder or "", a.head))]
    modules = [*recipe.plugins, *(name.partition(":")[0] for name in parts if ":" in name[:-1])]
    tops = [module.partition(".")[0] for module in modules]
    data = [[Path(recipe.data.path)]] if recipe.data.path and not Path(recipe.data.path).is_absolute() else []
    return [[Path(f"{top}.py"), Path(top)] for top in tops if top] + data
