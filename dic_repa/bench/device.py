"""The device, its clocks and its memory."""

import contextlib
import gc
import itertools
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dic_repa.errors import UserError, first_line
from dic_repa.runs.environment import package_version


def find_device(name: str | None = None) -> torch.device:
    """The device of that name, by default the GPU if there is one; a UserError if there is no such device."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"there is no device '{name}' to measure; take cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no {device}: this machine has {torch.cuda.device_count()} CUDA devices; take cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # its streams are those that events are recorded on
    return device


def describe_device(device: torch.device) -> dict[str, str | int]:
    """The device and its clocks now, versions and threads, which speed depends on."""
    linux = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", linux.read_text()) if linux.is_file() else None
    found: dict[str, str | int] = {
        "device": cpu[1] if cpu else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found |= {"cuda": torch.version.cuda or "none", "cudnn": torch.backends.cudnn.version() or 0}
        found["triton"] = package_version("triton") or "none"
        found |= read_clocks(device)
    return found


def read_clocks(device: torch.device) -> dict[str, str]:
    """The clock, power and temperature of a GPU now, with their units; or why they cannot be read."""
    try:
        return {
            "clocks.sm": f"{torch.cuda.clock_rate(device)} MHz",
            "power.draw": f"{torch.cuda.power_draw(device) / 1000:.2f} W",
            "temperature.gpu": f"{torch.cuda.temperature(device)}",
        }
    except Exception as error:  # the driver's own; nothing depends on it
        return {"clocks": f"unknown ({first_line(error)})"}


def free_memory(device: torch.device) -> None:
    """Free models that are no longer used: compiled code and their own hooks hold on to them."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def look_inside(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The most `memory_mb` that a call allocates at once, and its share of `time_in_convolutions`, backward too.

    Not for CUDA graphs: their memory is reserved before, and their kernels belong to no operation.
    """
    gpu, before = device.type == "cuda", 0
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with quiet(), profile(activities=activities, profile_memory=not gpu) as recorded:
        call()
    averages = recorded.key_averages()
    if gpu:  # an operation has the time of the kernels that it launched, which are entries too
        most = torch.cuda.max_memory_allocated(device) - before
        # Annotated regions, as a compiled call and the optimizer's step are, span kernels that are counted already.
        on_device = [event for event in averages if event.device_type == DeviceType.CUDA]
        kernels = [event for event in on_device if not getattr(event, "is_user_annotation", False)]
        total = sum(event.self_device_time_total for event in kernels)
        within = [event for event in averages if event.key in ("aten::convolution", "aten::convolution_backward")]
        spent = sum(event.device_time_total for event in within)
    else:
        changes = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        most = max(itertools.accumulate(changes), default=0)
        total = sum(event.self_cpu_time_total for event in averages)
        spent = sum(event.self_cpu_time_total for event in averages if "conv" in event.key)
    return {"memory_mb": most / 1e6, "time_in_convolutions": spent / max(total, 1e-9)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on standard error: torch's profiler writes its own log there, from C++, and takes no level for it."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
