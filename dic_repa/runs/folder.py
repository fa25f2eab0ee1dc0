"""A run's folder: the recipe that ran, where and with what it ran, its metrics, pictures and checkpoints.

    recipe.yaml         the recipe, resolved            metrics.jsonl   one line per log step
    environment.json    versions, git state, machine    samples/        grids of samples over training
    checkpoints/        step_00001000/, ..., best       snapshots/      averages to combine after the run
    curves.png          the loss curves                 run.json        the run's id, which its checkpoints name

`runs.checkpoints` finds the whole checkpoints, `runs.environment` makes the content of environment.json.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dic_repa.errors import UserError
from dic_repa.files.atomic import write_whole
from dic_repa.files.lock import locked
from dic_repa.files.manifest import MANIFEST, find_damage
from dic_repa.files.outputs import (
    MARKER,
    Marker,
    begin_folder,
    check_folder,
    foreign,
    is_listed,
    read_marker,
    remove_leftovers,
    remove_listed,
    write_marker,
)
from dic_repa.files.reading import numbers, parse_json, read_json, read_lines
from dic_repa.recipe import Recipe, load_training_recipe, to_yaml
from dic_repa.recipe.files import read_recipe
from dic_repa.recipe.keys import ABSENT, differences
from dic_repa.runs.checkpoints import RUN_ID, Checkpoints, checkpoint_step, find_stranger
from dic_repa.runs.show import run_html
from dic_repa.runtime.progress import warn

# Changing these keeps the trajectory of the weights, so a resumed run may.
_HARMLESS = set(
    "sample evaluate timeouts train.steps train.log_every train.sample_every train.checkpoint_every "
    "train.keep_checkpoints train.keep_every train.snapshot_every train.max_skipped train.loader_timeout "
    "train.trackers train.sharding train.micro_batch train.gradient_checkpointing train.compile data.workers "
    "model.kernels".split()
)
RUNS = Path("runs")  # the default folder of runs


class RunFolder(Checkpoints):
    """Paths inside a run's folder, and its checkpoints."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.id_file = self.path / RUN_ID
        self.environment_file = self.path / "environment.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.curves_file = self.path / "curves.png"
        self.samples = self.path / "samples"
        self.snapshots = self.path / "snapshots"

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run; a UserError if `path` is not one."""
        run = cls(path)
        if not run.recipe_file.is_file():
            missing = "has no recipe.yaml" if run.path.is_dir() else "does not exist"
            what = "is a file; name the folder of a run" if run.path.is_file() else missing
            raise UserError(f"{path} is not a run: it {what}{suggest_runs(run.path)}")
        return run

    def __fspath__(self) -> str:
        """A run is its folder: `dic_repa.load(run)`."""
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def _repr_html_(self) -> str:
        return run_html(self)

    @property
    def metrics(self) -> dict[str, list[float]]:
        """The columns of metrics.jsonl by name, `step` first, as `pandas.DataFrame(run.metrics)` takes them; NaN where
        a line lacks a number."""
        records = read_lines(self.metrics_file)[0] if self.metrics_file.is_file() else []
        lines = [numbers(record) for _, record in records]
        names = dict.fromkeys(name for line in lines for name in line)
        return {name: [line.get(name, math.nan) for line in lines] for name in names}

    def check_new(self, overwrite: bool = False) -> None:
        """A UserError unless a new run can begin here: in a folder that is empty or, with `overwrite`, holds a run."""
        if check_folder(self.path, "run") is None:
            return
        if self.recipe_file.exists() and not overwrite:
            raise UserError(f"{self.path} exists; pass --resume to go on with it, or --overwrite to begin anew")
        folders = (self.samples, self.checkpoints, self.snapshots, self.path / "evaluation")
        taken = [folder for folder in folders if folder.is_symlink()]
        for file in (self.path / name for name in foreign(self.path)):
            if file in self._files() or (file.parent in folders and file.name.startswith("step_")):
                taken.append(file)
        if taken:
            raise UserError(f"{taken[0]} is in the way of a new run, and not of the old one; move it, or remove it")

    def claim(self) -> None:
        """Mark the folder as a run's; a run that is there stays as it is."""
        if read_marker(self.path) is not None:
            return
        names = self._own_names()
        for folder in self.list_checkpoints():  # made by a version without markers: take the manifest's list
            with contextlib.suppress(OSError, ValueError, KeyError):
                files = parse_json((folder / MANIFEST).read_text())["files"]
                write_marker(folder, Marker("checkpoint", {MANIFEST, *files}))
                names.append(f"checkpoints/{folder.name}")
        for file in [*self.samples.glob("step_*.png"), *self.snapshots.glob("step_*.safetensors")]:
            names.append(file.relative_to(self.path).as_posix())
        begin_folder(self.path, "run", names)

    def create(self, recipe: Recipe, overwrite: bool = False) -> None:
        """Make the folder for a new run, if `check_new` allows it. Files that no run made stay in it."""
        self.check_new(overwrite)
        if self.path.exists():
            remove_listed(self.path)
        begin_folder(self.path, "run", self._own_names())
        write_whole(self.id_file, json.dumps({"id": uuid.uuid4().hex}) + "\n")
        self.save_recipe(recipe)  # killed from here on, it can be resumed
        self._make_folders()

    def grid_file(self, step: int) -> Path:
        """The grid of samples after `step` steps."""
        return self.samples / f"step_{step:08d}.png"

    def save_recipe(self, recipe: Recipe) -> None:
        """Write the recipe that the run follows from here on."""
        write_whole(self.recipe_file, to_yaml(recipe))

    def _make_folders(self) -> None:
        for folder in (self.samples, self.checkpoints):
            folder.mkdir(exist_ok=True)

    def _files(self) -> list[Path]:
        """The single files of a run."""
        names = ("not_finite.json", "checkpoints/best", "checkpoints/best.json")
        known = [self.recipe_file, self.id_file, self.environment_file, self.metrics_file, self.curves_file]
        return [*known, *(self.path / name for name in names)]

    def _own_names(self) -> list[str]:
        return [file.relative_to(self.path).as_posix() for file in self._files()]

    def check_resume(self, recipe: Recipe, allow_change: bool = False) -> list[str]:
        """How `recipe` differs from the run's own, 'train.steps: 60 -> 1000', a line for each key; a UserError if there
        is no run to go on with, or a difference would change what it computes.
        """
        if not self.path.exists():
            raise UserError(f"there is no run at {self.path} to resume; leave --resume out to begin one")
        before = RunFolder.open(self.path).recipe(only_read=True)
        if read_marker(self.path) is None and all(find_damage(folder) for folder in self.list_checkpoints()):
            raise UserError(f"{self.path} is not a run of dic-repa's (it has no {MARKER}), so it is not written into")
        different = differences(before, recipe)
        lines = {key: f"{key}: {_shown(old)} -> {_shown(new)}" for key, (old, new) in different.items()}
        changing = [line for key, line in lines.items() if changes_the_run(key, recipe)]
        if changing and not allow_change:
            raise UserError(
                f"{self.path} was begun with another recipe; these keys differ: {', '.join(changing)}; "
                "set them back, or pass --allow-change to go on with the new ones"
            )
        return list(lines.values())

    def is_finished(self, steps: int) -> bool:
        """Whether there is a whole checkpoint of step `steps`; a UserError if there are later ones."""
        last = max(map(checkpoint_step, self.list_checkpoints()), default=0)  # by their names alone
        newest = self.newest_checkpoint() if last >= steps else None
        if newest is None:
            return False
        return self._check_steps(newest, steps) == steps

    def remove_leftovers(self) -> None:
        """Remove what a process that was killed has left unfinished, unless another one is at work here."""
        with contextlib.suppress(OSError), locked(self.path):  # the folder may be read-only
            remove_leftovers(self.path)

    def _check_steps(self, newest: Path | None, steps: int) -> int:
        if (done := checkpoint_step(newest) if newest else 0) > steps:
            raise UserError(f"{self.path} has done {done} steps already, more than train.steps {steps}")
        return done

    def resume(self, recipe: Recipe, allow_change: bool = False) -> Path | None:
        """Prepare an existing run to continue, and return the checkpoint to continue from; None if there is none yet.

        Removes what is newer than that: damaged checkpoints, and what the repeated steps will write again. The old
        recipe stays until `save_recipe`, since the checkpoint may not fit the new one.
        """
        self.check_resume(recipe, allow_change)
        newest = self.newest_checkpoint()
        done = self._check_steps(newest, recipe.train.steps)
        for folder in self.list_checkpoints():
            if checkpoint_step(folder) > done:
                if why := find_stranger(folder):
                    raise UserError(f"{folder} is in the way: {why}; move it out of {self.checkpoints}")
                self.remove_checkpoint(folder)
        for snapshot in self.snapshots.glob("step_*"):
            named = re.match(r"step_(\d+)", snapshot.name)
            if named and is_listed(snapshot) and int(named[1]) > done:
                snapshot.unlink()
        remove_leftovers(self.path)
        self._make_folders()
        self._cut_metrics(done)
        return newest

    def recipe(self, overrides: Sequence[str] = (), only_read: bool = False) -> Recipe:
        """The recipe that the run was begun with; the arguments are those of `load_recipe`."""
        # A recipe of a run has all keys. Without this one, it is of a version without a warm-up of the average.
        section = read_recipe(self.recipe_file).get("train")
        older = isinstance(section, dict) and section and "ema_warmup" not in section
        return load_training_recipe(
            self.recipe_file, ["train.ema_warmup=false"] * bool(older) + list(overrides), only_read
        )

    def downloads(self) -> dict[str, str]:
        """The commits of what the run took from the hub, as its environment.json has them."""
        found: dict[str, str] = {}
        with contextlib.suppress(OSError, UserError, AttributeError, TypeError):  # missing or damaged: no commits
            for session in read_json(self.environment_file, "remove it"):
                found |= session.get("downloads", {})
        return {name: commit for name, commit in found.items() if isinstance(commit, str)}

    def _cut_metrics(self, step: int) -> None:
        # The steps after the checkpoint are repeated, and a kill may have cut the last line short.
        if not self.metrics_file.is_file():
            return
        lines, damaged = read_lines(self.metrics_file)
        if damaged:
            warn(f"{self.metrics_file} has {damaged} damaged lines, which are left out from here on")
        write_whole(self.metrics_file, "".join(line + "\n" for line, record in lines if record["step"] <= step))


def suggest_runs(path: Path) -> str:
    """'; did you mean runs/mine?' for a folder of runs, a folder in a run, or a bare or misspelt name; else ''."""
    inside = path.is_dir() and (path.parent / "recipe.yaml").is_file() and (path.parent / "checkpoints").is_dir()
    runs = [path.parent] if inside else runs_in(path)
    if not path.exists():
        named = {str(run): run for run in runs_in(RUNS)} | {run.name: run for run in runs_in(RUNS)}
        near = difflib.get_close_matches(str(path), named, n=3, cutoff=0.7)
        runs = list(dict.fromkeys(named[name] for name in ([str(path)] if str(path) in named else near)))
    return f"; did you mean {' or '.join(map(str, runs[:3]))}?" if runs else ""


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder of runs."""
    return sorted(file.parent for file in folder.glob("*/recipe.yaml"))


def changes_the_run(key: str, recipe: Recipe) -> bool:
    """Whether another value of that dotted key of a recipe changes the weights' trajectory."""
    if key == "train.steps" and recipe.schedule.name != "constant":
        return True  # the learning rate falls towards the last step
    parts = key.split(".")
    return not any(".".join(parts[: n + 1]) in _HARMLESS for n in range(len(parts)))


def _shown(value: Any) -> str:
    return value if value == ABSENT else json.dumps(value)
