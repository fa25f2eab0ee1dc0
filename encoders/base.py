"""What an encoder is, and the table in which encoders are found by name.

A name that ends in a colon files a *family*: `create_encoder("timm:vit_small_patch14_dinov2")` calls the factory
filed under `timm:` with `vit_small_patch14_dinov2` as its first argument.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from dic_repa.errors import UserError, unknown_name
from dic_repa.registry import Registry

_encoders = Registry("encoder")


class Encoder(Protocol):
    """A frozen network that turns images into a grid of tokens, the targets of the alignment.

    Frozen: always in eval mode, no parameter asks for a gradient, and the tokens carry none. Resizing and
    normalisation are inside, so that whoever calls it knows nothing of either.
    """

    embed_dim: int

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The rows and columns of tokens (h, w) for images of `size` (H, W), in pixels."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W), float in [0, 1], to tokens (B, h * w, embed_dim), row by row."""
        ...


def register_encoder(name: str) -> Callable[[Any], Any]:
    """Decorator that files a class or function under `name`; called with the options it returns an `Encoder`.

    Raises UserError when the name is taken.
    """
    return _encoders.register(name)


def list_encoders(pattern: str = "*") -> list[str]:
    """The sorted names that match a shell `pattern`; one with a colon at its end is a family, such as `timm:`."""
    return _encoders.names(pattern)


def create_encoder(name: str, **options: Any) -> Encoder:
    """Build the encoder filed under `name`; the options are those of its class or function.

    Raises UserError for an unknown name or option, with the near ones, and for whatever the encoder itself cannot mend
    (weights that cannot be fetched or do not fit).
    """
    factory = _find(name)
    parameters = inspect.signature(factory).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        for option in options:
            if option not in parameters:
                raise unknown_name(f"option of encoder {name}:", option, parameters)
    return factory(**options)


def _find(name: str) -> Callable[..., Encoder]:
    family, colon, model_name = name.partition(":")
    if colon and family + colon in _encoders:
        if not model_name:
            raise UserError(f"encoder '{name}' is a family; put a model's name behind the colon")
        return functools.partial(_encoders.get(family + colon), model_name)
    return _encoders.get(name)
