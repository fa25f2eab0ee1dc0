"""How much an alignment counts: over the time of an image (`time_weights`) and over the steps of a run (`schedules`).

`dic_repa.protocols` says how both are called. `observe(similarity)` gets the mean over all processes. A schedule keeps
its memory in buffers, which checkpoints hold, so that a resumed run continues unchanged.
"""

import math

import torch
from torch import Tensor, nn

from dic_repa.errors import UserError
from dic_repa.registry import Registry

time_weights = Registry("time weight", key="alignments.0.time_weight")
schedules = Registry("alignment schedule", key="alignments.0.schedule")


@time_weights.register("constant")
class ConstantTimeWeight:
    """`lambda(t) = 1`."""

    def __call__(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@time_weights.register("v-shape")
class VShape:
    """U-REPA's `lambda(t) = min(1, max(1.5 - 2t, 2t - 0.5))`: 1 near the data and near the noise, 0.5 in the middle.

    FID 5.58 in the paper (of SiT↓), against 5.72 with a constant weight.
    """

    def __call__(self, t: Tensor) -> Tensor:
        return torch.maximum(1.5 - 2 * t, 2 * t - 0.5).clamp(max=1)


@schedules.register("constant")
class Constant:
    """1 at every step."""

    def __call__(self, step: int) -> float:
        return 1.0


@schedules.register("cosine")
class CosineDecay:
    """`(1 + cos(pi step / steps)) / 2`: from 1 at the first step to 0 at `steps`, and 0 from there on."""

    def __init__(self, steps: int):
        self.steps = _at_least_one("cosine", "steps", steps)

    def __call__(self, step: int) -> float:
        return (1 + math.cos(math.pi * step / self.steps)) / 2 if step < self.steps else 0.0


@schedules.register("stop")
class Stop:
    """HASTE's (arXiv 2505.16792) early stop: 1 for the first `steps` steps, 0 from there on."""

    def __init__(self, steps: int):
        self.steps = _at_least_one("stop", "steps", steps)

    def __call__(self, step: int) -> float:
        return 1.0 if step < self.steps else 0.0


@schedules.register("stop-at-similarity")
class StopAtSimilarity(nn.Module):
    """1 until the mean cosine similarity of the last `every` steps has reached `similarity`, 0 from there on.

    Looked at only every `every` steps, since it waits for the device.
    """

    total: Tensor
    count: Tensor
    stopped: Tensor

    def __init__(self, similarity: float, every: int = 100):
        super().__init__()
        if not -1 <= similarity <= 1:
            raise UserError(f"schedule 'stop-at-similarity': a similarity lies in [-1, 1], not at {similarity}")
        self.similarity, self.every = similarity, _at_least_one("stop-at-similarity", "every", every)
        self.register_buffer("total", torch.zeros((), dtype=torch.float32))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("stopped", torch.zeros((), dtype=torch.bool))
        self._known: bool | None = None  # what `stopped` holds, without asking the device

    def forward(self, step: int) -> float:
        if step % self.every == 0 or self._known is None:
            if step % self.every == 0 and self.count > 0:
                self.stopped |= self.total / self.count >= self.similarity
                self.total.zero_()
                self.count.zero_()
            self._known = bool(self.stopped)
        return 0.0 if self._known else 1.0

    def observe(self, similarity: Tensor) -> None:
        """Count the mean similarity of one pass, a scalar."""
        self.total += similarity
        self.count += 1


def _at_least_one(schedule: str, name: str, value: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"schedule '{schedule}': {name} takes a whole number from 1, not {value!r}")
    return value
