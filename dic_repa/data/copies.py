"""Augmentation: mirrored and moved copies of pictures, which are further samples of a data set."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from dic_repa.errors import UserError


class Copies:
    """Which picture a sample shows, and how it is mirrored and moved.

    That depends on the sample's index alone, not on a random number: cached tokens, a resumed run and several
    processes all see the same. First come the pictures as they are, then the mirrored ones; then all of these again for
    each move.

    Args:
        count: the number of pictures.
        mirrored: the pictures that are mirrored too.
        shift: the pictures are moved too, by up to this many pixels to each side, down and across: (2 shift + 1)^2
            positions. The colour of the border fills the edge.
        size: height and width of the pictures.
    """

    def __init__(self, count: int, mirrored: Sequence[int] = (), shift: int = 0, size: int = 1):
        most = size // 4
        if not 0 <= shift <= most:
            raise UserError(f"data.options.shift is {shift}; pictures of {size} px are moved by 0 to {most} pixels")
        self.count, self.mirrored = count, mirrored
        self.moves = sorted(product(range(-shift, shift + 1), repeat=2), key=any)  # (0, 0) first

    def __len__(self) -> int:
        return (self.count + len(self.mirrored)) * len(self.moves)

    def __str__(self) -> str:
        """What a fingerprint of the data needs of it."""
        return f"{self.count} {list(self.mirrored)} {self.moves[-1]}"

    def picture(self, index: int) -> int:
        """The picture that sample `index` shows; an IndexError if there is no such sample."""
        place = self._place(index)[1]
        return place if place < self.count else self.mirrored[place - self.count]

    def apply(self, image: Tensor, index: int) -> Tensor:
        """The picture (C, H, W) as sample `index` shows it."""
        move, place = self._place(index)
        image = image if place < self.count else image.flip(-1)
        if not any(self.moves[move]):
            return image
        down, across = self.moves[move]
        rows, columns = torch.arange(image.shape[-2]) - down, torch.arange(image.shape[-1]) - across
        return image[:, rows.clamp(0, len(rows) - 1)][:, :, columns.clamp(0, len(columns) - 1)]

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return divmod(index, self.count + len(self.mirrored))
