"""Which shards a set in WebDataset's format has: from a folder, a pattern of names, or an index.

An `index.json` beside the shards is in the form of the package wids: {"shardlist": [{"url": "data-000.tar", "nsamples":
1000, "filesize": 50000000}, ...]}. That of `dic-repa prepare` also has `prepared`, the content of prepare.json.
"""

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dic_repa.errors import UserError, first_line
from dic_repa.files.reading import parse_json, read_file
from dic_repa.files.remote import is_url, read_url
from dic_repa.limits import check_limit

INDEX = "index.json"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass
class ShardList:
    """Shards by their `names` relative to `base`, a folder or an http(s) address; what is not known of one is None."""

    base: str
    names: list[str]
    counts: list[int | None]  # of samples
    sizes: list[int | None]  # in bytes
    prepared: dict[str, Any] | None = None  # what `dic-repa prepare` says of all

    @property
    def remote(self) -> bool:
        return is_url(self.base)

    def place(self, shard: int) -> str:
        return f"{self.base}/{self.names[shard]}"


def find_shards(path: str) -> ShardList:
    """The shards at `path`: a folder of .tar files, one .tar, a pattern such as shards/{000..127}.tar, an index in
    JSON; or the http(s) address of one of these, where a folder needs an index.json.

    Raises:
        UserError: there are none, the index is damaged, or the server cannot be reached.
    """
    if "://" in path and not is_url(path):
        raise UserError(f"{path}: shards are read from a disk or by http(s); mount them, or give such an address")
    if path.endswith(".tar"):
        base = path.partition("{")[0].rpartition("/")[0] if "/" in path.partition("{")[0] else "."
        names = _expand(path.removeprefix(f"{base}/"))
        known = _indexed(base, _read_index(f"{base}/{INDEX}"))
        if known and {*names} <= {*known.names}:
            place = {name: k for k, name in enumerate(known.names)}
            counts, sizes = ([each[place[name]] for name in names] for each in (known.counts, known.sizes))
            return ShardList(base, names, counts, sizes, known.prepared)
        return ShardList(base, names, [None] * len(names), [None] * len(names))
    if path.endswith(".json"):
        if known := _indexed(path.rpartition("/")[0] if "/" in path else ".", _read_index(path)):
            return known
        raise UserError(f"there is no index {path}; correct data.path")
    base = path.rstrip("/")
    if known := _indexed(base, _read_index(f"{base}/{INDEX}")):
        return known
    example = f"{base}/{{000..127}}.tar"
    if is_url(path):
        raise UserError(f"{base} has no {INDEX}, without which its shards are not known; name them, as in {example}")
    names = sorted(file.name for file in Path(base).glob("*.tar"))
    if not names:
        raise UserError(f"{base} is no folder with .tar files; name one, or the shards, as in {example}")
    return ShardList(base, names, [None] * len(names), [None] * len(names))


def index_of(names: list[str], counts: list[int], sizes: list[int], prepared: dict[str, Any]) -> dict[str, Any]:
    """The content of index.json, which the package wids reads too."""
    shards = [{"url": n, "nsamples": count, "filesize": size} for n, count, size in zip(names, counts, sizes)]
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards, "prepared": prepared}


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)

    url: str
    nsamples: int = Field(ge=1)
    filesize: int | None = None


class _Index(BaseModel):
    model_config = ConfigDict(strict=True)

    shardlist: list[_Entry] = Field(min_length=1)
    prepared: dict[str, Any] | None = None


def _read_index(place: str) -> _Index | None:
    """The index at `place`, a file or an address; None if there is none."""
    if not is_url(place) and not Path(place).exists():
        return None
    text = read_url(place) if is_url(place) else read_file(place, "record-bytes")
    if text is None:
        return None
    try:
        index = _Index.model_validate(parse_json(text))
        names = [PurePosixPath(entry.url) for entry in index.shardlist]
        if len({*names}) < len(names) or any(name.is_absolute() or ".." in name.parts for name in names):
            raise ValueError("its shards are not beside it, or twice in it")
        if any("://" in entry.url for entry in index.shardlist):
            raise ValueError("its shards are somewhere else")
    except ValueError as error:  # pydantic's too
        raise UserError(f"{place} is no index of shards ({first_line(error)}); correct or remove it") from None
    check_limit("shards", len(names), f"the number of shards of {place}")
    return index


def _indexed(base: str, index: _Index | None) -> ShardList | None:
    if index is None:
        return None
    names, counts, sizes = zip(*((entry.url, entry.nsamples, entry.filesize) for entry in index.shardlist))
    return ShardList(base, list(names), list(counts), list(sizes), index.prepared)


def _expand(pattern: str) -> list[str]:
    """The names of a pattern with ranges, {000..127}, in which leading zeros count."""
    pieces = _RANGE.split(pattern)  # text, first, last, text, first, last, ..., text
    if any("{" in text or "}" in text for text in pieces[::3]):
        raise UserError(f"the pattern {pattern} has braces that are no range such as {{000..127}}; correct data.path")
    ranges = [(first, int(last) + 1 - int(first), int(first)) for first, last in zip(pieces[1::3], pieces[2::3])]
    if any(count < 1 for _, count, _ in ranges):
        raise UserError(f"the pattern {pattern} names no shard: its ranges go from the lower number to the higher")
    check_limit("shards", math.prod(count for _, count, _ in ranges), f"the number of shards of {pattern}")
    if any(".." in PurePosixPath(text).parts for text in pieces[::3]):  # shards of a server are kept under these names
        raise UserError(f"the pattern {pattern} leads upwards; write out where the shards are")
    choices = [[pieces[0]]]
    for (text, count, first), following in zip(ranges, pieces[3::3]):
        width = len(text) if text.startswith("0") else 0
        choices += [[f"{k:0{width}d}" for k in range(first, first + count)], [following]]
    return ["".join(parts) for parts in itertools.product(*choices)]
