"""The processes that a launcher has started, joined: `torchrun`, `accelerate launch`, or none."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor

from dic_repa.errors import UserError, first_line

T = TypeVar("T")
BUCKET = 200  # MiB of gradients in one exchange: torch's 25 are less than a wide convolution has


def start_processes(patience: timedelta = timedelta(days=1), **options) -> Accelerator:
    """An Accelerator of all processes that were launched; `options` are the Accelerator's own.

    Args:
        patience: how long they wait for each other. NCCL's ten minutes are too few: one may be hours ahead.

    Raises:
        UserError: they cannot be joined. Each would do all of the work, and write the same files.
    """
    ddp = DistributedDataParallelKwargs(bucket_cap_mb=BUCKET, gradient_as_bucket_view=True)
    options["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=patience), ddp]
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(**options)
    if accelerator.num_processes < launched and accelerator.device.type in ("cpu", "mps"):
        # Without a GPU, Accelerate takes each process of torchrun for the only one unless it is asked to use the CPU.
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        accelerator = Accelerator(**options)
    if accelerator.num_processes < launched:
        raise UserError(
            f"{launched} processes were launched (WORLD_SIZE), but Accelerate joins {accelerator.num_processes}; "
            "set ACCELERATE_USE_CPU=true for CPUs, or launch them by torchrun or accelerate launch"
        )
    return accelerator


def gather_with_gradient(x: Tensor) -> Tensor:
    """The rows of all processes, (B, ...) to (processes * B, ...), in their order, with gradients.

    A loss of all rows that every process computes alike then gives the parameters, whose gradients are averaged over
    the processes, the gradient that one process with all rows would give.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return _Gathered.apply(x.contiguous())


class _Gathered(torch.autograd.Function):
    """torch's own, in `torch.distributed.nn`, is deprecated, and what replaces it is not in every release since 2.6."""

    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(every, x)
        return torch.cat(every)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


class Votes:
    """What the processes decide together on their CPUs, without waiting for their GPUs. All must ask the same.

    A UserError where the CPUs of several processes cannot talk to each other.
    """

    def __init__(self, accelerator: Accelerator, patience: timedelta = timedelta(hours=3)):
        self.alone = accelerator.num_processes == 1
        self.group: Any = None  # torch's own, which its types do not tell from an integer
        if not self.alone and dist.get_backend() != "gloo":
            try:
                self.group = dist.new_group(backend="gloo", timeout=patience)
                self.any(False)
            except RuntimeError as error:
                hint = "name the network between them in GLOO_SOCKET_IFNAME"
                raise UserError(
                    f"the processes' CPUs cannot talk to each other ({first_line(error)}); {hint}"
                ) from None

    def any(self, mine: bool) -> bool:
        """Whether some process says so."""
        if self.alone:
            return mine
        votes = torch.tensor([int(mine)])
        dist.all_reduce(votes, group=self.group)
        return bool(votes)

    def first(self, mine: BaseException | None) -> BaseException | None:
        """The exception of the first process that has one."""
        if not self.any(mine is not None):
            return None
        every: list[BaseException | None] = [mine]
        if not self.alone:
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, mine, group=self.group)
        return next(each for each in every if each is not None)


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, however they were started."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def in_all_processes(accelerator: Accelerator, action: Callable[[], T], main_only: bool = False) -> T:
    """Do `action` in every process and return each its own result.

    A UserError or OSError in one of them, such as for a file that it alone cannot read, is raised in all of them.

    Args:
        main_only: only the main process does it; the others wait, and get its result.
    """
    outcome: tuple = (None, None)
    if not main_only or accelerator.is_main_process:
        try:
            outcome = action(), None
        except (UserError, OSError) as error:
            outcome = None, error
    if accelerator.num_processes > 1:
        outcomes = gather_object([outcome if main_only else (None, outcome[1])])
        failures = [failure for _, failure in outcomes if failure is not None]
        outcome = outcomes[0] if main_only else (outcome[0], next(iter(failures), None))
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


@contextlib.contextmanager
def entered_by_main(accelerator: Accelerator, enter: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, the main process has entered the context that `enter` gives, such as a lock that holds for all of them.

    Where it cannot, its UserError or OSError is raised in all of them.
    """
    with contextlib.ExitStack() as stack:
        on_main_process(accelerator, lambda: stack.enter_context(enter()))
        yield


def on_main_process(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """`in_all_processes` by the main process alone."""
    return in_all_processes(accelerator, action, main_only=True)
