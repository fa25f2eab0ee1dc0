"""Post-hoc EMA (Karras et al., arXiv 2312.02696): an average of any width, after the run, from stored snapshots.

A snapshot is a `PowerEMA` as it was after t steps: the mean of the weights over tau in [0, t] with the profile
`p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)`. The profile that is asked for is fitted by a linear combination of the
snapshots' profiles, by least squares, and the snapshots' weights are combined with the same factors.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from dic_repa.data.saved import SavedData
from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.lock import locked_output
from dic_repa.files.manifest import write_manifest
from dic_repa.files.outputs import check_folder
from dic_repa.files.weights import WRITE_ERRORS, save_tensors
from dic_repa.runs.checkpoints import read_run_id
from dic_repa.runs.folder import RunFolder
from dic_repa.runs.snapshots import Snapshot, find_snapshots, read_snapshot
from dic_repa.runtime.progress import warn
from dic_repa.training.ema import sigma_rel_to_gamma


def list_snapshots(run: RunFolder) -> list[Snapshot]:
    """The run's snapshots, by step and width; a UserError if it has none."""
    found = find_snapshots(run)
    if not found:
        settings = "train.power_ema=[0.05,0.1] and train.snapshot_every=STEPS"
        raise UserError(f"{run.path} has no snapshots; train with {settings} to make averages later")
    return found


def profile_products(steps_a: ArrayLike, gammas_a: ArrayLike, steps_b: ArrayLike, gammas_b: ArrayLike) -> np.ndarray:
    """The integrals over tau of `p_a(tau) p_b(tau)` for all pairs, (A, B): the paper's closed form
    `(g_a + 1) (g_b + 1) t^(g_a + g_b + 1) / ((g_a + g_b + 1) t_a^(g_a + 1) t_b^(g_b + 1))`, t the smaller of the steps.
    """
    ta, ga = np.asarray(steps_a, float)[:, None], np.asarray(gammas_a, float)[:, None]
    tb, gb = np.asarray(steps_b, float)[None], np.asarray(gammas_b, float)[None]
    logarithm = (ga + gb + 1) * np.log(np.minimum(ta, tb)) - (ga + 1) * np.log(ta) - (gb + 1) * np.log(tb)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * np.exp(logarithm)


def combination(steps: list[int], gammas: list[float], step: int, gamma: float) -> np.ndarray:
    """The factors (N,) of N snapshots whose combined profile is nearest to that of `gamma` at `step`.

    They sum to 1: a profile that weighs the training as a whole is a mean.
    """
    gram = profile_products(steps, gammas, steps, gammas)
    wanted = profile_products(steps, gammas, [step], [gamma])[:, 0]
    scale = np.sqrt(np.diag(gram))  # profiles of late steps are flat and of early ones steep
    factors = np.linalg.lstsq(gram / np.outer(scale, scale), wanted / scale, rcond=1e-13)[0] / scale
    return factors / factors.sum()


def reconstruct(run: RunFolder, sigma_rel: float, step: int | None = None) -> tuple[dict[str, Tensor], int]:
    """The average of width `sigma_rel` after `step` steps, by default those of the last snapshot: tensors, and step."""
    snapshots, gamma = list_snapshots(run), sigma_rel_to_gamma(sigma_rel)
    steps = sorted({snapshot.step for snapshot in snapshots})
    step = step or steps[-1]
    if step not in steps:
        raise UserError(f"{run.path} has no snapshot of step {step}; it has {', '.join(map(str, steps))}")
    snapshots = [snapshot for snapshot in snapshots if snapshot.step <= step]
    widths = {snapshot.sigma_rel for snapshot in snapshots}
    if missing := len({snapshot.step for snapshot in snapshots}) * len(widths) - len(snapshots):
        warn(f"{missing} snapshots of {run.path} are missing, and the average is made of the others")
    gammas = [sigma_rel_to_gamma(snapshot.sigma_rel) for snapshot in snapshots]
    factors = combination([snapshot.step for snapshot in snapshots], gammas, step, gamma)
    total: dict[str, Tensor] = {}
    for factor, snapshot in zip(factors.tolist(), snapshots):
        for name, tensor in read_snapshot(run, snapshot).items():
            part = tensor.double() * factor if tensor.is_floating_point() else tensor
            total[name] = total[name] + part if name in total and tensor.is_floating_point() else part
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in total.items()}, step


def save_reconstruction(run: RunFolder, sigma_rel: float, folder: Path, step: int | None = None) -> int:
    """Write `reconstruct`'s weights as an inference checkpoint, and return its step.

    A UserError if `folder` exists and holds anything else.
    """
    check_folder(folder, "average")
    newest = run.newest_checkpoint("ema")
    if newest is None:
        raise UserError(f"{run.path} has no checkpoint yet")
    tensors, step = reconstruct(run, sigma_rel, step)
    made = {"sigma_rel": sigma_rel, "step": step, "run": str(run.path)}
    try:
        with locked_output(folder), write_aside(folder, "average") as aside:
            for name in ("config.json", "recipe.yaml"):
                shutil.copyfile(newest / "ema" / name, aside / name)
            if data := SavedData.read(newest / "ema"):  # older checkpoints have none
                data.write(aside)
            save_tensors(tensors, aside / "model.safetensors", {"post-hoc EMA": json.dumps(made)})
            write_manifest(aside, run=read_run_id(run.path), step=step)
    except WRITE_ERRORS as error:
        raise UserError(f"{folder} could not be written ({first_line(error)})") from None
    return step
