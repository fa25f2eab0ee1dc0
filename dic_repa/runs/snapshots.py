"""The snapshots of a run: averages of its weights, stored for others to be made of them after the run."""

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.files.weights import read_tensors
from dic_repa.runs.checkpoints import read_run_id
from dic_repa.runs.folder import RunFolder


class Snapshot(NamedTuple):
    """A stored average: the steps behind it, its width, and its file."""

    step: int
    sigma_rel: float
    path: Path


def find_snapshots(run: RunFolder) -> list[Snapshot]:
    """The run's snapshots, by step and width."""
    found = []
    for path in run.snapshots.glob("*.safetensors"):
        if match := re.fullmatch(r"step_(\d+)-sigma_rel-([\d.e+-]+)", path.stem):
            with contextlib.suppress(ValueError):  # a width such as 1.2.3
                found.append(Snapshot(int(match[1]), float(match[2]), path))
    return sorted(found)


def read_snapshot(run: RunFolder, snapshot: Snapshot) -> dict[str, Tensor]:
    """The tensors of a snapshot of `run`; a UserError if it is damaged, or of another run or step."""
    tensors, belongs = read_tensors(snapshot.path)
    if belongs.get("step", str(snapshot.step)) != str(snapshot.step):
        raise UserError(f"{snapshot.path} is of step {belongs['step']}, not of that in its name; restore it")
    if belongs.get("run") and (own := read_run_id(run.path)) and belongs["run"] != own:
        raise UserError(f"{snapshot.path} is of another run; move it out of {run.snapshots}")
    return tensors
