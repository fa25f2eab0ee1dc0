"""Averages of a denoiser's weights over the steps; one of them is what one samples from.

`EMA` forgets at a constant rate, after a warm-up in which it forgets faster: without, it would be mostly the initial
weights for the first 1 / (1 - decay) steps. `PowerEMA` (Karras et al., arXiv 2312.02696) weighs step tau of t by
tau^gamma, so its width is a share of the training so far, `sigma_rel`; from stored snapshots of two of them any other
width can be made after the run (`posthoc.py`).
"""

import contextlib
import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from dic_repa.errors import UserError
from dic_repa.models.adapters import plain_parameters
from dic_repa.models.pretrained import Pretrained

WIDEST = 0.2886  # sigma_rel of gamma 0, the mean of all steps; below that, gamma rises


class EMA:
    """`average <- decay * average + (1 - decay) * weights` after each step, in float32.

    With `warmup` the decay after n steps is at most (1 + n) / (10 + n), so that the average is a tenth of the steps
    behind the weights until it reaches `decay`.

    Made before the denoiser is wrapped or hooked, or gets adapters: `model` is a plain copy of it in eval mode, ready
    to sample from. Of adapters, it is the average of the merged weights.

    A skipped step counts as one that changed no weight, so that the average's profile depends on the step alone, as
    averages made after the run take for granted.
    """

    def __init__(self, denoiser: Pretrained, decay: float = 0.9999, warmup: bool = False):
        self.decay, self.warmup = decay, warmup
        # What goes into config.json, taken now: sharding renames the class.
        self.config = {"model": type(denoiser).__name__, **getattr(denoiser, "config", {})}
        self.model = copy.deepcopy(denoiser).float().eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """The decay of the update after `step` steps, counted from 1."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    def lag(self, step: int) -> float:
        """How many steps the average is behind the weights after `step` of them, if these move by the same in each."""
        behind = 0.0
        for n in range(1, step + 1):
            behind = self.decay_at(n) * (behind + 1)
        return behind

    @torch.no_grad()
    def update(self, denoiser: nn.Module, step: int = 1) -> None:
        """Move the average towards the denoiser's weights after `step` steps; buffers are copied."""
        weights = _local(plain_parameters(denoiser))
        torch._foreach_lerp_(_local(self.model.parameters()), weights, 1 - self.decay_at(step))
        for average, buffer in zip(self.model.buffers(), denoiser.buffers()):
            average.copy_(buffer)

    @contextlib.contextmanager
    def raw(self, denoiser: nn.Module) -> Iterator[None]:
        """While entered, `model` has the denoiser's own weights in place of their average."""
        with torch.no_grad():
            mine, theirs = ([*_local(plain_parameters(m)), *m.buffers()] for m in (self.model, denoiser))
        kept = [tensor.clone() for tensor in mine]
        try:
            with torch.no_grad():
                torch._foreach_copy_(mine, theirs)
            yield
        finally:
            torch._foreach_copy_(mine, kept)


class PowerEMA(EMA):
    """`decay = (1 - 1/t)^(gamma + 1)` after t steps, with the gamma of `sigma_rel`."""

    def __init__(self, denoiser: Pretrained, sigma_rel: float):
        super().__init__(denoiser)
        self.sigma_rel, self.gamma = sigma_rel, sigma_rel_to_gamma(sigma_rel)

    def decay_at(self, step: int) -> float:
        return (1 - 1 / step) ** (self.gamma + 1)


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The gamma >= 0 with `sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))`.

    The largest real root of a cubic in gamma; a UserError if `sigma_rel` has none.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise UserError(f"sigma_rel lies above 0 and at most at {WIDEST} (the mean of all steps), not at {sigma_rel}")
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def _local(parameters) -> list[torch.Tensor]:
    # For a sharded parameter, this process's shard: both models are cut in the same way, so no exchange is needed.
    return [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
