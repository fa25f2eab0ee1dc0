"""Encoders by name: a registered one, an entry point of the group `dic_repa.encoders`, or `package.module:factory`.

A registered name that ends in a colon is a *family*: `create_encoder("timm:vit_small_patch14_dinov2")` calls the
factory `timm:` with `vit_small_patch14_dinov2` as its first argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dic_repa.errors import UserError
from dic_repa.protocols import Encoder
from dic_repa.registry import Registry

encoders = Registry("encoder", modules=["dic_repa.encoders"], key="alignments.0.encoder")


@dataclass(frozen=True)
class Card:
    """What a list says of an encoder without building it: an optional attribute `card` of its class or function."""

    width: int  # of a token
    patch: int  # pixels of the image that the network sees
    tokens: int  # for an image of 256x256
    parameters: float  # in millions
    source: str  # of the weights
    licence: str  # of the weights


def register_encoder(name: str) -> Callable[[Any], Any]:
    """Decorator for a class or function that makes an `Encoder` from its options; a UserError for a taken name."""
    return encoders.register(name)


def list_encoders(pattern: str = "*") -> list[str]:
    """The sorted names that match a shell `pattern`, entry points included; a name such as `timm:` is a family."""
    return encoders.names(pattern)


def encoder_card(name: str) -> Card | None:
    """The card of the encoder `name`, None if it has none; a UserError for an unknown name."""
    return getattr(encoders.find(name), "card", None)


def measure_card(name: str) -> Card:
    """A card for an encoder that has none: it is built, without options, and measured."""
    encoder = create_encoder(name)
    rows, columns = encoder.token_grid((256, 256))
    parameters = sum(p.numel() for p in encoder.parameters()) if isinstance(encoder, nn.Module) else 0
    return Card(encoder.embed_dim, 0, rows * columns, parameters / 1e6, type(encoder).__module__, "-")


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
    missing = [part for part in ("embed_dim", "token_grid", "__call__") if not hasattr(encoder, part)]
    if missing:
        raise UserError(
            f"encoder '{name}' gives a {type(encoder).__name__} without {' and '.join(missing)}; an encoder has "
            "embed_dim, token_grid(size) and a call from images to tokens"
        )
    size = (images.shape[-2], images.shape[-1])
    rows, columns = encoder.token_grid(size)
    tokens = encoder(images)
    expected = (len(images), rows * columns, encoder.embed_dim)
    if tuple(getattr(tokens, "shape", ())) != expected:
        shape = tuple(getattr(tokens, "shape", ())) or type(tokens).__name__
        raise UserError(
            f"the tokens of encoder '{name}' are no grid: its token_grid of {size} is {rows}x{columns} and its "
            f"embed_dim {encoder.embed_dim}, so tokens {expected} are due, but it gives {shape}; leave out class and "
            "register tokens"
        )
    return tokens
