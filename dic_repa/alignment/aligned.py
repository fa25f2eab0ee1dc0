"""`AlignedDenoiser`: a denoiser and its alignments as one module, so that DDP and FSDP see the heads' parameters.

The hidden state is read through a forward hook on a submodule named by its path (the *tap*), so that a denoiser needs
no change to be aligned. Encoders are frozen and stay outside: they are neither saved nor wrapped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dic_repa.alignment.heads import heads
from dic_repa.alignment.losses import manifold_loss, token_loss
from dic_repa.errors import UserError, unknown_name
from dic_repa.models.cost import forward_on_meta


class Alignment(nn.Module):
    """One tap aligned to one encoder: the head, and the loss `weight * (token + manifold_weight * manifold)`.

    Args:
        tap: name of a submodule of the denoiser whose output is a feature map (B, C, h, w), such as 'mid.3'.
        head: module of (feature, t) that gives tokens (B, N, embed_dim).
        weight: lambda of the paper.
        manifold_weight: w of the paper.
    """

    def __init__(self, tap: str, head: nn.Module, weight: float = 0.5, manifold_weight: float = 3.0):
        super().__init__()
        self.tap, self.head = tap, head
        self.weight, self.manifold_weight = weight, manifold_weight

    @classmethod
    def build(
        cls,
        denoiser: nn.Module,
        tap: str,
        embed_dim: int,
        grid: tuple[int, int],
        size: tuple[int, int],
        head: str = "mlp",
        weight: float = 0.5,
        manifold_weight: float = 3.0,
        **head_options,
    ) -> Alignment:
        """The alignment of `denoiser` at `tap` to an encoder of width `embed_dim` and token `grid`.

        The tap's channels are found by running the denoiser once on the meta device with data of `size` (H, W). A
        UserError lists the near names of an unknown tap or head, and says what a tap gives if it is no feature map.
        """
        channels = tap_channels(denoiser, tap, size)
        factory = heads.get(head)
        try:
            module = factory(channels, embed_dim, tuple(grid), **head_options)
        except TypeError as error:
            raise UserError(f"head '{head}' does not take these options: {error}") from None
        return cls(tap, module, weight, manifold_weight)

    def loss(self, projection: Tensor, target: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of projection (B, N, D) against target (B, N, D) at times t (B,), a float32 scalar.

        The second result holds its two terms, detached, for the log.
        """
        token, manifold = token_loss(projection, target), projection.new_zeros(1, dtype=torch.float32)
        if self.manifold_weight:
            manifold = manifold_loss(projection, target)
        loss = self.weight * (token + self.manifold_weight * manifold).mean()
        return loss, {"token": token.detach().mean(), "manifold": manifold.detach().mean()}


@dataclass
class AlignedOutput:
    """`prediction` of the denoiser, and one projection (B, N, D) per alignment."""

    prediction: Tensor
    projections: list[Tensor]


class AlignedDenoiser(nn.Module):
    """`aligned(x, t, y)` runs the denoiser once and each alignment's head on what its tap gave.

    Any module with `forward(x, t, y)` will do as the denoiser.
    """

    def __init__(self, denoiser: nn.Module, alignments: list[Alignment] | tuple[Alignment, ...] = ()):
        super().__init__()
        self.denoiser = denoiser
        self.alignments = nn.ModuleList(alignments)
        self._tapped: dict[str, Tensor] = {}
        for tap in {alignment.tap for alignment in alignments}:
            find_tap(denoiser, tap).register_forward_hook(self._keep(tap))

    def _keep(self, tap: str):
        def hook(_module, _inputs, output):
            self._tapped[tap] = output

        return hook

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> AlignedOutput:
        prediction = self.denoiser(x, t, y)
        projections = [alignment.head(self._tapped[alignment.tap], t) for alignment in self.alignments]
        self._tapped.clear()  # the feature maps would live on until the next step
        return AlignedOutput(prediction, projections)


def find_tap(denoiser: nn.Module, tap: str) -> nn.Module:
    """The submodule of that name; a UserError with the near names where there is none."""
    modules = dict(denoiser.named_modules())
    if not tap or tap not in modules:
        raise unknown_name("tap", tap, [name for name in modules if name])
    return modules[tap]


def tap_channels(denoiser: nn.Module, tap: str, size: tuple[int, int]) -> int:
    """Channels of the feature map at `tap`, found by a run on the meta device with data of `size` (H, W)."""
    shapes = []

    def note(_module, _inputs, output):
        shapes.append(getattr(output, "shape", ()))

    handle = find_tap(denoiser, tap).register_forward_hook(note)
    try:
        forward_on_meta(denoiser, *size)
    finally:
        handle.remove()
    if len(shapes) != 1 or len(shapes[0]) != 4:
        given = f"a tensor of shape {tuple(shapes[0])}" if shapes else "nothing"
        raise UserError(f"tap '{tap}' gives {given}, but a tap must give one feature map (B, C, h, w) per run")
    return shapes[0][1]
