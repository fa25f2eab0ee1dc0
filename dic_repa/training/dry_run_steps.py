"""The steps of the dry run: seconds, memory, power, and the passes that a GPU has room for."""

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import default_collate

from dic_repa.errors import UserError, first_line, full_memory
from dic_repa.recipe import Recipe, TrainSection
from dic_repa.runtime.progress import progress_bar
from dic_repa.training.log import device_name
from dic_repa.training.micro_batch import advice, find_micro_batch
from dic_repa.training.parts import build_parts
from dic_repa.training.step import TrainingStep
from dic_repa.training.trainable import trained_parameters

STEPS = 3


def measure(
    trial: Recipe, accelerator: Accelerator, settings: TrainSection, processes: int, search: bool
) -> dict[str, Any]:
    """What `STEPS` steps of `trial` take, as a part of the report; `settings` are the whole run's.

    Args:
        search: look for the best `train.micro_batch`, too, for which it takes a GPU.

    Raises:
        UserError: the steps do not fit into the GPU's memory; it says which passes do.
    """
    device, on_gpu = accelerator.device, accelerator.device.type == "cuda"
    share = trial.train.batch_size // accelerator.num_processes
    own = min(settings.micro_batch or share, share)
    measured: dict[str, Any] = {}
    step, fault = None, ""
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        parts = build_parts(trial, accelerator)
        batch = {k: v.to(device) for k, v in default_collate([parts.data[i] for i in range(share)]).items()}
        step = TrainingStep(parts, trial.train, accelerator)
        measured |= run_steps(step, batch, settings, processes)
        if on_gpu:
            peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]
            measured["memory"] = {"peak": peak, "total": total, "headroom": total - peak}
    except RuntimeError as error:
        if not full_memory(error):
            raise
        fault = first_line(error)  # the error itself would keep alive what has filled the memory
    hint = f"lower train.micro_batch (now {own}) or set train.gradient_checkpointing=true"
    if search and step:
        # Of several processes, each has buffers in which gradients are exchanged.
        buffers = sum(p.nbytes for p in trained_parameters(parts.model)) if processes > 1 else 0
        found = find_micro_batch(step, batch, buffers)
        measured["micro_batch"] = {
            "recipe": own,
            **found,
            "advice": advice(found, own, settings.gradient_checkpointing),
        }
        hint = f"micro_batch: {measured['micro_batch']['advice']}"
    if fault:
        raise UserError(f"the step does not fit into the memory of {device_name(device)} ({fault}); {hint}")
    return measured


def run_steps(step: TrainingStep, batch: dict[str, Tensor], settings: TrainSection, processes: int) -> dict[str, Any]:
    """Seconds and power of `STEPS` steps, and of the whole run of `settings`."""
    device, seconds = step.accelerator.device, []
    with sampled_power(device) as watts:
        for number in progress_bar(range(STEPS), desc="first steps", unit="step", leave=False):
            begin = time.perf_counter()
            loss = step(batch, number)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
            if number == 0:
                watts.clear()  # it compiles, chooses algorithms and warms up
    if not torch.isfinite(loss):
        raise UserError(f"the loss of the random batch is {loss.item()}; try train.precision=no")
    step_seconds = statistics.median(seconds[1:])
    left, power = settings.steps * step_seconds, statistics.mean(watts) if watts else None
    return {
        "first_step_seconds": seconds[0],
        "steps_per_second": 1 / step_seconds,
        "images_per_second": settings.batch_size / step_seconds,
        "hours_to_the_end": left / 3600,
        "watts": power,
        "kwh_to_the_end": power and power * left * processes / 3.6e6,
    }


@contextlib.contextmanager
def sampled_power(device: torch.device, interval: float = 0.1) -> Iterator[list[float]]:
    """While entered, a thread adds a GPU's power in watts to the list, which stays empty where it is not known."""
    watts: list[float] = []
    done = threading.Event()

    def sample() -> None:
        while device.type == "cuda" and not done.wait(interval):
            try:
                watts.append(torch.cuda.power_draw(device) / 1000)
            except Exception:  # the driver's own: it does not report power, such as in some containers
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield watts
    finally:
        done.set()
        thread.join()
