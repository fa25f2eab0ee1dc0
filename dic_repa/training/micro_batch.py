"""Which `train.micro_batch` a GPU has memory for, found by running passes of a few sizes.

What a step takes grows with the rows of a pass along a line: weights, optimizer and averages, and so much for each row.
Two small passes give the line, and the largest size that it promises is run before it is named.
"""

import gc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dic_repa.errors import full_memory
from dic_repa.recipe import TrainSection
from dic_repa.training.step import TrainingStep

FEW = 8  # rows of a pass, at most, from which more are foretold
USED = 0.9  # of the GPU's memory: samples and scores in training, and what the allocator cannot use, need the rest


def largest_fitting(share: int, memory: float, measure: Callable[[int], float]) -> tuple[int, float] | None:
    """The largest divisor of `share` whose passes use at most `USED` of the memory, and what they take; None if not
    even one row does.

    Args:
        share: rows of a step in this process.
        memory: of the GPU, in bytes.
        measure: from the rows of a pass to the bytes of a step. It may raise what torch raises when memory is full.
    """
    sizes = [rows for rows in range(1, share + 1) if share % rows == 0]
    few = [rows for rows in sizes if rows <= FEW][-2:]
    taken = {rows: _tried(measure, rows) for rows in few}
    low, high = few[0], few[-1]
    each = (taken[high] - taken[low]) / max(1, high - low) if taken[high] < math.inf else math.inf
    for rows in reversed(sizes):
        if rows > high and taken[high] + each * (rows - high) > memory:
            continue  # it is not even tried
        if rows not in taken:
            taken[rows] = _tried(measure, rows)
        if taken[rows] <= USED * memory:
            return rows, taken[rows]
    return None


def _tried(measure: Callable[[int], float], rows: int) -> float:
    try:
        return measure(rows)
    except RuntimeError as error:
        if not full_memory(error):
            raise
        return math.inf


def find_micro_batch(step: TrainingStep, batch: dict[str, Tensor], elsewhere: int = 0) -> dict[str, Any]:
    """The `largest_fitting` passes for the run of `step`: their `rows`, or None if none fits, what they take (`peak`)
    and what the GPU has (`total`), in bytes.

    Args:
        batch: this process's rows of a step.
        elsewhere: bytes that the run needs beside what is measured here.
    """
    share = step.settings.batch_size // step.accelerator.num_processes
    total = torch.cuda.mem_get_info(step.accelerator.device)[1]
    found = largest_fitting(share, total, lambda rows: step_bytes(step, batch, rows) + elsewhere)
    rows, peak = found or (None, None)
    return {"rows": rows, "peak": peak, "total": total}


def advice(found: dict[str, Any], own: int, checkpointing: bool) -> str:
    """What `find_micro_batch` has found, in words, for a recipe with passes of `own` rows."""
    rows, gib = found["rows"], 2**30
    if rows is None and checkpointing:
        return "not even 1 fits; take a larger GPU, or train.sharding=fsdp2 on several"
    if rows is None:
        return "not even 1 fits: --set train.gradient_checkpointing=true"
    fits = f"{rows} fits ({found['peak'] / gib:.1f} of {found['total'] / gib:.1f} GiB)"
    return f"{fits}; the recipe has {own}" + (f": --set train.micro_batch={rows}" if rows != own else ", too")


def step_bytes(step: TrainingStep, batch: dict[str, Tensor], rows: int) -> int:
    """What the allocator holds at most in a step with passes of `rows`: in a second one, since the first chooses
    algorithms, compiles, and makes the optimizer's state.

    Two passes take what more of them do: in the second, the first one's gradients are there.
    """
    device, size = step.accelerator.device, min(2 * rows, step.settings.batch_size)
    settings: TrainSection = step.settings.model_copy(update={"batch_size": size, "micro_batch": rows})
    trial = TrainingStep(step.parts, settings, step.accelerator)
    some = {name: tensor[:size] for name, tensor in batch.items()}
    step.parts.optimizer.zero_grad()  # what a step has left that did not fit
    gc.collect()
    for number in range(2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        trial(some, number)
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device)
