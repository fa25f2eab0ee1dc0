"""What a training run needs to go on as if it had not stopped: weights, their average, the optimizer's state, the step.

model.safetensors   the denoiser and the heads          ema/            config.json, model.safetensors, recipe.yaml:
optimizer.pt        plain tensors, never unpickled                      all that sampling needs, `DiC.from_pretrained`
state.json          the step
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from dic_repa.errors import UserError, first_line
from dic_repa.recipe import Recipe, to_yaml
from dic_repa.training.ema import EMA
from dic_repa.weights import load_weights, read_tensors, save_tensors


def save_checkpoint(
    folder: Path,
    step: int,
    accelerator: Accelerator,
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
) -> None:
    """Write a whole checkpoint at `folder` or none: it is written aside, flushed and renamed. Main process only."""
    aside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        save_tensors(accelerator.unwrap_model(model).state_dict(), aside / "model.safetensors")
        save_inference_checkpoint(aside / "ema", ema.model, recipe)
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        torch.save({"optimizer": optimizer.state_dict(), "scaler": scaler}, aside / "optimizer.pt")
        (aside / "state.json").write_text(json.dumps({"step": step}) + "\n")
        for file in aside.rglob("*"):
            _flush(file)
        _flush(aside)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has another name in torch and safetensors
        shutil.rmtree(aside, ignore_errors=True)
        newest = max(folder.parent.glob("step_*"), default=None)
        kept = f"{newest.name} is whole" if newest else "there is none before it"
        raise UserError(f"the checkpoint {folder} could not be written ({first_line(error)}); {kept}") from None
    os.replace(aside, folder)
    _flush(folder.parent)


def load_checkpoint(
    folder: Path, accelerator: Accelerator, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer
) -> int:
    """Restore what `save_checkpoint` wrote, in every process, and return its step."""
    load_weights(accelerator.unwrap_model(model), read_tensors(folder / "model.safetensors")[0], folder)
    load_weights(ema.model, read_tensors(folder / "ema" / "model.safetensors")[0], folder / "ema")
    try:
        content = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        step = json.loads((folder / "state.json").read_text())["step"]
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError
        raise UserError(
            f"{folder} is damaged ({type(error).__name__}); remove it to resume from the one before"
        ) from None
    optimizer.load_state_dict(content["optimizer"])
    if content["scaler"] is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(content["scaler"])
    return step


def save_inference_checkpoint(folder: Path, denoiser: nn.Module, recipe: Recipe) -> None:
    """The small checkpoint: weights and config, and the recipe, which knows the objective and the data's shape."""
    denoiser.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
