"""The weights that a run begins with, taken from another model (`train.init_from`).

Every tensor of the same shape is taken. What has another shape because of the data is taken in part, or new:

- of the label table the rows of classes with the same name, where both data sets name theirs, and the null's;
- the first and the last layer are new where the data has other channels, since a channel means another thing there. If
  only `learn_sigma` differs, the last layer's half for the prediction is taken;
- U-ViT's positions are interpolated, and DiffiT's position biases are new; other models learn none;
- a middle head is new where the other model has none, or one of another block's shape.

Anything else of another shape is another model's. The alignments' heads are always new.
"""

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dic_repa.conditions import Condition
from dic_repa.data.saved import SavedData
from dic_repa.errors import MISTAKES, UserError, first_few
from dic_repa.files.hub import fetch_model, is_hub_id
from dic_repa.files.weights import weights_fingerprint, without_memory
from dic_repa.models.pretrained import WEIGHTS, Pretrained
from dic_repa.recipe import Recipe, load_training_recipe
from dic_repa.sampling.convert import load_any
from dic_repa.sampling.weights import weights_folder

# What the data and the objective decide, and the keys of a model's config for it.
MAY_DIFFER = {
    "classes": ("num_classes", "condition"),
    "channels": ("in_channels", "learn_sigma", "patch_size"),
    "size": ("size", "patch_size"),
    "guidance": ("middle_head",),
    "times": ("two_times",),
}


@dataclass
class Start:
    """What a run began with, in words, and which tensors are new."""

    source: str
    fingerprint: str  # of the weights' file
    taken: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fresh: set[str] = field(default_factory=set)  # names of tensors that are new, at least in part

    def rows(self) -> list[tuple[str, str]]:
        """Rows of the run's header."""
        new = "; ".join(self.new) or "nothing of the denoiser"
        rows = [("start", self.source), ("taken", "; ".join(self.taken)), ("new", new)]
        return rows + [("note", note) for note in self.notes]

    def to_dict(self) -> dict[str, Any]:
        """The same for environment.json."""
        return {key: value for key, value in vars(self).items() if key != "fresh"}


def start_from(denoiser: Pretrained, condition: Condition, recipe: Recipe) -> Start | None:
    """Give `denoiser`, which is for data of that `condition`, the weights of `train.init_from` as far as they fit; None
    if the recipe names none.

    They are those of a run (its average), a checkpoint, a converted folder, an authors' file, or a hub id. A UserError
    where there are none, or where they are of another model.
    """
    name = recipe.train.init_from
    if name is None:
        return None
    try:
        path = fetch_model(name) if is_hub_id(name) else Path(name)
        folder = path if path.is_file() else weights_folder(path)
        theirs, recipe_file = load_any(folder)
        saved = SavedData.read(folder) if folder.is_dir() else None
        file = folder / WEIGHTS if folder.is_dir() else folder
        start = Start(name if is_hub_id(name) else str(folder), weights_fingerprint(file))
        rows = matching_rows(condition, theirs.num_classes, saved.condition.names if saved else None)
        _Transfer(denoiser, theirs, rows).run(start)
        before = load_training_recipe(recipe_file, only_read=True).objective if recipe_file else recipe.objective
        if before != recipe.objective:
            told = [f"{each.name} {each.options or ''}".strip() for each in (before, recipe.objective)]
            start.notes.append(f"the objective was {told[0]}, and is {told[1]} here")
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from None
    return start


def matching_rows(ours: Condition, count: int, names: tuple[str, ...] | None) -> dict[int, int]:
    """Which row of a label table for `count` classes each row of ours takes: by the classes' names, or all if only the
    number of classes agrees; and the null's, the last one of both.
    """
    numbers = [tuple(map(str, range(n))) for n in (ours.count, count)]
    if names is None or len(names) != count or [ours.names, names] == numbers:
        rows = {i: i for i in range(count)} if ours.count == count else {}
    else:
        rows = {i: names.index(name) for i, name in enumerate(ours.names) if name in names}
    return rows | {ours.count: count}


class _Transfer:
    """Copies what fits from `theirs` into `ours`; `rows` are those of `matching_rows`."""

    def __init__(self, ours: Pretrained, theirs: Pretrained, rows: dict[int, int]):
        self.ours, self.theirs, self.rows = ours, theirs, rows
        configs = ours.config, theirs.config
        self.differing = {key for key in {**configs[0], **configs[1]} if configs[0].get(key) != configs[1].get(key)}
        self.tables = _changed_by(ours, {"num_classes": ours.num_classes + 1})
        self.depends = {
            what: _changed_by(ours, {key: theirs.config.get(key) for key in keys if key in self.differing})
            for what, keys in MAY_DIFFER.items()
        }

    @torch.no_grad()
    def run(self, start: Start) -> None:
        """Do it, and tell `start`; a UserError before anything is copied if the models do not fit."""
        if type(self.ours) is not type(self.theirs):
            kinds = f"a {type(self.theirs).__name__}, the recipe's model is a {type(self.ours).__name__}"
            raise UserError(f"{start.source} holds {kinds}: they share no weights")
        old, own = self.theirs.state_dict(), self.ours.state_dict()
        self.check(old, own, start)
        taken: dict[str, list[str]] = defaultdict(list)  # what of the tensors, and their names
        new: dict[str, list[str]] = defaultdict(list)
        whole = 0
        for name, tensor in own.items():
            kept, left = self.take(name, old.get(name), tensor)
            whole += not left and not kept
            if kept:
                taken[kept].append(name)
            if left:
                new[left].append(name)
                start.fresh.add(name)
        start.taken += [f"{whole} of {len(own)} tensors", *_lines(taken)]
        start.new += _lines(new)

    def check(self, old: dict[str, Tensor], own: dict[str, Tensor], start: Start) -> None:
        """A UserError for tensors of another shape that the data does not explain; other differences are noted."""
        others = self.differing - {key for keys in MAY_DIFFER.values() for key in keys}
        told = [(key, self.theirs.config.get(key), self.ours.config.get(key)) for key in sorted(others)]
        explained = set().union(*self.depends.values())
        shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (old, own)]
        misfits = [name for name in {**old, **own} if shapes[0].get(name) != shapes[1].get(name)]
        if wrong := [name for name in misfits if name not in explained]:
            why = ", ".join(f"{key} {there} and not {here}" for key, there, here in told)
            raise UserError(
                f"{start.source} does not fit the recipe's model: it has {why or f'another {wrong[0]}'}; set model as "
                "it is there, or name other weights"
            )
        start.notes += [f"{key} was {there}, and is {here} here" for key, there, here in told]

    def take(self, name: str, source: Tensor | None, tensor: Tensor) -> tuple[str, str]:
        """Copy into `tensor` what fits of `source`, and say which part was taken and which is new; '' and '' if all was
        taken."""
        ours, theirs, rows = self.ours, self.theirs, self.rows
        if source is not None and name in self.tables and source.shape == (theirs.num_classes + 1, *tensor.shape[1:]):
            for row, old_row in rows.items():
                tensor[row] = source[old_row]
            found, left = len(rows) - 1, len(tensor) - len(rows)
            if not left and all(row == old_row for row, old_row in rows.items()) and tensor.shape == source.shape:
                return "", ""
            kept = f"the rows of {_count(found)} and the null's" if found else "the null's row"
            return kept, f"the rows of {_count(left)}" if left else ""
        if source is not None and source.shape == tensor.shape and name not in self.tables:
            tensor.copy_(source)
            return "", ""
        resample: Any = getattr(ours, "resample_positions", None)
        if source is not None and name == "positions" and resample:
            tensor.copy_(resample(source, theirs.grid))
            return "interpolated", ""
        only_variance = self.differing.isdisjoint({"in_channels", "patch_size"}) and name in self.depends["channels"]
        if source is not None and only_variance and source.shape[1:] == tensor.shape[1:]:
            shared = min(len(source), len(tensor))
            tensor[:shared] = source[:shared]
            return "the half for the prediction", "the half for the variance" if len(tensor) > shared else ""
        return "", "for other " + next((what for what, names in self.depends.items() if name in names), "classes")


def _changed_by(model: Pretrained, changes: dict[str, Any]) -> set[str]:
    """The tensors of `model` whose shape is another, or that are only in one of both, with other keys of its config."""
    sketch = None
    options = {key: value for key, value in {**model.config, **changes}.items() if value is not None}  # or the default
    with torch.random.fork_rng(devices=[]), contextlib.suppress(UserError, *MISTAKES):
        sketch = without_memory(lambda: type(model)(**options))
    if sketch is None or not changes:
        return set()
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (model, sketch)]
    return {name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)}


def _count(classes: int) -> str:
    return f"{classes} class{'es' * (classes != 1)}"


def _lines(parts: dict[str, list[str]]) -> list[str]:
    """'condition.*.label.weight: the rows of 3 classes', for each part."""
    return [f"{first_few(_together(names), 5)}: {part}" for part, names in parts.items()]


def _together(names: Iterable[str]) -> list[str]:
    """The names, each once, with * for their numbers."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names))
