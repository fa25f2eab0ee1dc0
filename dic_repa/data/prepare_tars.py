"""`dic-repa prepare --format webdataset`: the same preparation into tar shards, for data sets that do not fit a disk.

Beside the shards lies `index.json`: how many samples each has, and all that training needs to know of them. The images
are mixed, once for all, so that those of a few shards are of many classes.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from dic_repa.data.autoencoders import LatentStatistics
from dic_repa.data.latents import LatentDataset
from dic_repa.data.look_back import CHECK_FILE
from dic_repa.data.prepare import Preparation
from dic_repa.data.prepared import read_settings
from dic_repa.data.shard_lists import INDEX, index_of
from dic_repa.data.statistics import Sums
from dic_repa.data.tar_shards import ABOUT, read_rows, read_table, write_shard
from dic_repa.data.webdataset import WebDataset
from dic_repa.errors import UserError
from dic_repa.runtime.progress import progress_bar

MEASURED = 64  # images whose latents are in memory at once


@dataclass
class TarPreparation(Preparation):
    """As `Preparation`, with tar shards that WebDataset reads."""

    layout: ClassVar[str] = "webdataset"
    results: ClassVar[tuple[str, ...]] = (INDEX, CHECK_FILE)

    @cached_property
    def _shards(self) -> dict[str, Sequence[int]]:
        order = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(0)).tolist()
        names = [name.replace(".arrow", ".tar") for name in super()._shards]
        return {name: order[k * self.shard_size : (k + 1) * self.shard_size] for k, name in enumerate(names)}

    def _write_shard(self, name: str, rows: Iterable[dict]) -> None:
        first = list(self._shards).index(name) * self.shard_size
        with self._aside(name) as aside:
            write_shard(aside, rows, first, self.image_format, bool(self.source.class_names))

    def _join(self) -> None:
        """Write the index, first without the latents' statistics, which are measured with its help."""
        places = {name: self.destination / name for name in self._shards}
        counts = {name: len(read_table(place)) for name, place in places.items()}
        names = [name for name, count in counts.items() if count]  # of a shard, all images may be damaged
        if not names:
            return
        sizes = [places[name].stat().st_size for name in names]
        prepared, known = read_settings(self.destination), [counts[name] for name in names]
        self._write_json(INDEX, index_of(names, known, sizes, prepared))
        if self.autoencoder.spec.name != "none":
            statistics = asdict(_measure(WebDataset(self.destination)))
            self._write_json(INDEX, index_of(names, known, sizes, prepared | {"statistics": statistics}))

    def _lacks_statistics(self) -> bool:
        try:
            return self.autoencoder.spec.name != "none" and not WebDataset(self.destination).statistics
        except UserError:
            return True

    def _read_back(self) -> tuple[LatentDataset, dict[str, list]]:
        rows = [row for name in self._shards for row in read_rows(self.destination / name)]
        if not rows:
            raise UserError(f"not one image of {self.source.path} was whole")
        data = WebDataset(self.destination, flip=False)
        return data, {key: [row[key] for row in rows] for key in ("label", *ABOUT)}


def _measure(data: WebDataset) -> LatentStatistics:
    """The latents' statistics, of mirrored images too."""
    data.with_images = False
    total, indices = None, iter(progress_bar(range(len(data)), desc="measuring latents", unit="image", delay=1))
    while chosen := list(itertools.islice(indices, MEASURED)):
        sums = Sums.of(np.stack([data[index]["moments"].numpy() for index in chosen]), data.spec)
        total = sums if total is None else total + sums
    assert total is not None
    return total.statistics(data.path)
