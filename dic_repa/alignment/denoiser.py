"""`AlignedDenoiser`: our own trainer's denoiser with its aligner as one module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dic_repa.alignment.aligner import Aligner
from dic_repa.alignment.alignment import Alignment, Projected
from dic_repa.models.derivative import total_derivative


@dataclass
class AlignedOutput:
    """`prediction` of the denoiser, one projection (B, N, D) per alignment, see `Aligner.project`, and what a middle
    head predicts, with the weight of its loss."""

    prediction: Tensor
    projections: list[Tensor | Projected]
    middle: Tensor | None = None
    middle_weight: float = 0.0


class AlignedDenoiser(nn.Module):
    """`aligned(x, t, y)` runs the denoiser once and each alignment's head on what its tap gave, as one module, so that
    DDP and FSDP see the heads' parameters.

    The denoiser is any module with `forward(x, t, y)`. Heads get `unit_time`, the time in [0, 1], if that is not t
    (DDPM counts steps).
    """

    aligner: Aligner

    def __init__(self, denoiser: nn.Module, alignments: Sequence[Alignment] = ()):
        super().__init__()
        self.denoiser = denoiser
        aligner = Aligner(denoiser, alignments)
        self.alignments = aligner.alignments
        self.__dict__["aligner"] = aligner  # no submodule: its only ones are these alignments

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, unit_time: Tensor | None = None, project: bool = True
    ) -> AlignedOutput:
        prediction = self.denoiser(x, t, y)
        projections = self.aligner.project(t if unit_time is None else unit_time) if project else []
        if (head := getattr(self.denoiser, "middle_head", None)) is None:
            return AlignedOutput(prediction, projections)
        own, middle = prediction.chunk(2, dim=1)
        return AlignedOutput(own, projections, middle, head.loss_weight)

    def derivative(self, x: Tensor, t: Tensor, y: Tensor, tangent: Tensor | None) -> Tensor:
        """The denoiser's `total_derivative`, of which its taps see nothing; it is never compiled."""
        return total_derivative(self.denoiser, x, t, y, tangent)
