"""The training loop's overhead by torch's profiler: what of a step is neither forward, backward nor the optimizer.

    python tests/scripts/measure_overhead.py

Trains a DiC of more than 10 million parameters on the CPU, and prints the share of each part of the step. The overhead
is all the rest: reading the data, drawing noise and times, the losses' bookkeeping, clipping, the averaged weights, the
decision whether the step counts, logging. Clipping and averaging, which are arithmetic on all parameters rather than
the loop's own doing, are also shown apart.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile, record_function

from dic_repa.alignment import AlignedDenoiser
from dic_repa.recipe import load_recipe
from dic_repa.training import EMA, step, train
from dic_repa.training.log import MetricLog

WARM_UP = 2  # steps that are not counted


def named(function, name: str):
    """`function` under a name that the profiler shows."""

    def wrapped(*arguments, **options):
        with record_function(name):
            return function(*arguments, **options)

    return wrapped


def main(steps: int, width: int, batch_size: int) -> dict[str, float]:
    """Milliseconds per step of each part."""
    owners = {
        "forward": (AlignedDenoiser, "forward"),
        "backward": (Accelerator, "backward"),
        "optimizer": (torch.optim.AdamW, "step"),
        "clipping": (step, "clip_gradients"),
        "averaging": (EMA, "update"),
    }
    for name, (owner, attribute) in owners.items():
        setattr(owner, attribute, named(getattr(owner, attribute), name))

    profiler = profile(activities=[ProfilerActivity.CPU])
    end_step, times = MetricLog.step, []

    def end_and_mark(self, step, *rest, **options):
        end_step(self, step, *rest, **options)
        if step == WARM_UP:
            profiler.start()
            times.append(torch.autograd.profiler.record_function("steps"))
            times[0].__enter__()
        elif step == WARM_UP + steps:
            times[0].__exit__(None, None, None)
            profiler.stop()

    MetricLog.step = end_and_mark
    overrides = [f"model.width={width}", f"train.batch_size={batch_size}", f"train.steps={WARM_UP + steps}",
                 "train.sample_every=0", "train.checkpoint_every=100000", "evaluate=null"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = train(load_recipe("digits-baseline", overrides), Path(folder) / "run")
        weights = load_file(run.newest_checkpoint() / "model.safetensors")
        count = sum(tensor.numel() for tensor in weights.values())
    print(f"{count / 1e6:.1f} M parameters, batch {batch_size}, {steps} steps, {torch.get_num_threads()} threads")
    events = {event.key: event.cpu_time_total / 1000 / steps for event in profiler.key_averages()}
    return {name: events.get(name, 0.0) for name in ["steps", *owners]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    found = main(arguments.steps, arguments.width, arguments.batch_size)
    whole = found.pop("steps")
    for name, milliseconds in found.items():
        print(f"{name:10} {milliseconds:9.2f} ms {milliseconds / whole:7.2%}")
    core = sum(found[name] for name in ("forward", "backward", "optimizer"))
    print(f"{'step':10} {whole:9.2f} ms")
    print(f"{'overhead':10} {whole - core:9.2f} ms {1 - core / whole:7.2%}   of which clipping and averaging: "
          f"{(found['clipping'] + found['averaging']) / whole:.2%}")  # fmt: skip
