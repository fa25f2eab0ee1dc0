"""Philox4x32-10 (Salmon et al. 2011), a counter-based generator, by whole-number operations that every device has."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WORD = 2**32 - 1


def split_words(number: int) -> tuple[int, int]:
    """The low and the high 32 bits of a 64-bit `number`, negative ones in two's complement."""
    return int(number) & WORD, int(number) >> 32 & WORD


def philox(counter: Tensor, key: Sequence[int]) -> list[Tensor]:
    """Four random words for each counter, in the memory of `counter` (4, ...), int64 numbers of 32 bits.

    A product of two words may leave the range of int64, but its 64 bits are right, and the masks take off the sign.
    On a CPU NumPy does the same arithmetic in two thirds of torch's time.
    """
    shared: Any = counter if counter.is_cuda else counter.numpy()
    a, b, c, d = shared
    low, high = key
    for _ in range(10):
        a *= 0xD2511F53
        c *= 0xCD9E8D57
        b ^= c >> 32
        b ^= low
        b &= WORD
        d ^= a >> 32
        d ^= high
        d &= WORD
        a, b, c, d = b, c, d, a
        low, high = (low + 0x9E3779B9) & WORD, (high + 0xBB67AE85) & WORD
    b &= WORD
    d &= WORD
    return [counter[place] for place in (2, 3, 0, 1)]  # where ten turns have left a, b, c, d


def fill_normal(out: Tensor, words: Sequence[Tensor]) -> None:
    """Write standard normal numbers, none beyond 6.8, to `out` (B, 4, N), float32, from four random `words` (B, N),
    which are lost, by Box and Muller.

    The logarithm, cosine and sine are taken in float64 and then rounded, so that two devices differ in the last bit of
    about one number in a hundred million.
    """
    for place in (0, 2):
        radius = _uniform(words[place]).log_().float().mul_(-2).sqrt_()
        angle = _uniform(words[place + 1]).mul_(2 * math.pi)
        torch.mul(radius, angle.cos().float(), out=out[:, place])
        torch.mul(radius, angle.sin_().float(), out=out[:, place + 1])


def _uniform(words: Tensor) -> Tensor:
    """(word + 1/2) / 2^32 in float64, in the memory of `words`: below the bits of 2^20, a word counts in 2^-32."""
    return words.bitwise_or_(0x4130_0000_0000_0000).view(torch.float64).sub_(2.0**20 - 2.0**-33)
