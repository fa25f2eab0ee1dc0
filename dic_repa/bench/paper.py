"""`dic-repa bench paper`: the measurements that compare with the papers' speed, what matters most first.

A GPU may be lent for minutes. So each case is measured by itself, is a row as soon as it is measured, and is left out
where it would not fit into the budget any more.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dic_repa.bench.budget import Budget
from dic_repa.bench.ceilings import convolution_cases, time_ceiling
from dic_repa.bench.device import free_memory
from dic_repa.bench.model import ModelCase, build_baseline, random_inputs, randomise
from dic_repa.bench.peaks import measure_bandwidth, measure_peak
from dic_repa.bench.sample import bench_sample
from dic_repa.bench.timing import TORCH_DEFAULT, Settings, case_label, interleave, kernels_label, speed
from dic_repa.bench.train import bench_train
from dic_repa.models import create_denoiser, measure_cost
from dic_repa.models.compiled import CompiledDenoiser
from dic_repa.models.kernel_choice import set_kernels
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.sampling.sampler import DTYPES

PARTS = ("ceilings", "check", "forward", "train", "flags", "one", "sample", "whole")  # in the order of importance
ONCE = ("check", "flags")  # not in each precision
_GUIDED = ("sample.solver=euler_maruyama", "sample.guidance={scale: 1.65, interval: [0.0, 0.7]}")
# Seconds that a case takes on a GPU, from building to the last round, about: an H200 and a margin.
WITHOUT = "blocks-without-kernels"
NEEDS = {"baseline": 15, "off": 15, "blocks": 30, WITHOUT: 30, "default": 60, "reduce-overhead": 60}
TRAIN_NEEDS = {"off": 50, "blocks": 90, WITHOUT: 90, "default": 150}
SAMPLE_NEEDS, SHORT_NEEDS = 120, 60
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured: a DiC and a peer with the options of each, recipes of both, and the sampler's steps, with the
    fewer that are taken where the budget has no time for all. `needs` times as long as on a GPU takes each case."""

    denoisers: tuple[str, str] = ("DiC-XL", "SiT-XL/2")
    options: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    width: int = 384  # of DiC's first level
    size: int = 32
    batches: tuple[int, ...] = (32, 128)
    recipes: tuple[str, str] = ("dic-xl-urepa", "sit-xl-2-repa")
    overrides: tuple[str, ...] = ()
    train_batches: tuple[int, ...] = (32, 128)
    steps: tuple[int, int] = (250, 50)
    seconds: float = 0.5
    needs: float = 1.0


FULL = Plan()
SMALL = Plan(
    denoisers=("DiC-S", "SiT-S/2"),
    options=({"width": 32, "depths": (1, 1, 1, 1, 1)}, {"depth": 2}),
    width=32,
    size=16,
    batches=(2,),
    recipes=("digits-urepa", "digits-sit-repa"),
    train_batches=(8,),
    steps=(4, 2),
    seconds=0.0,
    needs=0.3,
)


def measure_paper(
    device: torch.device,
    plan: Plan,
    parts: Collection[str],
    precisions: Sequence[str],
    baseline: str,
    rounds: int = 7,
    budget: Budget | None = None,
) -> Iterator[tuple[str, Iterator[Row]]]:
    """PART-PRECISION, or the part alone if it is of no precision, and its rows, each as soon as it is measured: to be
    taken in that order. The plain `baseline` is measured beside DiC."""
    paper = Paper(device, plan, baseline, rounds, budget or Budget())
    for kind, part in itertools.product(precisions, PARTS):
        if part in parts and (part not in ONCE or kind == precisions[0]):
            yield part if part in ONCE else f"{part}-{kind}", getattr(paper, part)(kind)
            paper.forget()


def _way(mode: str) -> tuple[str, str]:
    """A mode of torch.compile, and `model.kernels`."""
    return ("blocks", "off") if mode == WITHOUT else (mode, "auto")


class Paper:
    """Each of the `PARTS` as a method: a precision to rows."""

    def __init__(self, device: torch.device, plan: Plan, baseline: str, rounds: int, budget: Budget):
        self.device, self.plan, self.baseline, self.rounds, self.budget = device, plan, baseline, rounds, budget
        self.also = (WITHOUT,) if device.type == "cuda" else ()  # Triton's kernels, which a CPU does without anyway
        self.peaks: dict[str, dict[str, float]] = {}
        self.built: tuple[str, Any] | None = None

    def ceilings(self, kind: str) -> Iterator[Row]:
        """What the device can do: a copy, matrix products, DiC's 3x3 convolutions forwards and backwards."""

        def best() -> Row:
            self.peaks[kind] = measure_peak(kind, self.device)
            return {"tflops": self.peaks[kind]["matrix"]}

        yield self._row("copy", 1, 10, lambda: {"gb_per_second": measure_bandwidth(self.device)})
        yield self._row(f"best matrix product, {kind}", 1, 15, best)
        for batch in self.plan.batches:
            for label, operations, call in convolution_cases(batch, self.plan.width, self.plan.size, kind, self.device):
                yield self._row(label, batch, 1, partial(time_ceiling, call, operations, kind, self.device))

    def check(self, _kind: str) -> Iterator[Row]:
        """Outputs in float32: by block, and the plain baseline's, against eager."""
        name = self.plan.denoisers[0]
        for mode in ("blocks", "baseline"):
            label = self._label(name, "fp32", mode)
            yield self._row(label, 2, NEEDS[mode], partial(self._compared, name, "fp32", 2, mode))

    def forward(self, kind: str) -> Iterator[Row]:
        dic, peer = self.plan.denoisers
        for batch in self.plan.batches:
            yield from self._denoise(dic, kind, batch, ("baseline", "off", "blocks", *self.also))
            yield from self._denoise(peer, kind, batch, ("off", "blocks"))

    def train(self, kind: str) -> Iterator[Row]:
        """Steps with the recipes' encoders (DINOv2-B), which have random weights."""
        dic, peer = self.plan.recipes
        for batch in self.plan.train_batches:
            yield from (self._step(dic, kind, batch, mode) for mode in ("blocks", *self.also, "off"))
        yield self._step(peer, kind, self.plan.train_batches[0], "blocks")

    def flags(self, _kind: str) -> Iterator[Row]:
        """Torch's own flags: TF32 in convolutions, not in matrix products."""
        for kind, name in itertools.product((TORCH_DEFAULT, "tf32"), self.plan.denoisers):
            yield from self._denoise(name, kind, self.plan.batches[0], ("off",))

    def one(self, kind: str) -> Iterator[Row]:
        dic, peer = self.plan.denoisers
        yield from self._denoise(dic, kind, 1, ("baseline", "off", "reduce-overhead", "blocks"))
        yield from self._denoise(peer, kind, 1, ("off", "reduce-overhead"))

    def sample(self, kind: str) -> Iterator[Row]:
        """Guided sampling; in fewer steps, which the label says, where the budget has no time for all."""
        name, (many, few) = self.plan.recipes[0], self.plan.steps
        batch = self.plan.train_batches[0]
        for way in ("doubled", "one-by-one"):
            steps = many if self.budget.left() >= SAMPLE_NEEDS * self.plan.needs else few
            need = SAMPLE_NEEDS if steps == many else SHORT_NEEDS
            settings = self._settings(kind, "blocks", batch, rounds=min(self.rounds, 3), seconds=0.0)
            overrides = (*self.plan.overrides, *_GUIDED, f"sample.steps={steps}")
            label = f"{case_label(name, kind, 'blocks', way)}, {steps} steps" + (
                "" if steps == many else f", not {many}"
            )
            yield self._row(label, batch, need, partial(self._sampled, name, settings, overrides, way))

    def whole(self, kind: str) -> Iterator[Row]:
        """All of the denoiser as one graph."""
        yield from self._denoise(self.plan.denoisers[0], kind, self.plan.batches[0], ("default",))
        yield self._step(self.plan.recipes[0], kind, self.plan.train_batches[0], "default")

    def _row(self, label: str, batch: int, need: float, measure: Any) -> Row:
        row = self.budget.row({"label": label, "batch": batch}, need * self.plan.needs, measure)
        row["label"] = label
        if "failed" in row:
            free_memory(self.device)
        return row

    def _label(self, name: str, kind: str, mode: str) -> str:
        if mode == "baseline":
            return f"{name} {kind} by {self.baseline.rpartition(':')[2]}"
        compiled, kernels = _way(mode)
        return case_label(name, kind, compiled, kernels_label(kernels))

    def _settings(self, kind: str, mode: str, batch: int, **more: Any) -> Settings:
        more = {"rounds": self.rounds, "seconds": self.plan.seconds} | more
        return Settings(self.device, (kind,), (mode,), (batch,), (), **more)

    def _step(self, name: str, kind: str, batch: int, mode: str) -> Row:
        def measure() -> Row:
            self.forget()
            compiled, kernels = _way(mode)
            settings = self._settings(kind, compiled, batch, rounds=min(self.rounds, 5), kernels=(kernels,))
            return self._shares(kind, bench_train((name,), settings, self.plan.overrides)["rows"][0])

        return self._row(self._label(name, kind, mode), batch, TRAIN_NEEDS[mode], measure)

    def _denoise(self, name: str, kind: str, batch: int, modes: Sequence[str]) -> Iterator[Row]:
        for mode in modes:
            measure = partial(self._timed, name, kind, batch, mode)
            yield self._row(self._label(name, kind, mode), batch, NEEDS[mode], measure)

    def _compared(self, name: str, kind: str, batch: int, mode: str) -> Row:
        return {"difference": self._difference(self._case(name, kind, batch, mode))}

    def _sampled(self, name: str, settings: Settings, overrides: Sequence[str], way: str) -> Row:
        self.forget()
        return bench_sample((name,), settings, overrides, (way,))["rows"][0]

    def _timed(self, name: str, kind: str, batch: int, mode: str) -> Row:
        settings = self._settings(kind, "off", batch)  # which says what this device does not have
        case, begin = self._case(name, kind, batch, mode), time.perf_counter()
        case()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        row: Row = {"first_call": time.perf_counter() - begin}
        (timing,) = interleave([case], settings.rounds, settings.seconds, 2, case.label)
        row |= speed(timing, batch)
        row |= {"tflops": case.operations * row["images_per_second"] / 1000, "gmacs": case.operations / 2}
        return self._shares(kind, row | {"difference": self._difference(case)})

    def _shares(self, kind: str, row: Row) -> Row:
        return row | {f"{work}_share": row["tflops"] / most for work, most in self.peaks.get(kind, {}).items()}

    def _denoiser(self, name: str) -> Any:
        """In float32, made on the device itself, where random numbers take no time; the last one is kept."""
        if self.built is None or self.built[0] != name:
            self.forget()
            torch.manual_seed(0)
            with self.device:
                options = self.plan.options[self.plan.denoisers.index(name)]
                self.built = name, randomise(create_denoiser(name, **options))
        return self.built[1]

    def _case(self, name: str, kind: str, batch: int, mode: str) -> ModelCase:
        denoiser, dtype = self._denoiser(name), DTYPES.get(kind, torch.float32)
        x, t, y = random_inputs(denoiser, batch, self.plan.size, self.device)
        operations = 2 * measure_cost(denoiser, self.plan.size).macs / 1e9
        set_kernels(denoiser, "off")  # what they must agree with
        with torch.inference_mode(), gpu_arithmetic(tf32=False):
            reference: Tensor = denoiser(x, t, y)
        if mode == "baseline":
            model = build_baseline(self.baseline, denoiser, self.plan.size).to(dtype).eval()
        else:
            compiled, kernels = _way(mode)
            model = denoiser if dtype == torch.float32 else copy.deepcopy(denoiser).to(dtype)
            set_kernels(model, kernels)
            model = model if compiled == "off" else CompiledDenoiser(model, compiled)
        return ModelCase(self._label(name, kind, mode), model, operations, kind, (x.to(dtype), t, y), reference)

    def _difference(self, case: ModelCase) -> float:
        return float((case().float() - case.reference).norm() / case.reference.norm())

    def forget(self) -> None:
        """Free the denoiser that is kept, and compiled code."""
        self.built = None
        free_memory(self.device)
