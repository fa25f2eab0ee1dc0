"""The checkpoints that the page offers: listed by the user's paths, loaded when they are chosen, few kept in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from dic_repa.errors import UserError, unknown_name
from dic_repa.recipe import SampleSection
from dic_repa.recipe.build import build_objective
from dic_repa.runs.checkpoints import checkpoint_step
from dic_repa.runs.folder import RunFolder
from dic_repa.samplers import list_solvers, solver_info
from dic_repa.sampling.load import Checkpoint, load
from dic_repa.sampling.sampler import check_sampling
from dic_repa.sampling.weights import checkpoint_of
from dic_repa.trust import is_trusted, trusting_code

KEPT = 4  # checkpoints in memory at once


@dataclass(frozen=True)
class Fit:
    """What all of some checkpoints take."""

    choices: str  # what the rows to choose from are called: 'classes', or 'examples'
    classes: list[str]  # their names that all of the checkpoints have
    null: bool  # whether they can sample without a class though they have classes
    guided: bool
    solvers: dict[str, str]  # by name, what each is
    settings: SampleSection  # of the first checkpoint's recipe


class Models:
    """The checkpoints by title, those of a run among them, and what they are loaded with.

    Args:
        paths: runs or checkpoints, or whatever else `load` takes; each is loaded, so that a mistake shows at once.

    Raises:
        UserError: a path is not a run or checkpoint, or names code that is not trusted.
    """

    def __init__(self, paths: Sequence[str | Path], device: str | torch.device = "cpu", trust_code: bool = False):
        self.device, self.trust = torch.device(device), trust_code or is_trusted()
        self.at_work = Lock()  # held by the one that samples
        self._loaded: OrderedDict[str, Checkpoint] = OrderedDict()
        self._loading = Lock()
        self.paths: dict[str, str | Path] = {}
        self._titles: dict[Path, str] = {}  # by the places with links followed
        self.first: list[str] = []  # what the paths stand for: of a run, its newest checkpoint
        for path in dict.fromkeys(map(str, paths)):
            self._add(path)

    def _add(self, path: str) -> None:
        loaded = load(path, self.device, trust_code=self.trust)
        named, run = checkpoint_of(loaded.source), RunFolder(path)
        places: dict[Path, str | Path] = {named: path}
        if named.parent == run.checkpoints.resolve():  # it is a run, and this its newest
            places = {place.resolve(): place for place in sorted(run.list_checkpoints(), key=checkpoint_step)[::-1]}
        for real, place in places.items():
            if real not in self._titles:
                title = _title(real, path)
                title += f" ({place})" * (title in self.paths)
                self.paths[title], self._titles[real] = place, title
        if (title := self._titles[named]) not in self.first:
            self.first.append(title)
            self._keep(title, loaded)

    def get(self, title: str) -> Checkpoint:
        """The checkpoint of this title, loaded at need; a UserError if it is damaged or gone, or there is none."""
        if title not in self.paths:
            raise unknown_name("checkpoint", title, self.paths)
        with self._loading:
            if title not in self._loaded:
                self._keep(title, load(self.paths[title], self.device, trust_code=self.trust))
            self._loaded.move_to_end(title)
            return self._loaded[title]

    def _keep(self, title: str, checkpoint: Checkpoint) -> None:
        self._loaded[title] = checkpoint
        while len(self._loaded) > KEPT:
            self._loaded.popitem(last=False)

    def fit(self, titles: Sequence[str]) -> Fit:
        """What all of the checkpoints take; a UserError if they have no solver in common."""
        if not titles:
            raise UserError("no checkpoint is chosen; choose one or several")
        chosen = [self.get(title) for title in titles]
        known = [set(checkpoint.condition.names) for checkpoint in chosen]
        classes = [name for name in dict.fromkeys(chosen[0].condition.names) if all(name in names for names in known)]
        drops = [checkpoint.recipe.train.label_dropout > 0 for checkpoint in chosen]
        with trusting_code(self.trust):
            solvers = [solvers_of(checkpoint) for checkpoint in chosen]
        common = {name: text for name, text in solvers[0].items() if all(name in others for others in solvers)}
        if not common:
            raise UserError("these checkpoints have no solver in common; choose others")
        null, guided = bool(classes) and all(drops), all(map(is_guided, chosen))
        return Fit(chosen[0].condition.choices, classes, null, guided, common, chosen[0].recipe.sample)


def _title(checkpoint: Path, path: str) -> str:
    if checkpoint.parent.name == "checkpoints" and checkpoint.name.startswith("step_"):
        return f"{checkpoint.parents[1].name}, step {checkpoint_step(checkpoint)}"
    return checkpoint.name if Path(path).is_dir() else path


def is_guided(checkpoint: Checkpoint) -> bool:
    """Whether guidance has something to move away from: a null class that was trained, or a weaker model."""
    guidance = checkpoint.recipe.sample.guidance
    return checkpoint.learnt_null or bool(guidance and guidance.weak)


def solvers_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The solvers that the checkpoint's objective takes, and what each is; the one of its recipe first."""
    objective, own = build_objective(checkpoint.recipe.objective), checkpoint.recipe.sample.solver
    found = {own: solver_info(own)} | {info.name: info for info in list_solvers()}
    taken = {}
    for name, info in found.items():
        try:
            check_sampling(SampleSection(solver=name, steps=None if info.kind == "adaptive" else 2), objective)
        except UserError:
            continue
        taken[name] = info.description
    return taken
