"""`dic-repa bench paper`: the measurements that compare with the papers' speed, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dic_repa.bench.device import free_memory
from dic_repa.bench.model import bench_model
from dic_repa.bench.sample import bench_sample
from dic_repa.bench.train import bench_train
from dic_repa.errors import UserError


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
    device: torch.device, small: bool, baseline: str, rounds: int = 7, plan: Plan | None = None
) -> Iterator[tuple[str, dict]]:
    """Yields (name, result) for 'forward', 'training-step-PRECISION' of each precision and 'sampling'; see the
    functions called.

    The plain `baseline` runs beside DiC. A UserError for the full size without a GPU.
    """
    if device.type != "cuda" and not small:
        raise UserError("models of full size need a GPU; take --small, which runs on a CPU")
    plan = plan or (SMALL if small else FULL)
    yield (
        "forward",
        bench_model(
            plan.models,
            device,
            precisions=plan.precisions,
            compiles=plan.compiles,
            batches=plan.batches,
            size=plan.size,
            baselines=[f"{plan.models[0]}={baseline}"],
            rounds=rounds,
            seconds=plan.seconds,
        ),
    )
    # What takes turns is in memory all at once, with its optimizer and averages: all precisions would not fit in 80 GB.
    for kind in plan.precisions:
        free_memory(device)
        yield (
            f"training-step-{kind}",
            bench_train(
                plan.recipes,
                device,
                plan.train_overrides,
                precisions=(kind,),
                compiles=plan.compiles,
                batches=[plan.train_batch],
                rounds=rounds,
                seconds=plan.seconds,
            ),
        )
    free_memory(device)
    yield (
        "sampling",
        bench_sample(
            plan.recipes[:1],
            device,
            plan.sample_overrides,
            precisions=plan.precisions,
            compiles=plan.sample_compiles,
            guidance=("doubled", "one-by-one"),
            batches=[plan.sample_batch],
            rounds=min(rounds, 3),
            seconds=0.0,
        ),
    )
