"""`dic-repa bench paper`: the measurements that compare with the papers' speed, one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dic_repa.bench.device import free_memory
from dic_repa.bench.model import bench_model
from dic_repa.bench.sample import bench_sample
from dic_repa.bench.train import bench_train
from dic_repa.errors import UserError, unknown_name

PARTS = ("forward", "train", "sample")


@dataclass(frozen=True)
class Plan:
    """What is measured: of full size on a GPU, or small enough for a CPU."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    precisions: tuple[str, ...]
    compiles: tuple[str, ...]
    size: int
    recipes: tuple[str, ...]
    train_overrides: tuple[str, ...]
    sample_overrides: tuple[str, ...]
    train_batch: int
    sample_batch: int
    sample_compiles: tuple[str, ...]
    seconds: float


SAMPLING = ("sample.solver=euler_maruyama", "sample.guidance={scale: 1.65, interval: [0.0, 0.7]}")
FULL = Plan(
    models=("DiC-XL", "SiT-XL/2"),
    batches=(1, 32, 128),
    precisions=("bf16", "tf32"),
    compiles=("default", "off"),
    size=32,
    recipes=("dic-xl-urepa", "sit-xl-2-repa"),
    train_overrides=(),
    sample_overrides=(*SAMPLING, "sample.steps=250"),
    train_batch=32,
    sample_batch=32,
    sample_compiles=("reduce-overhead", "off"),
    seconds=0.5,
)
SMALL = Plan(
    models=("DiC-S", "SiT-S/2"),
    batches=(1, 2),
    precisions=("bf16", "fp32"),
    compiles=("off",),
    size=16,
    recipes=("digits-urepa", "digits-sit-repa"),
    train_overrides=(),
    sample_overrides=(*SAMPLING, "sample.steps=4"),
    train_batch=8,
    sample_batch=8,
    sample_compiles=("off",),
    seconds=0.0,
)


def measure_paper(
    device: torch.device,
    small: bool,
    baseline: str,
    rounds: int = 7,
    plan: Plan | None = None,
    only: Collection[str] = PARTS,
) -> Iterator[tuple[str, dict]]:
    """Yields (name, result) of each part in `only`, as soon as it is measured: 'forward-PRECISION' for each precision,
    then 'train-PRECISION', then 'sample-PRECISION'; see the functions called.

    The plain `baseline` runs beside DiC. A UserError for an unknown part, and for the full size without a GPU.
    """
    for name in only:
        if name not in PARTS:
            raise unknown_name("part", name, PARTS)
    if device.type != "cuda" and not small:
        raise UserError("models of full size need a GPU; take --small, which runs on a CPU")
    plan = plan or (SMALL if small else FULL)
    # What takes turns is in memory all at once, with its optimizer and averages: all precisions would not fit in 80 GB.
    for part, kind in itertools.product([part for part in PARTS if part in only], plan.precisions):
        yield f"{part}-{kind}", _measure(part, plan, kind, device, baseline, rounds)
        free_memory(device)


def _measure(part: str, plan: Plan, kind: str, device: torch.device, baseline: str, rounds: int) -> dict:
    timing: dict[str, Any] = {"precisions": (kind,), "rounds": rounds, "seconds": plan.seconds}
    if part == "forward":
        beside = [f"{plan.models[0]}={baseline}"]
        shape: dict[str, Any] = {"batches": plan.batches, "size": plan.size, "compiles": plan.compiles}
        return bench_model(plan.models, device, baselines=beside, **shape, **timing)
    if part == "train":
        batches = [plan.train_batch]
        return bench_train(
            plan.recipes, device, plan.train_overrides, batches=batches, compiles=plan.compiles, **timing
        )
    return bench_sample(
        plan.recipes[:1],
        device,
        plan.sample_overrides,
        compiles=plan.sample_compiles,
        guidance=("doubled", "one-by-one"),
        batches=[plan.sample_batch],
        **timing | {"rounds": min(rounds, 3), "seconds": 0.0},
    )
