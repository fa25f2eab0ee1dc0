"""The gradient noise scale (McCandlish et al., arXiv 1812.06162): how large a batch is worth its images.

The simple noise scale is tr(Sigma) / |G|^2: G is the gradient of the whole data's loss, and Sigma the covariance of one
image's. Far below it, twice the batch needs half of the steps; far above, it needs hardly fewer. The squared norm of a
batch of B images' gradient has the expectation |G|^2 + tr(Sigma) / B. So two batches give both (appendix A.1): b, one
pass of one process, and B, the whole step.

    |G|^2 = (B |G_B|^2 - b |G_b|^2) / (B - b)          tr(Sigma) = (|G_b|^2 - |G_B|^2) / (1/b - 1/B)
"""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dic_repa.training.trainable import trained_parameters

MEMORY = 0.9  # share of |G|^2 and tr(Sigma) that a measurement leaves of those before: single ones are noisy


class NoiseScale:
    """Measures it, in steps that are logged anyway, from gradients that are computed anyway.

    Needs several passes or processes; of a sharded model, no process ever has a pass's gradient as a whole. Losses that
    compare images of a batch, or of several processes, count as if they were means over images.

    Args:
        batch: images of a step.
        passes: of a step, in each process.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, batch: int, passes: int, sharded: bool = False):
        self.parameters, self.accelerator = trained_parameters(model), accelerator
        self.batch, self.passes = batch, passes
        self.small = batch // (passes * accelerator.num_processes)
        self.measurable = self.small < batch and not sharded
        self.signal = self.noise = 0.0  # running means of |G|^2 and tr(Sigma), times the same factor
        self.scale = 1.0  # of the losses, under fp16
        self.norms: list[Tensor] = []  # of each parameter's gradient, in each pass

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Note the norms of the gradients of the passes inside; but for fp16 the host does not wait for the
        device."""
        scaler = self.accelerator.scaler
        self.scale = scaler.get_scale() if scaler is not None and self.measurable else 1.0  # the step may change it
        self.norms = []
        hooks = [parameter.register_hook(self._note) for parameter in self.parameters] if self.measurable else []
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, gradient: Tensor) -> None:
        """See one parameter's gradient of one pass, before it is added to others and averaged over processes."""
        self.norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

    def measure(self, norm: Tensor) -> float | None:
        """The noise scale in images, after a step that was measured; None where there is no estimate (yet).

        All processes must call it; it waits for the device.

        Args:
            norm: of the whole step's gradient, before clipping.
        """
        if not self.measurable:
            return None
        # A pass's loss was divided by their number. The mean over passes, and over processes:
        squares = torch.stack(self.norms).square().sum() * self.passes / self.scale**2
        small, whole = self.accelerator.reduce(torch.stack([squares, norm.square()]), "mean").tolist()
        if not abs(small + whole) < float("inf"):  # a step that was skipped
            return self.value()
        signal = (self.batch * whole - self.small * small) / (self.batch - self.small)
        noise = (small - whole) / (1 / self.small - 1 / self.batch)
        self.signal = MEMORY * self.signal + (1 - MEMORY) * signal
        self.noise = MEMORY * self.noise + (1 - MEMORY) * noise
        return self.value()

    def value(self) -> float | None:
        """The ratio of the means; None before the first measurement, and where chance has made one negative."""
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else None

    def state(self) -> list[float]:
        """What `restore` takes in a resumed run."""
        return [self.signal, self.noise]

    def restore(self, state: list[float]) -> None:
        self.signal, self.noise = map(float, state)
