"""The processes that a launcher has started, joined: `torchrun`, `accelerate launch`, or none."""

from __future__ import annotations

import os
from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState

from dic_repa.errors import UserError


def start_processes(patience: timedelta, **options) -> Accelerator:
    """An Accelerator of all processes that were launched, which wait up to `patience` for each other; `options` are the
    Accelerator's own.

    Without a GPU Accelerate takes each process of torchrun for the only one, unless its use of the CPU is asked for. A
    UserError where they cannot be joined: each would do all of the work, and write the same files.
    """
    options["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=patience)]
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(**options)
    if accelerator.num_processes < launched and accelerator.device.type in ("cpu", "mps"):
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        accelerator = Accelerator(**options)
    if accelerator.num_processes < launched:
        raise UserError(
            f"{launched} processes were launched (WORLD_SIZE), but Accelerate joins {accelerator.num_processes}; "
            "set ACCELERATE_USE_CPU=true for CPUs, or launch them by torchrun or accelerate launch"
        )
    return accelerator
