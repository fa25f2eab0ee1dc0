"""What all processes must decide alike after each step, without waiting for the device: whether the step counts, and
whether to stop.

A step whose loss or gradient is not finite is skipped by the optimizer itself, on the device, by the flag that gradient
scalers use. The host reads the counters `LAG` steps later, when they have long been there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from dic_repa.training.optimizers import skips_on_device

LAG = 2


@dataclass(frozen=True)
class Verdict:
    """What was known at the end of step `step` (counted from 1), in every process the same."""

    step: int
    stop: bool = False  # a process was told to
    in_a_row: int = 0  # skipped steps up to and with this one
    skipped: int = 0  # skipped steps since the run or its resumption began


class StepGuard:
    """`judge` each step's loss and gradient norm before the optimizer's step; `verdict` tells of an earlier one.

    `optimizer` is torch's own. One that takes the flag `found_inf` skips the step on the device; the others lose their
    gradients, for which the host waits for the device in each step. With fp16 the gradient scaler skips, as part of
    finding the scale; that is only counted here.
    """

    def __init__(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer):
        self.accelerator, self.optimizer = accelerator, optimizer
        device = accelerator.device
        self.counts = torch.zeros(2, device=device)  # in a row, in all
        self.flags = {flag: torch.tensor(float(flag), device=device) for flag in (False, True)}
        self.bad = self.flags[False]
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.last = Verdict(0)

    def add(self, loss: Tensor) -> None:
        """Count in the loss of one pass."""
        self.bad = self.bad + (~loss.detach().isfinite()).float()

    def judge(self, step: int, norm: Tensor, stop: bool) -> None:
        """Skip the optimizer's coming step if a loss since the last call, in any process, or `norm` is not finite."""
        shared = torch.stack([self.bad, self.flags[stop]])
        if self.accelerator.num_processes > 1:
            shared = self.accelerator.reduce(shared, "sum")
        skip = ((shared[0] > 0) | ~norm.isfinite()).float()
        if self.accelerator.scaler is None and skips_on_device(self.optimizer):
            self.optimizer.found_inf = skip  # type: ignore[attr-defined]  # what torch's gradient scaler sets, too
        elif self.accelerator.scaler is None and skip:
            self.optimizer.zero_grad(set_to_none=True)
        in_a_row, skipped = self.counts.unbind()
        self.counts = torch.stack([(in_a_row + 1) * skip, skipped + skip])
        self.bad = self.flags[False]
        told = torch.cat([shared[1:], self.counts])
        event = None
        if told.is_cuda:
            told = told.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, told, event))

    def verdict(self) -> Verdict:
        """The newest verdict that is at least `LAG` steps old; on the CPU, where nothing is waited for, the newest."""
        while len(self.pending) > (LAG if self.accelerator.device.type == "cuda" else 0):
            step, told, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            stop, in_a_row, skipped = told.tolist()
            self.last = Verdict(step, stop > 0, round(in_a_row), round(skipped))
        return self.last
