"""TF32: whether a GPU may round the factors of float32 products to 10 bits of mantissa."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def allow_tf32(allowed: bool) -> None:
    """Let matrix products and convolutions use TF32 or not: torch itself lets convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """`allow_tf32`, and as it was afterwards; also a decorator."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    allow_tf32(allowed)
    try:
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value
