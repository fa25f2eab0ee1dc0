"""Where the shards of a set are read.

Shards on a disk are looked through when the set is opened. Those of a web server are loaded whole, one by one as they
are needed, into a cache of a bounded number; how many samples each has is in the set's index, or is counted once.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dic_repa.data.files import stamp
from dic_repa.data.shard_lists import find_shards
from dic_repa.data.tar_shards import COLUMNS, LABEL, kinds, read_table
from dic_repa.errors import UserError
from dic_repa.files.atomic import write_aside
from dic_repa.files.cache import cache_folder
from dic_repa.files.hashing import fingerprint
from dic_repa.files.lock import locked_output
from dic_repa.files.npz import read_array
from dic_repa.files.reading import check_regular, parse_json
from dic_repa.files.remote import download
from dic_repa.runtime.progress import progress_bar

TABLES = 1000  # of shards that a process keeps in memory: 56 KB for 1000 samples
OPEN_FILES = 200

T = TypeVar("T")


class ShardStore:
    """The shards at `path`, which `find_shards` describes.

    Attributes: `counts`, the samples of each shard; `labels`, the class numbers of all samples, int32 (-1 without),
    and `highest`, the highest of them, or None where only the index was read.

    Args:
        keep: how many shards of a web server are kept on the disk.
    """

    def __init__(self, path: str, keep: int):
        self.shards, self.keep = find_shards(path), keep
        self.tables: dict[int, np.ndarray] = {}
        self.files: dict[int, Any] = {}
        self.labels: np.ndarray | None = None
        self.highest: int | None = None
        if self.shards.remote and None not in self.shards.counts:
            self.counts = np.array(self.shards.counts)
        elif not (self.shards.remote and self._counted_before()):
            self._look_through()

    def table(self, shard: int) -> np.ndarray:
        """`read_table` of a shard, which is made once and kept in the user's cache folder."""
        return _kept(self.tables, shard, TABLES, self._table)

    def read(self, shard: int, start: int, size: int) -> bytes:
        """Bytes of a shard; a UserError if it ends before them."""
        file = _kept(self.files, shard, OPEN_FILES, lambda k: self.file(k).open("rb", buffering=0))
        content = os.pread(file.fileno(), size, start)  # by position, since forked loader processes share the file
        if len(content) < size:
            raise UserError(f"{self.shards.place(shard)} has been cut short since it was opened; copy or make it again")
        return content

    def file(self, shard: int) -> Path:
        """The shard's file; one of a web server is loaded first, if it is not there."""
        if not self.shards.remote:
            return Path(self.shards.place(shard))
        file = self.folder / self.shards.names[shard]
        if not file.is_file():
            with locked_output(file, wait=True, tell=False):  # one of the loader processes loads it for all
                if not file.is_file():
                    download(self.shards.place(shard), file, self.shards.sizes[shard])
                    self._remove_oldest(file)
        with contextlib.suppress(OSError):  # when it was last used
            os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))
        return file

    @cached_property
    def folder(self) -> Path:
        """Where shards of a web server are kept: in $DIC_REPA_SHARDS, or the user's cache folder."""
        return cache_folder("shards", "DIC_REPA_SHARDS") / fingerprint(self.shards.base)

    def fingerprint(self) -> str:
        """A text that changes with any shard; of a web server's, with their names, sizes and counts."""
        if not self.shards.remote:
            return stamp(Path(self.shards.place(k)) for k in range(len(self.counts)))
        return fingerprint(json.dumps([self.shards.base, self.shards.names, self.shards.sizes, self.counts.tolist()]))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"files": {}, "tables": {}}  # for loader processes that are spawned

    def _look_through(self) -> None:
        count = len(self.shards.names)
        bar = progress_bar(range(count), desc="looking through the shards", unit="shard", delay=2)
        labels = [self.table(shard)[:, LABEL].astype(np.int32) for shard in bar]
        self.counts, self.labels = np.array([len(part) for part in labels]), np.concatenate(labels)
        self.highest = int(self.labels.max())
        if self.shards.remote:
            counts = dict(zip(self.shards.names, self.counts.tolist()))
            text = json.dumps({"counts": counts, "highest": self.highest})
            _keep(self._counts_file, lambda aside: aside.write_text(text))

    @property
    def _counts_file(self) -> Path:
        return self.folder / f"{fingerprint(json.dumps(self.shards.names))}.json"

    def _counted_before(self) -> bool:
        try:
            known = parse_json(self._counts_file.read_bytes())
            self.counts = np.array([int(known["counts"][name]) for name in self.shards.names])
            self.highest = int(known["highest"])
        except (OSError, ValueError, KeyError, TypeError):  # it is not there, or damaged
            return False
        self.shards.counts = self.counts.tolist()  # if a shard has changed since, that is found
        return True

    def _table(self, shard: int) -> np.ndarray:
        file, expected = self.file(shard), self.shards.counts[shard]
        try:
            check_regular(file)
            size, promised = file.stat().st_size, self.shards.sizes[shard]
            if promised not in (None, size):
                raise UserError(f"{file} has {size:,} bytes instead of the {promised:,} of its index; copy it again")
            kept = cache_folder("shard-tables") / f"{fingerprint(str(file.resolve()), stamp([file]))}.npy"
            table = _read_kept(kept, size)
            if table is None:
                table = read_table(file)
                _keep(kept, lambda aside: _save(aside, table))
            if not len(table):
                raise UserError(f"{file} holds no samples; remove it, or make it again")
            if expected not in (None, len(table)):
                raise UserError(f"{file} holds {len(table)} samples instead of {expected}; copy it again")
            if shard and (kind := kinds(table)) != (first := kinds(self.table(0))):
                raise UserError(f"{file}: its samples have {kind}, and those of the first shard {first}; make it again")
        except FileNotFoundError:
            raise UserError(f"there is no shard {file}; restore it, or correct data.path") from None
        except UserError as error:
            if not self.shards.remote:
                raise
            file.unlink(missing_ok=True)  # the next try loads it again
            raise UserError(f"{self.shards.place(shard)} is not as it should be: {error}") from None
        return table

    def _remove_oldest(self, new: Path) -> None:
        """Keep the `keep` shards that were used last; a process that reads a removed one has it open."""
        used = []
        for file in (self.folder / name for name in self.shards.names):
            with contextlib.suppress(OSError):
                used.append((file.stat().st_atime_ns, file))
        for _, file in sorted(used)[: -self.keep]:
            if file != new:
                file.unlink(missing_ok=True)


def _kept(store: dict[int, T], key: int, most: int, make: Callable[[int], T]) -> T:
    """`make(key)`, or what it gave before; the `most` that were used last are kept."""
    value = store.pop(key) if key in store else make(key)
    store[key] = value
    if len(store) > most:
        del store[next(iter(store))]
    return value


def _keep(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file of the cache, unless there is no room or it cannot be written: it can be made again."""
    with contextlib.suppress(OSError), locked_output(file, wait=True, tell=False):
        file.unlink(missing_ok=True)
        with write_aside(file) as aside:
            write(aside)


def _save(file: Path, table: np.ndarray) -> None:
    with file.open("wb") as stream:
        np.save(stream, table, allow_pickle=False)


def _read_kept(file: Path, size: int) -> np.ndarray | None:
    """A table of the cache, for a shard of `size` bytes; None if there is none, or it cannot be of this shard."""
    try:
        with file.open("rb") as stream:
            table = read_array(stream, file.stat().st_size, str(file))
    except (OSError, ValueError):
        return None
    fits = table.ndim == 2 and len(table) and table.shape[1] == COLUMNS and table.dtype == np.int64
    return table if fits and table.min() >= -1 and table[:, 1:].max() <= size else None
