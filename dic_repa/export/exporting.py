"""`export`: writes a folder for another runtime, and keeps it only if it computes what the model does."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dic_repa import __version__
from dic_repa.data import datasets
from dic_repa.data.autoencoders import AutoencoderSpec, load_spec
from dic_repa.data.saved import pack
from dic_repa.errors import UserError, unknown_name
from dic_repa.export.inputs import example_inputs
from dic_repa.export.programs import write_onnx, write_torch
from dic_repa.files.atomic import write_aside
from dic_repa.files.lock import locked_output
from dic_repa.interpolants import path_of, paths
from dic_repa.limits import check_limit
from dic_repa.objectives import DDPM
from dic_repa.objectives.base import run_denoiser
from dic_repa.recipe import SampleSection
from dic_repa.recipe.build import build_objective, normalised_spec
from dic_repa.runtime.progress import detail
from dic_repa.sampling.load import Checkpoint

RECORD = "export.json"
FORMATS = ("torch", "onnx", "diffusers")
"""What `export` writes."""
# The largest difference from the model in float32 that is let through, as a share of its largest output (of 1, if that
# is smaller).
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """What was written to `folder`, and how far its output is from the model's, in the units of `TOLERANCES`."""

    folder: Path
    file: Path
    difference: float
    tolerance: float


def export(
    model: Checkpoint,
    out: str | Path,
    format: str = "torch",
    dtype: str = "float32",
    batch: int | str = "dynamic",
    autoencoder: str | None = None,
) -> Exported:
    """Write the denoiser of a loaded `model` to the folder `out`, over an export that is there.

    Whatever the dtype, a program takes x (B, C, H, W) and t (B,) in float32 and y (B, ...), and gives float32. Of
    average velocities (objective meanflow) it takes (t, r) (B, 2).

    Args:
        format: 'torch' (a torch.export program, denoiser.pt2), 'onnx' (denoiser.onnx) or 'diffusers' (a pipeline).
        dtype: of the weights and of what is computed from them: 'float32', 'float16' or 'bfloat16'.
        batch: how many rows a program takes at once; 'dynamic': any number.
        autoencoder: of a diffusers folder: where the autoencoder is now, by default where it was in training.

    Raises:
        UserError: these do not fit together, the denoiser cannot be exported, or what was written differs from it by
            more than `TOLERANCES`; then `out` is as it was before.
    """
    rows = check_options(format, dtype, batch, autoencoder)
    out, denoiser = Path(out), copy.deepcopy(model.denoiser).to("cpu", getattr(torch, dtype))
    record = describe(model) | {"format": format, "dtype": dtype, "batch": batch}
    with locked_output(out), write_aside(out, "export") as aside:
        if format == "diffusers":
            from dic_repa.export.folder import write_pipeline

            file, run = write_pipeline(aside, model, denoiser, record, autoencoder)
        else:
            write = {"torch": write_torch, "onnx": write_onnx}[format]
            file, run = write(aside, denoiser, example_inputs(model, rows or 3), rows is None)
        difference = _largest_difference(model, run, [rows] if rows else [1, 4])
        detail(f"largest difference from the model: {difference:.3g}")
        if not difference <= TOLERANCES[dtype]:  # nor where it is not a number
            raise UserError(
                f"the {format} export in {dtype} differs from the model by {difference:.2g} of its output, more than "
                f"{TOLERANCES[dtype]:g}, so {out} is not written; {_advice(dtype)}"
            )
        record |= {"file": file, "largest_difference": difference, "tolerance": TOLERANCES[dtype]}
        (aside / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Exported(out, out / file, difference, TOLERANCES[dtype])


def check_options(format: str, dtype: str, batch: int | str, autoencoder: str | None) -> int | None:
    """The number of rows of a program, None for any; a UserError for options that are none or do not fit together."""
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if dtype not in TOLERANCES:
        raise unknown_name("dtype", dtype, TOLERANCES)
    whole = isinstance(batch, int) and not isinstance(batch, bool) and batch > 0
    if batch != "dynamic" and not whole:
        raise UserError(f"a batch is 'dynamic' or a number from 1, not {batch!r}")
    if format == "onnx" and dtype == "bfloat16":
        raise UserError(
            "onnxruntime has no convolution in bfloat16 on a CPU, so an ONNX file could not be checked; take float16, "
            "or another format"
        )
    if format == "diffusers" and whole:
        raise UserError("a diffusers folder takes any batch; leave the batch out, or take the format torch or onnx")
    if format != "diffusers" and autoencoder:
        raise UserError(f"the format {format} holds no autoencoder; leave it out, or take the format diffusers")
    if not isinstance(batch, int):
        return None
    check_limit("batch", batch, "the batch")
    return batch


def describe(model: Checkpoint) -> dict[str, Any]:
    """What one must know to sample with the denoiser alone, as JSON has it."""
    recipe, denoiser, spec = model.recipe, model.denoiser, _autoencoder_spec(model)
    objective = build_objective(recipe.objective)
    velocity = objective.velocity_model(denoiser)
    path, times = path_of(velocity), [1, 0]
    if isinstance(objective, DDPM):
        times = [len(objective.schedule) - 1 + objective.first_step, objective.first_step]
    known = {name: paths.find(name) for name in paths.names()}
    keys = {"solver", *SampleSection.solver_keys(), "pixels"}
    if not (recipe.sample.guidance and recipe.sample.guidance.weak):  # which is another model
        keys.add("guidance")
    mean = {"data_mean": pack(model.data.mean)} if model.data and model.data.mean is not None else {}
    return mean | {
        "dic_repa": __version__,
        "model": {"name": recipe.model.name, "kind": type(denoiser).__name__, **denoiser.config},
        "objective": recipe.objective.model_dump(mode="json"),
        "prediction": getattr(velocity, "prediction", None),
        "path": next((name for name, kind in known.items() if kind is type(path)), None),
        "path_options": vars(path) if path else {},
        "t_at_noise": times[0],
        "t_at_data": times[1],
        "two_times": getattr(velocity, "two_times", False),
        "channels": denoiser.in_channels,
        "size": recipe.data.size,
        "autoencoder": spec
        and spec.to_dict() | {"name": Path(spec.name).name if Path(spec.name).is_absolute() else spec.name},
        "condition": denoiser.conditioned_on.to_dict(),
        "class_names": list(model.condition.names),
        "guides": model.learnt_null,
        "sample": recipe.sample.model_dump(mode="json", include=keys, exclude_none=True),
    }


def _autoencoder_spec(model: Checkpoint) -> AutoencoderSpec | None:
    if model.data and model.data.autoencoder:
        return model.data.autoencoder
    section = model.recipe.data
    own = getattr(datasets.find(section.name), "autoencoder_of", lambda path: "none")
    with contextlib.suppress(UserError):  # it is not on this machine
        return normalised_spec(section, load_spec(section.autoencoder or own(section.place or "")))
    return None


@torch.no_grad()
def _largest_difference(model: Checkpoint, run: Run, batches: list[int]) -> float:
    device, differences = next(model.denoiser.parameters()).device, []
    for rows in batches:
        x, t, y = example_inputs(model, rows)
        expected = run_denoiser(model.denoiser, x.to(device), t.to(device), y.to(device)).cpu().float()
        found = run(x, t, y).float()
        differences.append((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    return torch.stack(differences).max().item()


def _advice(dtype: str) -> str:
    if dtype == "float32":
        return "please report it, with the versions that `dic-repa env` shows"
    return "take float32" + (", or bfloat16, which has a wider range" if dtype == "float16" else "")
