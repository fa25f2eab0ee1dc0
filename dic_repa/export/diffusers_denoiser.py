"""A denoiser as a model of diffusers. An exported folder has this file as denoiser/denoiser.py; it needs dic-repa."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from dic_repa.conditions import Condition
from dic_repa.models.registry import denoiser_class


class DicRepaDenoiser(ModelMixin, ConfigMixin):
    """`denoiser(x, t, y)`: x (B, C, H, W), t (B,), y (B, ...), as the network has them that it holds as `model`.

    Args:
        kind: the network's class, such as 'DiC'. One of your own is known once its module is imported.
        options: the network's arguments.
    """

    @register_to_config
    def __init__(self, kind: str, options: dict[str, Any]):
        super().__init__()
        self.model = denoiser_class(kind, "this folder")(**options)
        self.in_channels, self.num_classes = self.model.in_channels, self.model.num_classes

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> DicRepaDenoiser:
        """As diffusers has it, with the network in the memory layout that it was made for."""
        denoiser = super().from_pretrained(*arguments, **options)
        return denoiser.to(memory_format=torch.channels_last) if denoiser.config.kind == "DiC" else denoiser

    @property
    def conditioned_on(self) -> Condition:
        """What y is."""
        return self.model.conditioned_on

    @property
    def middle_head(self) -> torch.nn.Module | None:
        """The network's second head, for internal guidance."""
        return getattr(self.model, "middle_head", None)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x, t, y)
