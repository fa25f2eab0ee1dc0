"""The checkpoints in a run's folder: which there are, the newest whole one, the best, and which are removed.

A checkpoint is a folder that is renamed once it is whole; its manifest shows whether it still is, and which run and
step it belongs to.
"""

import contextlib
import json
import os
import re
from pathlib import Path

from dic_repa.errors import UserError
from dic_repa.files.atomic import write_whole
from dic_repa.files.manifest import MANIFEST, find_damage, read_manifest
from dic_repa.files.outputs import MARKER, Marker, is_listed, read_marker, remove_folder, write_marker
from dic_repa.files.reading import parse_json, read_json
from dic_repa.runtime.progress import warn

RUN_ID = "run.json"
RAW = "raw"  # the name of the weights themselves, among those of their averages
CHECKPOINT_FILES = (MANIFEST, "state.json", "model.safetensors")
_IN_A_CHECKPOINT = re.compile(
    r"(manifest|state)\.json|model\.safetensors|optimizer\.pt|(model|optimizer)-\d{5}-of-\d{5}\.safetensors"
    r"|ema[^/]*/(config\.json|data\.json|recipe\.yaml|model\.safetensors)"
)


class Checkpoints:
    """Those of the run in the folder `path`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def newest_checkpoint(self, part: str = "") -> Path | None:
        """The whole checkpoint with the most steps; None if there are no checkpoints.

        Prints a warning for each newer one that is damaged; a UserError if all are. With `part`, only that folder or
        file of a checkpoint is checked, such as 'ema'.
        """
        damages: dict[Path, str] = {}
        for folder in sorted(self.list_checkpoints(), key=checkpoint_step, reverse=True):
            damage = find_damage(folder, part) or find_stranger(folder)
            if damage is None:
                for damaged, why in damages.items():
                    warn(f"{damaged} is damaged: {why}; taking {folder.name}")
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
        files = (MARKER, *CHECKPOINT_FILES)  # the marker is removed last, and a kill may come before
        return [folder for folder in named if any((folder / name).exists() for name in files)]

    def another_checkpoint(self, name: str, step: int) -> Path | None:
        """A whole checkpoint of this run beside that of `step`: the earliest for 'earlier', of those before it the one
        nearest to a share of its steps for '0.25', or 'step_00000250' itself; None if there is none."""
        others = {checkpoint_step(folder): folder for folder in self.list_checkpoints()}
        if name.startswith("step_"):
            ranked = [checkpoint_step(Path(name))]
        else:
            wanted = 0.0 if name == "earlier" else float(name) * step
            ranked = sorted((other for other in others if other < step), key=lambda other: abs(other - wanted))
        for other in ranked:
            folder = others.get(other)
            if folder and other != step and not (find_damage(folder, "ema") or find_stranger(folder)):
                return folder
        return None

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def drop_old_checkpoints(self, keep: int, keep_every: int | None = None) -> None:
        """Keep the `keep` newest checkpoints, the best, and those whose step is a multiple of `keep_every`."""
        best = (self.best() or {}).get("step")
        for folder in sorted(self.list_checkpoints(), key=checkpoint_step)[:-keep]:
            if checkpoint_step(folder) != best and (not keep_every or checkpoint_step(folder) % keep_every):
                self.remove_checkpoint(folder)

    def remove_checkpoint(self, folder: Path) -> None:
        """Remove a checkpoint of this run, and no other file.

        Its list of files may be damaged too, so it is first completed by the names of a checkpoint's files.
        """
        marker = read_marker(folder) or (Marker("checkpoint") if is_listed(folder) else None)
        if marker is None:
            return
        there = {file.relative_to(folder).as_posix() for file in folder.rglob("*")}
        own = {name for name in there if _IN_A_CHECKPOINT.fullmatch(name)}
        if not own <= marker.names:  # otherwise not written, since the disk may be full
            write_marker(folder, Marker("checkpoint", marker.names | own))
        remove_folder(folder)

    def best(self) -> dict | None:
        """`step`, `score` and `value` of the best checkpoint that `evaluate.every` has found, if it is there."""
        try:
            record = parse_json((self.checkpoints / "best.json").read_text())
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


def find_stranger(checkpoint: Path) -> str | None:
    """Where a checkpoint came from, in a few words, if its manifest names another run or step than its place does."""
    checkpoint, belongs = checkpoint.resolve(), read_manifest(checkpoint)
    named = re.fullmatch(r"step_(\d+)", checkpoint.name)
    if named and belongs.get("step") not in (None, int(named[1])):
        return f"it is the checkpoint of step {str(belongs['step'])[:20]}"
    run = read_run_id(checkpoint.parents[1]) if checkpoint.parent.name == "checkpoints" else None
    if None not in (run, belongs.get("run")) and run != belongs["run"]:
        return "it is a checkpoint of another run"
    return None


def read_run_id(run: Path) -> str | None:
    """What the manifests of the checkpoints of `run` call it; None for a run that an earlier version began."""
    try:
        return str(read_json(run / RUN_ID, "")["id"])
    except (OSError, UserError, KeyError, TypeError):
        return None


def checkpoint_step(folder: Path) -> int:
    """The number of steps behind a checkpoint folder's weights."""
    return int(folder.name.removeprefix("step_"))
