"""Data sets of `datasets` that are not on a disk: read as a stream, in an order that (seed, step) decides.

The order is that of `datasets`: files in random order, then a buffer from which samples are drawn. It is the same for
any number of processes and loader processes, each of which reads the whole stream and decodes its own samples. But a
stream has no places: a run that is resumed reads over what it has seen in its epoch. Tar shards (`webdataset`) have
places, and need not.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dic_repa.data.autoencoders import load_spec
from dic_repa.data.images import center_crop, decode_image, to_levels
from dic_repa.data.latents import LatentDataset
from dic_repa.data.registry import register_dataset
from dic_repa.data.sources import only_column
from dic_repa.errors import UserError, first_line
from dic_repa.files.hub import pin
from dic_repa.limits import check_limit
from dic_repa.runtime.progress import progress_bar, say

BUFFER = 1000
_TAKEN = 16  # rows that are taken at once


@register_dataset("stream")
class Stream(LatentDataset):
    """Images of a Hugging Face data set that are read as they are needed: dicts of `image` (3, H, W), uint8, and
    `label`, from `stream` alone. By index there is only sample 0, for its shape.

    Args:
        path: 'ID[:SPLIT]' on the hub, or a folder of parquet files.
        size: height and width of the denoiser's data; images are larger by the autoencoder's reduction.
        autoencoder: 'none' for pixels, a hub id or a local folder.
        samples: how many there are; by default what the data set says, or else they are counted.
        buffer: images among which the next is drawn; they are in memory, as files.
        unlabelled: no image has a class.
    """

    def __init__(
        self,
        path: str,
        size: int,
        split: str = "train",
        autoencoder: str = "none",
        samples: int | None = None,
        buffer: int = BUFFER,
        unlabelled: bool = False,
    ):
        import datasets

        check_limit("images", buffer, "data.options.buffer")
        if buffer < 1 or (samples is not None and samples < 1):
            raise UserError("data.options.buffer and data.options.samples are at least 1")
        self.path, self.size, self.spec, self.buffer = str(path), size, load_spec(autoencoder), buffer
        name, _, part = (self.path, "", "") if Path(path).exists() else self.path.partition(":")
        place, commit = (name, None) if Path(name).exists() else pin(name, "dataset")
        chosen = part or split
        try:
            rows = datasets.load_dataset(
                place, split=chosen, streaming=True, **({"revision": commit} if commit else {})
            )
        except Exception as error:  # anything from ConnectionError to DatasetNotFoundError and ValueError
            raise UserError(
                f"the data set {path} cannot be streamed ({first_line(error)}); correct data.path, or try again later"
            ) from None
        if not rows.features:
            raise UserError(f"{path} does not say what its columns are; read its tar shards as data.name=webdataset")
        self.image = only_column(rows, datasets.Image, "image", self.path)
        self.label = None if unlabelled else only_column(rows, datasets.ClassLabel, "label", self.path)
        self.class_names = tuple(rows.features[self.label].names) if self.label else ()
        columns = [self.image, self.label] if self.label else [self.image]
        self.rows = rows.select_columns(columns).cast_column(self.image, datasets.Image(decode=False))
        known = (rows.info.splits or {}).get(chosen)
        self.count = samples or (known.num_examples if known else 0) or self._counted()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index:
            raise UserError(
                f"{self.path} is a stream, whose samples cannot be taken by their number; prepare it with "
                "`dic-repa prepare`, or leave out what needs all of it (an alignment's cache, the data's mean)"
            )
        return self._first

    @cached_property
    def _first(self) -> dict[str, Tensor]:
        return self.decode(next(self._read(self.rows)))

    def stream(self, seed: int, start: int) -> Iterator[Any]:
        """Endless rows for `decode`, epoch after epoch, from place `start` on of the stream that `seed` makes."""
        epoch, over = divmod(start, len(self))
        if over:
            say(f"note: {self.path} is read over the first {over:,} samples of epoch {epoch + 1}, up to where it was")
        while True:
            rows, found = self.rows.shuffle(seed=seed, buffer_size=self.buffer), 0
            rows.set_epoch(epoch)
            for row in self._read(rows):
                found += 1
                if found > over:
                    yield row
            if found != len(self):
                raise UserError(
                    f"{self.path} has {found:,} samples, and not {len(self):,}, by which its epochs are known; set "
                    f"data.options.samples={found} for a new run"
                )
            epoch, over = epoch + 1, 0

    def decode(self, row: dict[str, Any]) -> dict[str, Tensor]:
        """The sample of a row of `stream`."""
        label = row[self.label] if self.label else 0
        if label is None or not 0 <= label < max(1, self.num_classes):
            raise UserError(f"{self.path} has an image of the class {label}; set data.options.unlabelled=true")
        content = (row[self.image] or {}).get("bytes")
        if content is None:
            raise UserError(f"{self.path} has a row without an image; remove it from the data set")
        name = f"an image of {self.path}"
        image = center_crop(decode_image(content, name), self.size * self.spec.downsample, name)
        return {"image": to_levels(image), "label": torch.tensor(label)}

    def _read(self, rows: Any) -> Iterator[dict[str, Any]]:
        # Not by iter(rows), which in a loader process would give its share of the files, in another order.
        try:
            for taken in rows.iter(batch_size=_TAKEN):
                for values in zip(*taken.values()):
                    yield dict(zip(taken, values))
        except Exception as error:  # of the network, of fsspec, of Arrow
            raise UserError(
                f"{self.path} cannot be read on ({first_line(error)}); when it can be, resume the run"
            ) from None

    def _counted(self) -> int:
        """The number of samples of a data set that does not say it, by reading a column of it."""
        column = self.label or self.image
        count = 0
        for _ in progress_bar(self._read(self.rows.select_columns([column])), desc="counting samples", delay=2):
            count += 1
        if not count:
            raise UserError(f"{self.path} holds no samples; correct data.path")
        say(f"note: {self.path} has {count:,} samples; data.options.samples={count} spares counting them")
        return count
