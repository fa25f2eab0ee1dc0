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
    """What is measured: for each part the arguments of `bench_model`, `bench_train` or `bench_sample`."""

    precisions: tuple[str, ...]
    forward: dict[str, Any]
    train: dict[str, Any]
    sample: dict[str, Any]


SAMPLING = ("sample.solver=euler_maruyama", "sample.guidance={scale: 1.65, interval: [0.0, 0.7]}")
FULL = Plan(
    ("bf16", "tf32"),
    {"names": ("DiC-XL", "SiT-XL/2"), "batches": (1, 32, 128), "compiles": ("default", "off"), "seconds": 0.5},
    {"recipes": ("dic-xl-urepa", "sit-xl-2-repa"), "batches": (32,), "compiles": ("default", "off"), "seconds": 0.5},
    {
        "recipes": ("dic-xl-urepa",),
        "overrides": (*SAMPLING, "sample.steps=250"),
        "batches": (32,),
        "compiles": ("reduce-overhead", "off"),
    },
)
SMALL = Plan(
    ("bf16", "fp32"),
    {"names": ("DiC-S", "SiT-S/2"), "batches": (1, 2), "size": 16, "seconds": 0.0},
    {"recipes": ("digits-urepa", "digits-sit-repa"), "batches": (8,), "seconds": 0.0},
    {"recipes": ("digits-urepa",), "overrides": (*SAMPLING, "sample.steps=4"), "batches": (8,)},
)


def measure_paper(
    device: torch.device,
    small: bool,
    baseline: str,
    rounds: int = 7,
    plan: Plan | None = None,
    only: Collection[str] = PARTS,
) -> Iterator[tuple[str, dict]]:
    """Measure each part in `only` in each precision, with the plain `baseline` beside DiC.

    Yields:
        'forward-PRECISION', 'train-PRECISION' or 'sample-PRECISION' and its result, as soon as it is measured.

    Raises:
        UserError: A part is unknown, or the full size is asked for without a GPU.
    """
    for name in only:
        if name not in PARTS:
            raise unknown_name("part", name, PARTS)
    if device.type != "cuda" and not small:
        raise UserError("models of full size need a GPU; take --small, which runs on a CPU")
    plan = plan or (SMALL if small else FULL)
    # What takes turns is in memory all at once, with its optimizer and averages: all precisions would not fit in 80 GB.
    for part, kind in itertools.product([part for part in PARTS if part in only], plan.precisions):
        options: dict[str, Any] = {"device": device, "precisions": (kind,), "rounds": rounds}
        if part == "forward":
            result = bench_model(baselines=[f"{plan.forward['names'][0]}={baseline}"], **options | plan.forward)
        elif part == "train":
            result = bench_train(**options | plan.train)
        else:
            options |= {"rounds": min(rounds, 3), "seconds": 0.0, "guidance": ("doubled", "one-by-one")}
            result = bench_sample(**options | plan.sample)
        yield f"{part}-{kind}", result
        free_memory(device)
