"""`dic-repa bench paper`: the measurements that compare with the papers' speed, one after the other."""

import itertools
from collections.abc import Collection, Iterator
from typing import Any

import torch

from dic_repa.bench.device import free_memory
from dic_repa.bench.model import bench_model
from dic_repa.bench.sample import bench_sample
from dic_repa.bench.timing import Settings
from dic_repa.bench.train import bench_train

_GUIDED = ("sample.solver=euler_maruyama", "sample.guidance={scale: 1.65, interval: [0.0, 0.7]}")
# For each part: the denoisers or recipes, keys of their `Settings`, and options of `bench_model` and so on.
Plan = dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]]
FULL: Plan = {
    "forward": (
        ("DiC-XL", "SiT-XL/2"),
        {"batches": (1, 32, 128), "compiles": ("default", "off"), "seconds": 0.5},
        {},
    ),
    "train": (
        ("dic-xl-urepa", "sit-xl-2-repa"),
        {"batches": (32,), "compiles": ("default", "off"), "seconds": 0.5},
        {},
    ),
    "sample": (
        ("dic-xl-urepa",),
        {"batches": (32,), "compiles": ("reduce-overhead", "off")},
        {"overrides": (*_GUIDED, "sample.steps=250")},
    ),
}
SMALL: Plan = {
    "forward": (("DiC-S", "SiT-S/2"), {"batches": (1, 2), "seconds": 0.0}, {"size": 16}),
    "train": (("digits-urepa", "digits-sit-repa"), {"batches": (8,), "seconds": 0.0}, {}),
    "sample": (("digits-urepa",), {"batches": (8,)}, {"overrides": (*_GUIDED, "sample.steps=4")}),
}


def measure_paper(
    device: torch.device, plan: Plan, precisions: Collection[str], baseline: str, rounds: int = 7
) -> Iterator[tuple[str, dict]]:
    """Measure each part of the `plan` in each precision, with the plain `baseline` beside DiC; yields PART-PRECISION
    and its result, as soon as it is measured."""
    # What takes turns is in memory all at once, with its optimizer and averages: all precisions would not fit in 80 GB.
    for (part, (names, keys, options)), kind in itertools.product(plan.items(), precisions):
        settings = Settings(device, (kind,), rounds=rounds, **keys)
        if part == "forward":
            settings.baselines = [f"{names[0]}={baseline}"]
            result = bench_model(names, settings, **options)
        elif part == "train":
            result = bench_train(names, settings, **options)
        else:
            settings.rounds, settings.seconds = min(rounds, 3), 0.0
            result = bench_sample(names, settings, guidance=("doubled", "one-by-one"), **options)
        yield f"{part}-{kind}", result
        free_memory(device)
