"""Autoencoders by name, as `dic_repa.registry` has it; what is known of one without building it; pixels."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dic_repa.data.autoencoders.spec import AutoencoderSpec
from dic_repa.protocols import Autoencoder
from dic_repa.registry import Registry

autoencoders = Registry("autoencoder", modules=["dic_repa.data.autoencoders.*"], key="data.autoencoder")
list_autoencoders = autoencoders.names
"""The sorted names of the autoencoders, or those that match a shell pattern."""


@dataclass(frozen=True)
class AutoencoderCard:
    """What a list says of an autoencoder without building it: an optional attribute `card` of its class or function."""

    channels: int
    downsample: int  # pixels of the image's side for one of the latent
    parameters: float  # in millions
    licence: str  # of the weights
    source: str  # of the weights: a hub id, an address, or IN_PACKAGE


@autoencoders.register("none", card=AutoencoderCard(3, 1, 0.0, "-", "-"))
class Pixels:
    """No autoencoder: the denoiser's data is the image in [-1, 1]."""

    spec = AutoencoderSpec("none", 3, 1, (0.5,) * 3, (2.0,) * 3)
    device = torch.device("cpu")

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([images, torch.zeros_like(images)], dim=1)

    def decode(self, x: Tensor) -> Tensor:
        return self.spec.denormalise(x.float()).clamp(0, 1)

    def to(self, device: torch.device | str) -> "Pixels":
        return self


class Renormalised:
    """Any autoencoder for data that is normalised as `spec` says, where that is not its own way."""

    def __init__(self, autoencoder: Autoencoder, spec: AutoencoderSpec):
        self.autoencoder, self.spec = autoencoder, spec

    @property
    def device(self) -> torch.device:
        return self.autoencoder.device

    def to(self, device: torch.device | str) -> "Renormalised":
        self.autoencoder = self.autoencoder.to(device)
        return self

    def encode(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images)

    def decode(self, x: Tensor) -> Tensor:
        return self.autoencoder.decode(self.autoencoder.spec.normalise(self.spec.denormalise(x.float())))


def renormalised(autoencoder: Autoencoder, spec: AutoencoderSpec) -> Any:
    """`autoencoder` for data that is normalised as `spec` says: itself, if that is its own way."""
    own = autoencoder.spec
    return autoencoder if (own.shift, own.scale) == (spec.shift, spec.scale) else Renormalised(autoencoder, spec)
