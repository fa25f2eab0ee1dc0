"""A run's folder: the recipe that ran, where and with what it ran, its metrics, pictures and checkpoints.

    recipe.yaml         the recipe, resolved            metrics.jsonl   one line per log step
    environment.json    versions, git state, machine    samples/        grids of samples over training
    checkpoints/        step_00001000/, ..., best       snapshots/      averages to combine after the run
    curves.png          the loss curves                 lock            while a run is at work here

A checkpoint is a folder that is written aside and renamed, so one that bears its name was whole when it was written;
its manifest tells whether it still is.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dic_repa.errors import UserError
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import (
    ASIDE,
    MARKER,
    Marker,
    begin_folder,
    check_folder,
    foreign,
    is_listed,
    read_marker,
    remove_folder,
    remove_listed,
    write_marker,
)
from dic_repa.recipe import Recipe, load_training_recipe, to_yaml
from dic_repa.recipe.dotted import ABSENT, differences
from dic_repa.recipe.files import read_recipe
from dic_repa.runs.manifest import MANIFEST, find_damage

# Changing these keeps the trajectory of the weights, so a resumed run may.
_HARMLESS = {
    "sample",
    "evaluate",
    "train.steps",
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.snapshot_every",
    "train.max_skipped",
    "train.loader_timeout",
    "train.trackers",
    "train.sharding",
    "train.micro_batch",
    "train.gradient_checkpointing",
    "train.compile",
    "data.workers",
}
RAW = "raw"  # the name of the weights themselves, among those of their averages
CHECKPOINT_FILES = (MANIFEST, "state.json", "model.safetensors")
_IN_A_CHECKPOINT = re.compile(
    r"(manifest|state)\.json|model\.safetensors|optimizer\.pt"
    r"|ema[^/]*/(config\.json|data\.json|recipe\.yaml|model\.safetensors)"
)
_PACKAGES = (
    "dic-repa",
    "torch",
    "torchvision",
    "accelerate",
    "timm",
    "torchdiffeq",
    "torch-fidelity",
    "diffusers",
    "datasets",
    "huggingface-hub",
    "safetensors",
    "pydantic",
    "pyyaml",
    "click",
    "numpy",
    "pillow",
    "matplotlib",
    "tqdm",
)
RUNS = Path("runs")  # where runs are unless they are told otherwise


class RunFolder:
    """Paths inside a run's folder, and its checkpoints."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.environment_file = self.path / "environment.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.curves_file = self.path / "curves.png"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.snapshots = self.path / "snapshots"

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run; a UserError where `path` is none."""
        run = cls(path)
        if not run.recipe_file.is_file():
            missing = "has no recipe.yaml" if run.path.is_dir() else "does not exist"
            what = "is a file; name the folder of a run" if run.path.is_file() else missing
            raise UserError(f"{path} is not a run: it {what}{suggest_runs(run.path)}")
        return run

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
            raise UserError(f"{taken[0]} is in the way of a new run, and none of the old one's; move it, or remove it")

    def claim(self) -> None:
        """Mark the folder as a run's, so that `lock` can be made in it; a run that is there stays as it is."""
        if read_marker(self.path) is not None:
            return
        names = self._own_names()
        for folder in self.list_checkpoints():  # of a version that left no marker: the manifest tells what is in it
            with contextlib.suppress(OSError, ValueError, KeyError):
                files = json.loads((folder / MANIFEST).read_text())["files"]
                write_marker(folder, Marker("checkpoint", {MANIFEST, *files}))
                names.append(f"checkpoints/{folder.name}")
        for file in [*self.samples.glob("step_*.png"), *self.snapshots.glob("step_*.safetensors")]:
            names.append(file.relative_to(self.path).as_posix())
        begin_folder(self.path, "run", names)

    def create(self, recipe: Recipe, overwrite: bool = False) -> None:
        """Make the folder for a new run, `check_new` allowing. What is not of a run before is left in it."""
        self.check_new(overwrite)
        if self.path.exists():
            remove_listed(self.path, keep=("lock",))
        begin_folder(self.path, "run", self._own_names())
        self.save_recipe(recipe)  # first: killed from here on, it can be resumed
        self._make_folders()

    def save_recipe(self, recipe: Recipe) -> None:
        """Write what the run is made by from here on."""
        write_whole(self.recipe_file, to_yaml(recipe))

    def _make_folders(self) -> None:
        for folder in (self.samples, self.checkpoints):
            folder.mkdir(exist_ok=True)

    def _files(self) -> list[Path]:
        """The files that a run has one of."""
        names = ("lock", "not_finite.json", "checkpoints/best", "checkpoints/best.json")
        known = [self.recipe_file, self.environment_file, self.metrics_file, self.curves_file]
        return [*known, *(self.path / name for name in names)]

    def _own_names(self) -> list[str]:
        return [file.relative_to(self.path).as_posix() for file in self._files()]

    def check_resume(self, recipe: Recipe, allow_change: bool = False) -> list[str]:
        """How `recipe` differs from the run's own, 'train.steps: 60 -> 1000', a line for each key; a UserError if there
        is no run to go on with, or a difference would change what it computes.
        """
        if not self.path.exists():
            raise UserError(f"there is no run at {self.path} to resume; leave --resume out to begin one")
        before = RunFolder.open(self.path).recipe()
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
        """Whether the whole checkpoint of the last of `steps` is there; a UserError where there are later ones."""
        last = max(map(checkpoint_step, self.list_checkpoints()), default=0)  # without reading any of them
        newest = self.newest_checkpoint() if last >= steps else None
        if newest is None:
            return False
        self._check_steps(checkpoint_step(newest), steps)
        return checkpoint_step(newest) == steps

    def _check_steps(self, done: int, steps: int) -> None:
        if done > steps:
            raise UserError(f"{self.path} has done {done} steps already, more than train.steps {steps}")

    def resume(self, recipe: Recipe, allow_change: bool = False) -> Path | None:
        """Make an existing run ready to go on, and return the checkpoint to go on from; None where there is none yet.

        Removes what is newer than that: steps that are about to be done again, and checkpoints that are damaged. The
        old recipe stays until `save_recipe`: the checkpoint may turn out not to fit the new one.
        """
        self.check_resume(recipe, allow_change)
        newest = self.newest_checkpoint()
        done = checkpoint_step(newest) if newest else 0
        self._check_steps(done, recipe.train.steps)
        for folder in self.list_checkpoints():
            if checkpoint_step(folder) > done:
                self._remove_checkpoint(folder)
        for snapshot in self.snapshots.glob("step_*"):
            named = re.match(r"step_(\d+)", snapshot.name)
            if named and is_listed(snapshot) and int(named[1]) > done:
                snapshot.unlink()
        for left in [*self.path.glob(f"{ASIDE}*"), *self.path.glob(f"*/{ASIDE}*")]:  # of a run that was killed
            if is_listed(left):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        self._make_folders()
        self._cut_metrics(done)
        return newest

    def recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe that the run was begun with; `overrides` as in `load_recipe`."""
        # All its keys are there. A run from before there was a warm-up of the average has none.
        older = "ema_warmup" not in (read_recipe(self.recipe_file).get("train") or {"ema_warmup": None})
        return load_training_recipe(self.recipe_file, ["train.ema_warmup=false"] * older + list(overrides))

    def newest_checkpoint(self, part: str = "") -> Path | None:
        """The whole checkpoint with the most steps; None where there is none at all.

        A damaged one is named on standard error and passed over; a UserError where all of them are damaged. `part`
        looks only at that folder or file of a checkpoint, such as 'ema'.
        """
        damages: dict[Path, str] = {}
        for folder in sorted(self.list_checkpoints(), key=checkpoint_step, reverse=True):
            damage = find_damage(folder, part)
            if damage is None:
                for damaged, why in damages.items():
                    print(f"warning: {damaged} is damaged: {why}; taking {folder.name}", file=sys.stderr)
                return folder
            damages[folder] = damage
        if damages:
            why = "; ".join(f"{folder.name}: {damage}" for folder, damage in damages.items())
            hint = "restore one" if part else f"restore one, or remove {self.checkpoints} to begin anew"
            raise UserError(f"all checkpoints of {self.path} are damaged ({why}); {hint}")
        return None

    def list_checkpoints(self) -> list[Path]:
        """The folders of all checkpoints, whole or not."""
        named = (folder for folder in self.checkpoints.glob("step_*") if re.fullmatch(r"step_\d+", folder.name))
        files = (MARKER, *CHECKPOINT_FILES)  # the marker goes last when one is removed, which a kill may cut off
        return [folder for folder in named if any((folder / name).exists() for name in files)]

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def drop_old_checkpoints(self, keep: int, keep_every: int | None = None) -> None:
        """Keep the `keep` newest checkpoints, the best, and those whose step is a multiple of `keep_every`."""
        best = (self.best() or {}).get("step")
        for folder in sorted(self.list_checkpoints(), key=checkpoint_step)[:-keep]:
            if checkpoint_step(folder) != best and (not keep_every or checkpoint_step(folder) % keep_every):
                self._remove_checkpoint(folder)

    def _remove_checkpoint(self, folder: Path) -> None:
        """Remove a checkpoint of this run, and nothing that is not of it.

        What damaged it may have hit its list of files too, so that is completed first by what a checkpoint consists of.
        """
        marker = read_marker(folder) or (Marker("checkpoint") if is_listed(folder) else None)
        if marker is None:
            return
        there = {file.relative_to(folder).as_posix() for file in folder.rglob("*")}
        own = {name for name in there if _IN_A_CHECKPOINT.fullmatch(name)}
        if not own <= marker.names:  # a full disk takes no new list, and seldom needs one
            write_marker(folder, Marker("checkpoint", marker.names | own))
        remove_folder(folder)

    def best(self) -> dict | None:
        """`step`, `score` and `value` of the best checkpoint that `evaluate.every` has found, if it is there."""
        try:
            record = json.loads((self.checkpoints / "best.json").read_text())
            return record if self.checkpoint_path(record["step"]).is_dir() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def mark_best(self, record: dict) -> None:
        """Note the best checkpoint, which has been written: in best.json, and by the link `best` to it."""
        write_whole(self.checkpoints / "best.json", json.dumps(record) + "\n")
        link = self.checkpoints / ".writing-best"
        with contextlib.suppress(OSError):  # a file system without links has best.json
            link.unlink(missing_ok=True)
            link.symlink_to(self.checkpoint_path(record["step"]).name, target_is_directory=True)
            os.replace(link, self.checkpoints / "best")

    def _cut_metrics(self, step: int) -> None:
        # The steps after the checkpoint are about to be done again, and a kill may have cut the last line short.
        if not self.metrics_file.is_file():
            return
        kept = []
        for line in self.metrics_file.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                break
        write_whole(self.metrics_file, "".join(kept))


def suggest_runs(path: Path) -> str:
    """'; did you mean runs/mine?' for a folder of runs, one inside a run, or the bare or misspelt name of one; '' where
    there is none to mean."""
    inside = path.is_dir() and (path.parent / "recipe.yaml").is_file() and (path.parent / "checkpoints").is_dir()
    runs = [path.parent] if inside else list_runs(path)
    if not path.exists():
        named = {str(run): run for run in list_runs(RUNS)} | {run.name: run for run in list_runs(RUNS)}
        near = difflib.get_close_matches(str(path), named, n=3, cutoff=0.7)
        runs = list(dict.fromkeys(named[name] for name in ([str(path)] if str(path) in named else near)))
    return f"; did you mean {' or '.join(map(str, runs[:3]))}?" if runs else ""


def list_runs(folder: Path) -> list[Path]:
    """The runs in a folder of runs."""
    return sorted(file.parent for file in folder.glob("*/recipe.yaml"))


def checkpoint_step(folder: Path) -> int:
    """The number of steps behind a checkpoint folder's weights."""
    return int(folder.name.removeprefix("step_"))


def changes_the_run(key: str, recipe: Recipe) -> bool:
    """Whether another value of that dotted key of a recipe changes the weights' trajectory."""
    if key == "train.steps" and recipe.schedule.name != "constant":
        return True  # the learning rate falls towards the last step
    parts = key.split(".")
    return not any(".".join(parts[: n + 1]) in _HARMLESS for n in range(len(parts)))


def _shown(value: Any) -> str:
    return value if value == ABSENT else json.dumps(value)


def describe_environment(device: str, processes: int) -> dict:
    """What a run was made with: command, versions, git state of the package's source, machine."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": versions,
        "git": _git_state(),
        "machine": {"platform": platform.platform(), "device": device, "cpus": os.cpu_count(), "processes": processes},
    }


def _git_state(file: str = __file__) -> dict | None:
    here = Path(file).resolve()

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # installed below somebody else's repository, it is not in it
        return {"commit": git("rev-parse", "HEAD"), "changed_files": git("status", "--porcelain").splitlines()}
    except (OSError, subprocess.CalledProcessError):
        return None  # installed from a wheel, or git is not there
