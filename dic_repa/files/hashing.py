"""Fingerprints: short hashes that tell contents from others."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def fingerprint(*parts: str | bytes | Tensor, size: int = 12) -> str:
    """The BLAKE2b hash of the parts, `size` bytes in hexadecimal digits."""
    return add_parts(hashlib.blake2b(digest_size=size), *parts).hexdigest()


def add_parts(digest: Any, *parts: str | bytes | Tensor) -> Any:
    """Add texts in UTF-8, bytes, and the values of tensors, one after the other, to a hash of hashlib's."""
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        elif isinstance(part, bytes):
            digest.update(part)
        else:
            digest.update(tensor_bytes(part))
    return digest


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as they lie in memory, in the order of its indices."""
    import torch  # what only hashes text has no need of it

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file's content, read in parts."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
