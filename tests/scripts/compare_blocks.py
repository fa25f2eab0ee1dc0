"""Compiling by block against the whole graph and eager: seconds of the first call, and of those after it, in one run.

    python tests/scripts/compare_blocks.py

A training step of digits-urepa at batch 64, and the forward and backward pass of DiC-S's width and depth at 16x16,
batch 8. The first call compiles, without the cache of earlier runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import torch

from dic_repa.bench.model import random_inputs
from dic_repa.bench.train import COMPILE, TrainCase, build_step, prepare_recipe
from dic_repa.models import create_denoiser
from dic_repa.models.compiled import allow_recompilation, compile_blocks

CPU = torch.device("cpu")


def training_step(mode: str) -> TrainCase:
    recipe = prepare_recipe("digits-urepa", (), "fp32", 64, [])
    recipe.train.compile = COMPILE[mode]
    return TrainCase(mode, recipe, *build_step(recipe, CPU))


def forward_and_backward(mode: str):
    torch.manual_seed(0)
    model = create_denoiser("DiC-S")
    inputs = random_inputs(model, 8, 16, CPU)
    if mode == "blocks":
        compile_blocks(model)
    elif mode == "default":
        model.compile(dynamic=False)
    return lambda: model(*inputs).square().mean().backward()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    cases = {"step": training_step, "forward-backward": forward_and_backward}
    parser.add_argument("--only", choices=cases, help="one of the two cases")
    given = parser.parse_args()
    allow_recompilation()
    for name, what in cases.items():
        if given.only not in (None, name):
            continue
        calls, first = {mode: what(mode) for mode in ("off", "default", "blocks")}, {}
        times: dict[str, list[float]] = {mode: [] for mode in calls}
        for mode, call in calls.items():
            begin = time.perf_counter()
            call()
            first[mode] = time.perf_counter() - begin
            call()
        for _ in range(given.rounds):  # in turns
            for mode, call in calls.items():
                begin = time.perf_counter()
                call()
                times[mode].append(time.perf_counter() - begin)
        for mode, taken in times.items():
            median = statistics.median(taken)
            ratio = statistics.median(times["off"]) / median
            print(f"{name} {mode}: first {first[mode]:.1f} s, then {median:.3f} s, {ratio:.2f} x eager")
