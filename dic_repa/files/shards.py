"""A set of tensors in one safetensors file, or in several that each hold some rows of every tensor.

`model.safetensors` is the one file. In its place there may be `model-00001-of-00004.safetensors` and so on, one of each
process of a sharded run. Their headers say at which rows they begin, as torch.distributed.checkpoint does, whose
`HuggingFaceStorageReader` opens them too. It does not write them: the oldest torch that we take cannot (2.6 has no such
reader or writer), what DCP writes there instead has an index that is read by unpickling, and rows that are read by
slices need no plan that all processes must agree on.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.files.reading import check_regular

_INFO, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's own words


@dataclass
class Rows:
    """Some rows of a tensor, from row `start` on."""

    tensor: Tensor
    start: int


def shard_path(path: Path, index: int, count: int) -> Path:
    """The file of process `index` (from 0) of `count`, in place of `path`."""
    return path.with_name(f"{path.stem}-{index + 1:05d}-of-{count:05d}{path.suffix}")


def tensor_files(path: Path) -> list[Path]:
    """The file `path`, or all that are in its place; none if there are none, not all of them, or both."""
    named = re.compile(rf"{re.escape(path.stem)}-(\d{{5}})-of-(\d{{5}}){re.escape(path.suffix)}")
    found = [match for file in path.parent.glob(f"{path.stem}-*") if (match := named.fullmatch(file.name))]
    if path.is_file():
        return [] if found else [path]
    counts = {int(match[2]) for match in found}
    return sorted(path.with_name(match[0]) for match in found) if counts == {len(found)} else []


def save_rows(tensors: Mapping[str, Tensor | Rows | None], path: Path) -> None:
    """Write what one process has, in CPU memory: rows, or whole tensors, None in place of those that another writes."""
    content, starts = {}, {}
    for name, each in tensors.items():
        rows = each if isinstance(each, Rows) else Rows(each, 0) if each is not None else None
        if rows is not None and (rows.tensor.numel() or not rows.start):  # of a short tensor, some have no rows
            content[name] = rows.tensor.contiguous()
            starts[name] = {_OFFSETS: [rows.start, *[0] * content[name].dim()][: content[name].dim()]}
    save_file(content, path, {"format": "pt", _INFO: json.dumps(starts)})


class Stored:
    """A tensor in open files: `stored[...]` reads all of it, `stored[a:b]` those rows alone."""

    def __init__(self, name: str):
        self.name, self.dtype = name, ""  # the dtype as safetensors calls it
        self.shape: tuple[int, ...] = ()
        self.parts: list[tuple[int, Any]] = []  # the first row of each, and its file

    def add(self, start: int, file: Any) -> None:
        self.parts.append((start, file))

    def check(self) -> None:
        """Find shape and dtype; a ValueError if the parts are not those of one tensor."""
        self.parts.sort(key=lambda part: part[0])
        slices = [file.get_slice(self.name) for _, file in self.parts]
        shapes, end = [tuple(each.get_shape()) for each in slices], 0
        for (start, _), shape in zip(self.parts, shapes):
            if start != end or shape[1:] != shapes[0][1:] or (len(shapes) > 1 and not shape):
                raise ValueError(f"the parts of {self.name} do not fit together")
            end += shape[0] if shape else 0
        if len({each.get_dtype() for each in slices}) > 1:
            raise ValueError(f"the parts of {self.name} differ in dtype")
        self.dtype = slices[0].get_dtype()
        self.shape = (end, *shapes[0][1:]) if shapes[0] else ()

    def __getitem__(self, rows: slice | EllipsisType) -> Tensor:
        if isinstance(rows, EllipsisType):
            return self._join(list(self.pieces()))
        first, last, _ = rows.indices(self.shape[0])
        found = []
        for start, file in self.parts:
            part = file.get_slice(self.name)
            begin, end = max(first - start, 0), min(last - start, part.get_shape()[0])
            if begin < end:
                found.append(part[begin:end])
        return self._join(found) if found else file.get_slice(self.name)[0:0]

    def pieces(self) -> Iterator[Tensor]:
        """Its rows in order, one file's at a time."""
        return (file.get_tensor(self.name) for _, file in self.parts)

    @staticmethod
    def _join(parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[dict[str, Stored]]:
    """The tensors of the file `path`, or of the files in its place, by name.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    files = tensor_files(path)
    if not files:
        raise UserError(f"no weights at '{path}', not all parts of a sharded run's, or both; take another checkpoint")
    with contextlib.ExitStack() as stack:
        found: dict[str, Stored] = {}
        try:
            for file in files:
                check_regular(file, "memory")
                opened = stack.enter_context(safe_open(file, framework="pt"))
                starts = json.loads((opened.metadata() or {}).get(_INFO, "null"))
                for name in opened.keys():  # noqa: SIM118
                    start = 0 if starts is None else int((starts[name][_OFFSETS] or [0])[0])
                    found.setdefault(name, Stored(name)).add(start, opened)
            for stored in found.values():
                stored.check()
        except SafetensorError as error:
            raise UserError(f"{file} is not a whole safetensors file ({error})") from None
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error})") from None
        yield found


def join_rows(tensors: Mapping[str, Stored], target: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors into the one file `target`, with a single part of one in memory at a time.

    The file is what `safetensors.torch.save_file` makes of the whole tensors: large items first, then by name.
    """
    with target.open("wb") as file:
        items = {name: next(stored.pieces()).element_size() for name, stored in tensors.items()}
        names, end = sorted(tensors, key=lambda name: (-items[name], name)), 0
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        for name in names:
            stored, start = tensors[name], end
            end += math.prod(stored.shape) * items[name]
            header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for part in tensors[name].pieces():
                file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
