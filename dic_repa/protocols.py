"""What a part must have, whoever wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Samples(Protocol):
    """Samples by index: what is trained on, and what is read once to fill a cache."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        """`x` (C, H, W), the denoiser's data; `image` (1 or 3, H, W), what an encoder sees; `label`, an int64 scalar.

        Of latents `moments` instead of `x`; docs/extending.md says which may be left out.
        """
        ...


class DataSet(Samples, Protocol):
    """What a recipe's `data` names."""

    @property
    def channels(self) -> int:
        """Of the denoiser's data."""
        ...

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> Sequence[str]: ...
