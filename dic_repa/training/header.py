"""What a run is, told before its first step: of one that is not what was meant one learns at once."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from dic_repa.models import measure_cost
from dic_repa.recipe import AlignmentSection, Recipe
from dic_repa.recipe.build import build_denoiser
from dic_repa.runs.folder import RunFolder
from dic_repa.runtime.threads import describe_threads
from dic_repa.training.parts import Parts

PRECISIONS = {"no": "float32", "bf16": "bf16", "fp16": "fp16"}


def run_header(recipe: Recipe, run: RunFolder, parts: Parts, accelerator: Accelerator, passes: int, start: int) -> str:
    """The run as a table: device, denoiser, data, encoders, batch, steps and folder; `start` steps of it are done."""
    settings = recipe.train
    precision = PRECISIONS[settings.precision] + (", TF32" if settings.tf32 else "")
    threads = f", {describe_threads()}" if accelerator.device.type == "cpu" else ""
    rows = [
        ("device", f"{device_name(accelerator.device)}, {precision}{threads}"),
        ("denoiser", _denoiser(recipe, parts)),
        ("data", _data(recipe, parts)),
        *(("encoder", _encoder(section)) for section in recipe.alignments),
        ("batch", _batch(settings.batch_size, accelerator.num_processes, passes)),
        ("steps", f"{settings.steps:,}" + (f", of which {start:,} are done" if start else "")),
        ("folder", str(run.path)),
    ]
    return "\n".join(f"{name:10}{text}" for name, text in rows)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type.upper()}, no GPU"


def _denoiser(recipe: Recipe, parts: Parts) -> str:
    model = parts.ema.model
    if parts.sharded:  # then a process has a part of it alone
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build_denoiser(recipe.model, parts.data.channels, parts.condition)
    cost = measure_cost(model, recipe.data.size)
    return f"{recipe.model.name}, {cost.parameters / 1e6:.4g} M parameters, {cost.macs / 1e9:.4g} GMACs an image"


def _data(recipe: Recipe, parts: Parts) -> str:
    size = " x ".join(map(str, parts.shape))
    place = f" in {recipe.data.path}" if recipe.data.path else ""
    return f"{recipe.data.name}{place}, {len(parts.data):,} samples of {size}, {parts.condition.describe()}"


def _encoder(section: AlignmentSection) -> str:
    cached = ", its tokens from the cache" if section.cache else ""
    return f"{section.encoder} at {section.tap}, weight {section.weight:g}{cached}"


def _batch(size: int, processes: int, passes: int) -> str:
    each = f"{processes} process{'es' * (processes > 1)} x {size // processes}"
    return f"{size} = {each}" + (f" in {passes} passes of {size // processes // passes}" if passes > 1 else "")
