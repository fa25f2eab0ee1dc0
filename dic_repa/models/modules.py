"""Lists of modules that a type checker sees into: torch's own say no more of an element than that it is a Module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    class Modules(nn.ModuleList, Generic[M]):
        def __init__(self, modules: Iterable[M] = ()): ...
        def __getitem__(self, index: int) -> M: ...  # type: ignore[override]  # slices are not used
        def __iter__(self) -> Iterator[M]: ...
else:
    Modules = nn.ModuleList
