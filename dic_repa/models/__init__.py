"""Denoisers: modules with `forward(x, t, y)` and `num_classes`."""

from dic_repa.models.authors import load_authors_checkpoint
from dic_repa.models.cost import Cost, forward_on_meta, measure_cost
from dic_repa.models.dic import PRESETS, DiC
from dic_repa.models.ladder import EarlyModulationBlock, GatedBlock, MidModulationBlock

__all__ = [
    "PRESETS",
    "Cost",
    "DiC",
    "EarlyModulationBlock",
    "GatedBlock",
    "MidModulationBlock",
    "forward_on_meta",
    "load_authors_checkpoint",
    "measure_cost",
]
