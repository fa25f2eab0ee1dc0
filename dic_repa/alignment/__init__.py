"""Aligning a denoiser's hidden state to the tokens of a frozen vision encoder."""

from dic_repa.alignment.aligned import AlignedDenoiser, AlignedOutput, Alignment
from dic_repa.alignment.heads import heads, register_head
from dic_repa.alignment.losses import alignment_losses, manifold_loss, targets, token_loss
from dic_repa.alignment.schedules import schedules, time_weights

__all__ = [
    "AlignedDenoiser",
    "AlignedOutput",
    "Alignment",
    "alignment_losses",
    "heads",
    "manifold_loss",
    "register_head",
    "schedules",
    "targets",
    "time_weights",
    "token_loss",
]
