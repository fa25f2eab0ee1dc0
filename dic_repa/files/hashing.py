"""Fingerprints: short hashes of contents."""

import hashlib
from pathlib import Path
from typing import Any


def fingerprint(*parts: Any, size: int = 12) -> str:
    """The BLAKE2b hash of texts, bytes and the values of tensors: `size` bytes in hexadecimal digits."""
    return add_parts(hashlib.blake2b(digest_size=size), *parts).hexdigest()


def add_parts(digest: Any, *parts: Any) -> Any:
    """Add texts, bytes and the values of tensors to a hash of hashlib."""
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        if not isinstance(data, bytes):
            import torch  # not for those who only hash text

            data = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        digest.update(data)
    return digest


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file's content, read in parts."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
