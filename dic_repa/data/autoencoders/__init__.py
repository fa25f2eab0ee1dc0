"""Autoencoders between images and the denoiser's data: `dic_repa.protocols.Autoencoder` says what they have.

A name is 'none' (pixels), that of a published one, one of your own (registered, an entry point, or
`package.module:factory`), the local folder or hub id of an autoencoder of diffusers, or a file in LDM's layout. The
denoiser's data is x = (z - shift) * scale, with z drawn from the posterior, if there is one.
"""

from dic_repa.data.autoencoders.base import (
    AutoencoderCard,
    Pixels,
    autoencoders,
    list_autoencoders,
    renormalised,
)
from dic_repa.data.autoencoders.diffusers_models import KLAutoencoder
from dic_repa.data.autoencoders.ldm import write_ldm
from dic_repa.data.autoencoders.load import autoencoder_card, load_autoencoder, load_spec
from dic_repa.data.autoencoders.spec import AutoencoderSpec, LatentStatistics

__all__ = [
    "AutoencoderCard",
    "AutoencoderSpec",
    "KLAutoencoder",
    "LatentStatistics",
    "Pixels",
    "autoencoder_card",
    "autoencoders",
    "list_autoencoders",
    "load_autoencoder",
    "load_spec",
    "renormalised",
    "write_ldm",
]
