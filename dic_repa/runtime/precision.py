"""TF32: whether a GPU may round the factors of float32 products to 10 bits of mantissa."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def allow_tf32(allowed: bool, convolutions: bool | None = None) -> None:
    """Let matrix products use TF32 or not, and `convolutions` alike if it is None: torch itself lets convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed if convolutions is None else convolutions


@contextlib.contextmanager
def tf32(allowed: bool, convolutions: bool | None = None) -> Iterator[None]:
    """`allow_tf32`, and as it was afterwards; also a decorator."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    allow_tf32(allowed, convolutions)
    try:
        yield
    finally:
        for backend, value in zip(backends, before):
            backend.allow_tf32 = value
