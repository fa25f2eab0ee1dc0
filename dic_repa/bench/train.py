"""`dic-repa bench train`: whole training steps of recipes, side by side, and where their time goes."""

import gc
import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import default_collate

from dic_repa.alignment import AlignedDenoiser
from dic_repa.bench.device import look_inside
from dic_repa.bench.model import build_baseline
from dic_repa.bench.peaks import measure_peak
from dic_repa.bench.roofline import rooflines
from dic_repa.bench.timing import Settings, case_label, kernels_label, measure
from dic_repa.errors import UserError
from dic_repa.models import measure_cost
from dic_repa.models.compiled import BY_BLOCK, GRAPH_MODES, allow_recompilation
from dic_repa.recipe import Recipe, load_training_recipe
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.training.dry_run import random_weights, with_random_data
from dic_repa.training.loop import start_accelerator
from dic_repa.training.parts import Parts, build_parts
from dic_repa.training.step import TrainingStep

PHASES = ("encoder", "forward", "alignment", "backward", "optimizer", "ema")
COMPILE: dict[str, Any] = {"off": False, "blocks": BY_BLOCK, "default": True, "reduce-overhead": "reduce-overhead"}
MIXED: dict[str, Any] = {"fp32": "no", "tf32": "no", "bf16": "bf16", "fp16": "fp16"}  # in the recipe's terms


class Clock:
    """Sums the time between marks by name; on a GPU by events on the stream, read when all is done."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any]] = []
        self("start")

    def __call__(self, name: str) -> None:
        if self.device.type == "cuda":
            self.marks.append((name, torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))))
        else:
            self.marks.append((name, time.perf_counter()))

    def shares(self) -> dict[str, float]:
        """Each name's share of the whole; a name is for the time before its mark."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        sums = dict.fromkeys(PHASES, 0.0)
        for (_, before), (name, after) in itertools.pairwise(self.marks):
            sums[name] += before.elapsed_time(after) if self.device.type == "cuda" else after - before
        total = sum(sums.values())
        return {name: seconds / total for name, seconds in sums.items()}


class TrainCase:
    """The training loop's step on one batch in memory, without its log and checkpoints."""

    def __init__(
        self,
        label: str,
        recipe: Recipe,
        parts: Parts,
        accelerator: Accelerator,
        gmacs: float = 0.0,
        precision: str = "fp32",
    ):
        self.precision = precision
        self.graphs = accelerator.device.type == "cuda" and recipe.train.compile in GRAPH_MODES
        self.label, self.recipe, self.parts, self.accelerator = label, recipe, parts, accelerator
        self.batch, self.steps = recipe.train.batch_size, 0
        self.operations = 3 * 2 * gmacs  # of the denoiser, whose backward pass is two forward passes
        self.step = TrainingStep(parts, recipe.train, accelerator)
        # Accelerate has one state for the whole process, and reads its precision again when the encoder runs.
        self.state = dict(AcceleratorState._shared_state)
        batch = default_collate([parts.data[i] for i in range(self.batch)])
        self.data = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}

    def __call__(self, clock=lambda _name: None) -> Tensor:
        AcceleratorState._shared_state.update(self.state)
        with gpu_arithmetic(self.recipe.train.tf32, benchmark=True):
            loss = self.step(self.data, self.steps, clock)
        self.steps += 1
        return loss

    def facts(self, device: torch.device) -> dict[str, Any]:
        clock = Clock(device)
        for _ in range(3):
            self(clock)
        return {"phases": clock.shares(), **({} if self.graphs else look_inside(self, device))}


class PlainEMA:
    """The average of the baselines, written plainly, tensor by tensor."""

    def __init__(self, denoiser: nn.Module, decay: float):
        self.decay, self.model = decay, denoiser
        self.average = [parameter.detach().clone() for parameter in denoiser.parameters()]

    @torch.no_grad()
    def update(self, denoiser: nn.Module, step: int) -> None:
        for average, parameter in zip(self.average, denoiser.parameters()):
            average.mul_(self.decay).add_(parameter, alpha=1 - self.decay)


def bench_train(
    recipes: Sequence[str], settings: Settings, overrides: Sequence[str] = (), roofline: bool = False
) -> dict:
    """Time a training step of each recipe as the settings say.

    Data is random and in memory; encoders have random weights unless the recipe names a file of them. A baseline runs
    the same step with its denoiser, torch's plain AdamW and an average written tensor by tensor. Returns as `measure`,
    rows with `phases`: the shares of a step; with `roofline`, also the device's `peaks` and the `rooflines` of steps.
    """
    device, baselines = settings.device, settings.baselines_of(recipes)
    if device.type == "cpu" and "fp16" in settings.precisions:
        raise UserError("training in fp16 needs a GPU; take bf16 or fp32")
    notes: list[str] = []
    allow_recompilation()
    cases = []
    for name, kind, batch in itertools.product(recipes, settings.precisions, settings.batches):
        recipe = prepare_recipe(name, overrides, kind, batch, notes)
        for mode, kernels in itertools.product(settings.compiles, settings.kernels):
            recipe.train.compile, recipe.model.kernels = COMPILE[mode], kernels
            parts, accelerator = build_step(recipe, device)
            # Of the average, which has no hooks: what the tap's would leave behind makes torch.compile start twice.
            gmacs = measure_cost(parts.ema.model, recipe.data.size).macs / 1e9
            label = case_label(name, kind, mode, kernels_label(kernels))
            cases.append(TrainCase(label, recipe, parts, accelerator, gmacs, kind))
        for baseline in baselines[name]:
            recipe.train.compile = False
            parts, accelerator = build_step(recipe, device)
            replace_denoiser(parts, baseline, recipe, accelerator)
            label = f"{name} {kind} by {baseline.rpartition(':')[2]}"
            cases.append(TrainCase(label, recipe, parts, accelerator, gmacs, kind))
    result = measure(cases, settings, "training steps")
    for row in result["rows"]:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in row["phases"].items())
        notes.append(f"{row['label']}, batch {row['batch']}: {shares}")
    if roofline:
        peaks = {kind: measure_peak(kind, device) for kind in settings.precisions}
        result |= {"peaks": peaks, "rooflines": rooflines(cases, device, peaks)}
    return result | {"notes": [*dict.fromkeys(notes)]}


def prepare_recipe(name: str, overrides: Sequence[str], kind: str, batch: int, notes: list[str]) -> Recipe:
    """The recipe with random data, in one precision and batch size; encoders whose weights are fetched have random
    ones, which `notes` then says."""
    recipe = with_random_data(load_training_recipe(name, overrides), notes)
    recipe.train.micro_batch, recipe.train.batch_size = None, batch
    recipe.train.precision, recipe.train.trackers = MIXED[kind], []
    if kind in ("fp32", "tf32"):  # in bf16 and fp16 the recipe says how the rest, in float32, is rounded
        recipe.train.tf32 = kind == "tf32"
    for section in recipe.alignments:
        if random_weights(section) is not None and "weights" not in section.encoder_options:
            section.encoder_options["pretrained"] = False
            notes.append(f"{section.encoder} has random weights: they are as fast")
    return recipe


def build_step(recipe: Recipe, device: torch.device) -> tuple[Parts, Accelerator]:
    """The parts of a recipe, built in this process after others."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = start_accelerator(recipe.train)
    if accelerator.device.type != device.type:
        here = accelerator.device.type
        raise UserError(f"training runs on {here} here; set ACCELERATE_USE_CPU=true for --device cpu")
    return build_parts(recipe, accelerator), accelerator


def replace_denoiser(parts: Any, baseline: str, recipe: Recipe, accelerator: Accelerator) -> None:
    """Put what the factory `baseline` makes of the denoiser in its place, and free what belonged to the denoiser."""
    parts.denoiser = build_baseline(baseline, parts.denoiser, recipe.data.size)
    alignments = list(parts.aligner.alignments)
    parts.model = parts.optimizer = parts.ema = parts.sampler = parts.averages = parts.aligner = None
    accelerator.free_memory()  # it holds on to what it has prepared
    gc.collect()  # what is replaced holds on to itself, by hooks
    model = AlignedDenoiser(parts.denoiser, alignments)
    parts.aligner = model.aligner
    given = recipe.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), given.learning_rate, given.betas, weight_decay=given.weight_decay)
    parts.model, parts.optimizer = accelerator.prepare(model, optimizer)
    parts.ema = PlainEMA(parts.denoiser, recipe.train.sampled_decay)
    parts.averages = {"ema": parts.ema}
