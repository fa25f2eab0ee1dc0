"""Encoders by name, as `dic_repa.registry` has it; `timm:` is a family."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dic_repa.errors import UserError
from dic_repa.protocols import Encoder
from dic_repa.registry import Registry

encoders = Registry("encoder", modules=["dic_repa.encoders.*"], key="alignments.0.encoder")
register_encoder = encoders.register
"""Decorator that registers its class as the encoder of this name."""
list_encoders = encoders.names
"""The sorted names of the encoders, or those that match a shell pattern."""
IN_PACKAGE = "in this package, works without network"  # the source of weights


@dataclass(frozen=True)
class Card:
    """What a list says of an encoder without building it: an optional attribute `card` of its class or function."""

    width: int  # of a token
    patch: int  # pixels of the image that the network sees
    tokens: int  # for an image of 256x256
    parameters: float  # in millions
    source: str  # of the weights
    licence: str  # of the weights


def encoder_card(name: str) -> Card:
    """The card of an encoder; one that has none is built, without options, and measured."""
    card = encoders.fact(name, "card")
    if card is None:
        encoder = create_encoder(name)
        rows, columns = encoder.token_grid((256, 256))
        parameters = sum(p.numel() for p in encoder.parameters()) if isinstance(encoder, nn.Module) else 0
        card = Card(encoder.embed_dim, 0, rows * columns, parameters / 1e6, type(encoder).__module__, "-")
    return card


def create_encoder(name: str, **options: Any) -> Encoder:
    """Build the encoder of that `name`, frozen; the options are those of its class or function.

    Raises:
        UserError: an unknown name or option, or weights that cannot be fetched or do not fit.
    """
    encoder = encoders.create(name, **options)
    if isinstance(encoder, nn.Module):
        encoder.eval().requires_grad_(False)
    return encoder


@torch.no_grad()
def check_tokens(name: str, encoder: Encoder, images: Tensor) -> Tensor:
    """The tokens of `images` (B, C, H, W); a UserError says how the encoder breaks the protocol `Encoder`."""
    encoders.check_has(name, encoder, ("embed_dim", "token_grid", "__call__"))
    size = (images.shape[-2], images.shape[-1])
    rows, columns = encoder.token_grid(size)
    tokens = encoder(images)
    expected = (len(images), rows * columns, encoder.embed_dim)
    shape = tuple(getattr(tokens, "shape", ())) or type(tokens).__name__
    if shape != expected:
        raise UserError(
            f"the tokens of encoder '{name}' are no grid: its token_grid of {size} is {rows}x{columns} and its "
            f"embed_dim {encoder.embed_dim}, so they should be {expected}, not {shape}; leave out class and register "
            "tokens"
        )
    return tokens
