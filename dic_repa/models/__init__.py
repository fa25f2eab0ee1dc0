"""Denoisers: modules with `forward(x, t, y)`, `in_channels` and `num_classes`; `create_denoiser` makes them by name."""

from dic_repa.models.authors import load_authors_checkpoint
from dic_repa.models.blocks import EarlyModulationBlock, GatedBlock, MidModulationBlock
from dic_repa.models.cost import Cost, measure_cost
from dic_repa.models.dic import PRESETS, DiC
from dic_repa.models.middle import add_middle_head
from dic_repa.models.pretrained import Pretrained, forward_on_meta
from dic_repa.models.registry import create_denoiser, denoisers, list_denoisers, load_denoiser, register_denoiser

__all__ = [
    "PRESETS",
    "Cost",
    "DiC",
    "EarlyModulationBlock",
    "GatedBlock",
    "MidModulationBlock",
    "Pretrained",
    "add_middle_head",
    "create_denoiser",
    "denoisers",
    "forward_on_meta",
    "list_denoisers",
    "load_authors_checkpoint",
    "load_denoiser",
    "measure_cost",
    "register_denoiser",
]
