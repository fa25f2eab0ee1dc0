"""Aligning a denoiser's hidden state to the tokens of a frozen vision encoder."""

from dic_repa.alignment.aligner import Aligner
from dic_repa.alignment.alignment import Alignment
from dic_repa.alignment.denoiser import AlignedDenoiser, AlignedOutput
from dic_repa.alignment.heads import heads, register_head
from dic_repa.alignment.losses import alignment_losses, manifold_loss, targets, token_loss
from dic_repa.alignment.schedules import schedules, time_weights
from dic_repa.alignment.self_teachers import averaged_tokens, teachers
from dic_repa.alignment.taps import suggest_taps

__all__ = [
    "AlignedDenoiser",
    "AlignedOutput",
    "Aligner",
    "Alignment",
    "alignment_losses",
    "averaged_tokens",
    "heads",
    "manifold_loss",
    "register_head",
    "schedules",
    "suggest_taps",
    "targets",
    "teachers",
    "time_weights",
    "token_loss",
]
