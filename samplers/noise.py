"""Noise that belongs to a sample, not to a batch: the same image whatever the batch size, the device or the process.

Philox is a counter-based generator (Salmon et al. 2011): each number has a name, and needs no others before it. What is
drawn once a batch, the noise at t = 1 and the signs of a likelihood, is NumPy's on the CPU, of Philox4x64 with the key
(seed, sample index) and the counter (step, purpose); no two streams overlap. The noise of an SDE's steps is made on the
device, of Philox4x32 with the key (seed) and the counter (place, step, sample index).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.runtime.copies import send
from dic_repa.samplers.philox import fill_normal, philox, split_words

STEP_NOISE = "philox4x32-10"  # how the noise of steps is made, as records of samples have it
_INITIAL, _PROBE = 0, 2  # 1 was the noise of steps
_AT_ONCE = {"cpu": 2**17, "cuda": 2**21}  # numbers of a draw: on a CPU they stay in its cache
_WORD = 2**64 - 1


def _normal(shape: Sequence[int], seed: int, indices: Sequence[int], step: int, purpose: int) -> Tensor:
    out = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(out, indices):
        bits = np.random.Philox(key=[int(index) & _WORD, seed & _WORD], counter=[0, 0, step, purpose])
        np.random.Generator(bits).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(out)


def initial_noise(shape: Sequence[int], seed: int, indices: Sequence[int]) -> Tensor:
    """Standard normal noise at t = 1 for the samples `indices`, each of `shape` (C, H, W).

    Returns (len(indices), *shape), float32, on the CPU; a row depends on (seed, its index) alone.
    """
    return _normal(tuple(shape), seed, indices, 0, _INITIAL)


class StepNoise:
    """The noise of an SDE's steps: `StepNoise(seed, indices)(step, like)` is (len(indices), ...) like `like`.

    A row depends on (seed, its index, step) alone and is independent of `initial_noise`. It is made where `like` is: a
    GPU waits neither for the CPU nor for a copy. Its numbers are the CPU's, but for a rare last bit (`fill_normal`).
    """

    def __init__(self, seed: int, indices: Sequence[int]):
        self.seed, self.indices = seed, list(indices)
        self._first, self._block = 0, torch.empty(0)  # the noise of several steps (steps, B, ...), from step `first` on

    def __call__(self, step: int, like: Tensor) -> Tensor:
        if len(like) != len(self.indices):
            raise UserError(f"noise for {len(self.indices)} sample indices was asked for a batch of {len(like)}")
        device = like.device if like.is_cuda else torch.device("cpu")
        place = step - self._first
        if not (0 <= place < len(self._block) and self._block.shape[1:] == like.shape and self._block.device == device):
            # A draw is a hundred operations, however small; so there are as many steps in it as make it worth while.
            count = max(1, _AT_ONCE[device.type] // max(1, like.numel()))
            place = step % count
            self._first = step - place
            self._block = self._draw(range(self._first, self._first + count), like.shape[1:], device)
        return self._block[place].to(like.device, like.dtype)

    def _draw(self, steps: range, shape: Sequence[int], device: torch.device) -> Tensor:
        size, at_once = math.prod(shape), _AT_ONCE[device.type] // 4
        names = [(step, *split_words(index)) for step in steps for index in self.indices]
        rows_named = send(torch.tensor(names, dtype=torch.int64).view(-1, 3), device)
        places = torch.arange(-(-size // 4), device=device)
        normal = torch.empty(len(names), 4, len(places), device=device)
        rows = max(1, at_once // max(1, len(places)))
        for some, named in zip(normal.split(rows), rows_named.split(rows)):
            for part, placed in zip(some.split(at_once, dim=2), places.split(at_once)):
                counter = torch.empty(4, len(part), len(placed), dtype=torch.int64, device=device)
                counter[0], counter[1:] = placed, named.T[..., None]
                fill_normal(part, philox(counter, split_words(self.seed)))
        return normal.flatten(1)[:, :size].reshape(len(steps), len(self.indices), *shape)


def rademacher(shape: Sequence[int], seed: int, indices: Sequence[int], probe: int) -> Tensor:
    """Random signs (len(indices), *shape), a row depending on (seed, its index, probe) alone."""
    return torch.sign(_normal(tuple(shape), seed, indices, probe, _PROBE))
