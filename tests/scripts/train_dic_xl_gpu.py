"""DiC-XL with U-REPA on a GPU: speed, memory, where a step's time goes, finite losses, and the compiled gradients.

    python tests/scripts/train_dic_xl_gpu.py

Trains on random data in memory with a DINOv2-B of random weights, at each batch size, eager and compiled by block, with
and without Triton's kernels, 100 steps each; then compares the gradients of each of these ways with the plain ones, in
float32 and in bf16 (torch.compile has had a GroupNorm on channels_last whose bf16 gradients were wrong in silence).
Exits with 1 where a loss is not finite or gradients differ. On a CPU, at a size that it can bear:

    python tests/scripts/train_dic_xl_gpu.py --recipe digits-urepa --batches 4 --steps 3 --set model.width=8
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time

import torch
from torch import Tensor

from dic_repa.bench.device import describe_device, free_memory
from dic_repa.bench.timing import case_label
from dic_repa.bench.train import COMPILE, Clock, TrainCase, build_step, prepare_recipe
from dic_repa.models.compiled import allow_recompilation
from dic_repa.models.kernel_choice import KERNELS

Way = tuple[str, str]  # a mode of torch.compile, and `model.kernels`
PLAIN: Way = ("off", "off")
WARM_UP = 5  # steps before the clock runs: compilation, choice of kernels


def build_case(name: str, overrides: list[str], precision: str, batch: int, way: Way, device) -> TrainCase:
    """A training step of the recipe on random data, its encoder with random weights where those are fetched."""
    recipe = prepare_recipe(name, overrides, precision, batch, [])
    mode, kernels = way
    recipe.train.compile, recipe.model.kernels = COMPILE[mode], kernels
    return TrainCase(f"{case_label('', '', mode)}, kernels {kernels}", recipe, *build_step(recipe, device))


def measure(case: TrainCase, steps: int, device: torch.device) -> dict:
    """Images per second and memory peak over the steps, shares of a step's phases over a few more, all losses' end."""
    on_gpu = device.type == "cuda"
    for _ in range(WARM_UP if on_gpu else 1):
        case()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin, losses = time.perf_counter(), []
    for _ in range(steps):
        losses.append(case().detach())
    if on_gpu:
        torch.cuda.synchronize()
    seconds, losses = time.perf_counter() - begin, torch.stack(losses)
    clock = Clock(device)
    for _ in range(min(steps, 10)):
        case(clock)
    return {
        "case": case.label,
        "batch": case.batch,
        "images_per_second": round(steps * case.batch / seconds, 2),
        "memory_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "shares": {name: round(share, 4) for name, share in clock.shares().items()},
        "losses_finite": bool(losses.isfinite().all()),
        "first_and_last_loss": [round(losses[0].item(), 4), round(losses[-1].item(), 4)],
    }


def gradients(case: TrainCase) -> dict[str, Tensor]:
    """The gradients of one step, in float32, from weights without the zeros that would hide most of them."""
    parts = case.parts
    model = case.accelerator.unwrap_model(parts.model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(noise.to(parameter.device))
    case.recipe.train.gradient_clip = None  # the gradients as they are
    case.step.gradients(case.data, 0)
    return {name: p.grad.float().cpu() for name, p in model.named_parameters()}


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference (norm of the difference to norm) of a parameter's gradient, and whose it is."""
    differences = {
        name: ((found[name] - g).norm() / g.norm().clamp_min(1e-12)).item() for name, g in expected.items() if g.any()
    }
    name = max(differences, key=differences.get)
    return differences[name], name


def compare_gradients(name: str, overrides: list[str], batch: int, ways: list[Way], device: torch.device) -> list[dict]:
    """Each way in float32 and in bf16 against plain float32; in bf16 no worse than twice the plain error."""
    found, labels = {}, {}
    for precision in ("fp32", "bf16"):
        for way in dict.fromkeys((PLAIN, *ways)):
            case = build_case(name, overrides, precision, batch, way, device)
            found[precision, way], label = gradients(case), case.label
            labels[precision, way] = f"{precision} {label}"
            del case
            free_memory(device)
    reference, rows = found.pop(("fp32", PLAIN)), []
    limits = {"fp32": 1e-3, "bf16": 2 * worst_difference(found["bf16", PLAIN], reference)[0]}
    for key, each in found.items():
        error, where = worst_difference(each, reference)
        good = error <= limits[key[0]]
        rows.append({"gradients": f"{labels[key]} against plain fp32", "worst": error, "of": where, "good": good})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="dic-xl-urepa")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--gradient-batch", type=int, default=4)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--compile", nargs="+", choices=COMPILE, default=["off", "blocks"])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["off", "auto"])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", help="Write the results into this file as well.")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways = [*itertools.product(arguments.compile, arguments.kernels)]
    allow_recompilation()
    results: dict = {"environment": describe_device(device), "steps": [], "gradients": []}
    print(json.dumps(results["environment"]))
    for batch in arguments.batches:
        for way in ways:
            case = build_case(arguments.recipe, arguments.overrides, arguments.precision, batch, way, device)
            results["steps"].append(measure(case, arguments.steps, device))
            print(json.dumps(results["steps"][-1]), flush=True)
            del case
            free_memory(device)
    given = arguments.recipe, arguments.overrides, arguments.gradient_batch, ways
    results["gradients"] = compare_gradients(*given, device)
    for row in results["gradients"]:
        print(json.dumps(row))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=2)
    good = all(row["losses_finite"] for row in results["steps"])
    return 0 if good and all(row["good"] for row in results["gradients"]) else 1


if __name__ == "__main__":
    sys.exit(main())
