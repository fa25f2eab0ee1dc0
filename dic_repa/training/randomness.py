"""All randomness of a training step comes from (seed, step), drawn for the global batch and then sliced.

So nothing random is saved in a checkpoint, a resumed run equals an uninterrupted one, and the number of processes
changes nothing.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import torch


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator from which `step` draws times, noise, dropped labels and the posterior's noise, in this order."""
    return torch.Generator(device).manual_seed(_stream(seed, "step") + step)


def data_order(seed: int, count: int, batch_size: int, start_step: int = 0) -> Iterator[list[int]]:
    """Endless global batches of indices into a data set of `count` samples, from the batch of `start_step` on.

    The data is one stream of epochs, each with its own permutation; a batch may span two of them, so none is cut short.
    """
    position = start_step * batch_size
    while True:
        stream = range(position, position + batch_size)
        yield [_permutation(seed, p // count, count)[p % count] for p in stream]
        position += batch_size


def process_rows(batch_size: int, process: int, processes: int) -> slice:
    """The rows of the global batch that belong to `process`."""
    share = batch_size // processes
    return slice(process * share, (process + 1) * share)


@functools.lru_cache(maxsize=2)  # a batch spans at most two epochs, unless it is larger than the data
def _permutation(seed: int, epoch: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(_stream(seed, "data") + epoch)
    return torch.randperm(count, generator=generator).tolist()


def _stream(seed: int, name: str) -> int:
    """A start for each stream, far from those of other seeds, to which a step or an epoch is added."""
    digest = hashlib.blake2b(f"{name}/{seed}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
