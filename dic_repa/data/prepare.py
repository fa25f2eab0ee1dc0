"""Prepare a data set once: crop, encode, and write shards that training reads.

`datasets.load_from_disk` opens the result. Its columns are `image` (a WebP, PNG or JPEG file), `moments` (mean and
standard deviation, float16 or float32), `moments_flipped` (of the mirrored image, on request), `label`, `name`, `width`
and `height` (of the original), and `crc32`, the row's checksums. `prepare.json` says how it was made, `latents.json`
has each channel's mean and deviation. Shard k holds `shard_size` images, from image k * shard_size on, for any number
of processes, machines or interruptions.
"""

import contextlib
import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from dic_repa.data.autoencoders import AutoencoderSpec
from dic_repa.data.images import BadImage, center_crop, encode_file, to_levels
from dic_repa.data.latents import LatentDataset
from dic_repa.data.look_back import CHECK_FILE, PREVIEW_FILE, look_back
from dic_repa.data.prepared import CHECKSUMS, SETTINGS_FILE, Prepared, checksums, read_settings
from dic_repa.data.sources import ImageSource
from dic_repa.data.statistics import STATISTICS_FILE, measure_statistics, write_statistics
from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.claims import ClaimLost, Claims, clear_claims
from dic_repa.files.outputs import begin_folder, check_folder, remove_leftovers
from dic_repa.files.pictures import unit_images
from dic_repa.protocols import Autoencoder
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.runtime.progress import progress_bar
from dic_repa.runtime.threads import ahead

A = TypeVar("A")
FORMAT = 2  # 1 is that of earlier versions, without checksums


@dataclass
class Preparation:
    """Prepares a `source` into the folder `destination`: one process calls `begin`, then all call `write_shards`, then
    one calls `complete`.

    With `claims`, other commands may do the same at the same time, and each shard is written by the one that claims it.
    """

    source: ImageSource
    destination: Path
    autoencoder: Autoencoder
    size: int = 256  # of the crop, in pixels
    flip: bool = False  # store the moments of the mirrored images too
    image_format: str = "webp"
    moments: str = "float16"  # or float32, as REPA has them
    shard_size: int = 1000  # images
    batch_size: int = 32  # images encoded at once
    skip_bad: bool = False
    workers: int = 8  # threads that read and crop
    claims: Claims | None = None
    layout: ClassVar[str] = "arrow"
    results: ClassVar[tuple[str, ...]] = (STATISTICS_FILE, CHECK_FILE)  # what is made of all shards together

    def begin(self) -> None:
        """Make the destination, or check that it was begun with the same settings.

        Raises:
            UserError: the destination holds something else.
        """
        spec, wanted, place = self.autoencoder.spec, self._settings(), self.destination
        only = getattr(self.autoencoder, "image_size", self.size)
        if self.size != only:
            raise UserError(f"--size {self.size}: {spec.name} takes images of {only}x{only} alone; take --size {only}")
        if self.size % spec.downsample:
            raise UserError(f"--size {self.size} is not a multiple of {spec.downsample}, the autoencoder's reduction")
        with self._alone(SETTINGS_FILE):
            if check_folder(place, "prepared") and (place / SETTINGS_FILE).is_file():
                self._go_on(wanted)
                return
            # All names at once, since the processes that will write them may be on several machines.
            others = ("dataset_info.json", "state.json", STATISTICS_FILE, CHECK_FILE, PREVIEW_FILE)
            begin_folder(place, "prepared", [SETTINGS_FILE, *self._shards, *others])
            self._write_json(SETTINGS_FILE, wanted)

    def _go_on(self, wanted: dict) -> None:
        """Check that the destination was begun with the `wanted` settings, and remove what is not whole."""
        place = self.destination
        if self.claims is None:
            clear_claims(place)
            remove_leftovers(place)
        found, wanted = {"moments": "float16", "layout": "arrow"} | read_settings(place), json.loads(json.dumps(wanted))
        found["format"] = FORMAT if found.get("format") == 1 else found.get("format")  # goes on without checksums
        found["autoencoder"] = AutoencoderSpec.from_dict(found["autoencoder"]).to_dict()  # with what is new in it
        found = json.loads(json.dumps(found))
        for settings in (found, wanted):  # images and weights may move between two calls, but not change
            settings["source"].pop("path", None)
            settings["autoencoder"].pop("name", None)
        if differs := [key for key in wanted if wanted[key] != found.get(key)]:
            raise UserError(f"{place} was begun with another {', '.join(differs)}; choose another folder")
        if self._missing():
            for name in self.results:  # of other shards than those that will be there
                (place / name).unlink(missing_ok=True)

    def write_shards(self, process: int = 0, processes: int = 1) -> None:
        """Write the shards of this process that are still missing; a shard is whole or not there. With `claims`, all
        that no other command has, until none is missing.

        Raises:
            UserError: a damaged image (unless skip_bad), or a full disk.
        """
        # Split before finished ones are left out, so that processes that look at different times share no shard.
        mine = self._shards if self.claims else list(self._shards)[process::processes]
        todo = {name: rows for name, rows in self._missing().items() if name in mine}
        label = "encoding" if processes == 1 else f"encoding (process 1 of {processes})"
        hidden = process > 0 or not todo
        with (
            contextlib.closing(
                self.claims.each(self._missing) if self.claims else (each for each in todo.items())
            ) as shards,
            progress_bar(total=sum(map(len, todo.values())), desc=label, unit="image", disable=hidden) as bar,
            ThreadPoolExecutor(self.workers) as pool,
        ):
            for name, rows in shards:
                if self.claims:  # others may have written some
                    bar.total = bar.n + sum(map(len, self._missing().values()))
                with contextlib.suppress(ClaimLost):
                    loaded = ahead(pool, self._load, rows, 3 * self.batch_size)
                    self._write_shard(name, self._encoded(_counted(loaded, bar)))
            bar.total = bar.n

    def _write_shard(self, name: str, rows: Iterable[dict]) -> None:
        """Write one shard: it is whole or not there."""
        from datasets.arrow_writer import ArrowWriter

        with (
            self._aside(name) as aside,
            ArrowWriter(features=self._features(), path=str(aside), writer_batch_size=100) as writer,
        ):
            for row in rows:
                writer.write(row | ({CHECKSUMS: checksums(row)} if self._checked else {}))
            writer.finalize()

    @contextlib.contextmanager
    def _aside(self, name: str) -> Iterator[Path]:
        """Where a shard is written until it is whole; a `ClaimLost` if another command writes it by then."""
        with _whole_or_not(self.destination / name, self.claims.token if self.claims else "") as aside:
            yield aside
            if self.claims:
                self.claims.check(name)

    def _alone(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Where commands share the work, one of them at a time writes the file `name`."""
        return self.claims.hold(name) if self.claims else contextlib.nullcontext()

    def complete(self) -> dict | None:
        """`finish` and `check`, whose report this is; None if another command that shares the work has done it."""
        with self._alone(CHECK_FILE):
            if self.claims and (self.destination / CHECK_FILE).is_file() and not self._lacks_statistics():
                return None
            self.finish()
            if self.claims:
                self.claims.sweep(self._shards)
            return self.check()

    def finish(self) -> None:
        """Make one data set of the shards, with the small files that `datasets.load_from_disk` reads and the latents'
        statistics."""
        if missing := self._missing():
            count = f"{len(missing)} of {len(self._shards)}"
            raise UserError(f"{self.destination} still lacks {count} shards; run the same command again")
        self._join()

    def _join(self) -> None:
        self._write_json("dataset_info.json", {"features": self._features().to_dict()})
        state = {"_data_files": [{"filename": name} for name in self._shards], "_split": "train"}
        formats: dict = {"_format_columns": None, "_format_kwargs": {}, "_format_type": None}
        formats["_output_all_columns"] = False
        self._write_json("state.json", state | {"_fingerprint": self.source.fingerprint()} | formats)
        if self._lacks_statistics():
            data = Prepared(self.destination)
            write_statistics(data, measure_statistics(data, self.workers))

    def _lacks_statistics(self) -> bool:
        """Whether there are latents, and no statistics that fit to them."""
        data = Prepared(self.destination)
        try:
            return data.spec.name != "none" and len(data) > 0 and not data.statistics
        except UserError:
            return True

    def check(self) -> dict:
        """Look back at what was written: preview.png, and check.json, whose content is returned."""
        report = look_back(*self._read_back(), self.destination, self.source, self.autoencoder, self.size)
        self._write_json(CHECK_FILE, report)
        return report

    def _read_back(self) -> tuple[LatentDataset, dict[str, list]]:
        """What was written, as training reads it, and the label, name, width and height of all rows."""
        import datasets

        rows = datasets.load_from_disk(str(self.destination)).select_columns(["label", "name", "width", "height"])
        return Prepared(self.destination, flip=False), rows.with_format("arrow")[:].to_pydict()

    def _missing(self) -> dict[str, Sequence[int]]:
        """The shards that are not there yet, and the indices of their images."""
        there = set(os.listdir(self.destination))
        return {name: rows for name, rows in self._shards.items() if name not in there}

    @cached_property
    def _shards(self) -> dict[str, Sequence[int]]:
        """The file name of each shard, and the indices of its images."""
        every, starts = range(len(self.source)), range(0, len(self.source), self.shard_size)
        return {
            f"data-{k:05d}-of-{len(starts):05d}.arrow": every[start : start + self.shard_size]
            for k, start in enumerate(starts)
        }

    @cached_property
    def _checked(self) -> bool:
        """Whether rows have checksums; the shards of an earlier version have none, and all shards are alike."""
        return read_settings(self.destination).get("format") != 1

    def _settings(self) -> dict:
        """What determines the prepared data; not `skip_bad`, which may be added later."""
        source = self.source
        return {
            "format": FORMAT,
            "layout": self.layout,
            "source": {"path": str(source.path), "images": len(source), "fingerprint": source.fingerprint()},
            **{key: getattr(self, key) for key in ("size", "flip", "image_format", "moments", "shard_size")},
            "autoencoder": self.autoencoder.spec.to_dict(),
            "class_names": list(source.class_names),
        }

    def _write_json(self, name: str, content: dict) -> None:
        with _whole_or_not(self.destination / name) as aside:
            aside.write_text(json.dumps(content, indent=2) + "\n")

    def _features(self):
        from datasets import Array3D, ClassLabel, Features, Image, Value

        spec, names = self.autoencoder.spec, self.source.class_names
        side, columns = self.size // spec.downsample, {}
        if spec.name != "none":  # the pixels' moments would be the image again
            moments = ["moments", "moments_flipped"] if self.flip else ["moments"]
            columns = {name: Array3D((spec.moments, side, side), self.moments) for name in moments}
        label = ClassLabel(names=list(names)) if names else Value("int64")
        sides = {"width": Value("int32"), "height": Value("int32")}
        checked = {CHECKSUMS: Value("binary")} if self._checked else {}
        return Features({"image": Image(), **columns, "label": label, "name": Value("string"), **sides, **checked})

    def _load(self, index: int) -> tuple[dict, Tensor] | None:
        """The row of an image, without moments, and the cropped image; None if it is left out."""
        try:
            image = self.source.load(index)
            cropped = center_crop(image, self.size, self.source.names[index])
        except BadImage as error:
            if self.skip_bad:
                return None
            raise BadImage(f"{error}, or pass --skip-bad") from None
        row = {
            "image": {"bytes": encode_file(cropped, self.image_format), "path": None},
            "label": int(self.source.labels[index]),
            "name": self.source.names[index],
            "width": image.width,
            "height": image.height,
        }
        return row, to_levels(cropped)

    def _encoded(self, loaded: Iterator[tuple[dict, Tensor] | None]) -> Iterator[dict]:
        """The rows of what is loaded, with moments."""
        whole = (item for item in loaded if item is not None)
        while batch := list(itertools.islice(whole, self.batch_size)):
            if self.autoencoder.spec.name == "none":
                yield from (row for row, _ in batch)
                continue
            images = unit_images(torch.stack([image for _, image in batch]))
            moments = {"moments": self._moments(images)}
            if self.flip:
                moments["moments_flipped"] = self._moments(images.flip(-1))
            for k, (row, _) in enumerate(batch):
                yield row | {name: values[k] for name, values in moments.items()}

    def _moments(self, images: Tensor) -> np.ndarray:
        try:
            with gpu_arithmetic(tf32=False):
                moments = self.autoencoder.encode(images.to(self.autoencoder.device)).to(getattr(torch, self.moments))
        except torch.OutOfMemoryError as error:
            raise UserError(f"the GPU's memory is full ({first_line(error)}); lower --batch-size") from None
        if not moments.isfinite().all():
            hint = "store them with --moments float32" if self.moments == "float16" else "it cannot be used"
            raise UserError(f"{self.autoencoder.spec.name} gives moments beyond {self.moments}'s range; {hint}")
        return moments.cpu().numpy()


def _counted(items: Iterable[A], bar) -> Iterator[A]:
    for item in items:
        bar.update()
        yield item


@contextlib.contextmanager
def _whole_or_not(path: Path, token: str = "") -> Iterator[Path]:
    """`write_aside`, with the free space in the message of an error."""
    try:
        with write_aside(path, token=token) as aside:
            yield aside
    except OSError as error:
        free = shutil.disk_usage(path.parent).free / 1e9
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        why, then = (f"{error}; {free:.1f} GB free", "make room and ") if full else (str(error), "")
        raise UserError(f"{path} could not be written ({why}); {then}run the same command again") from None
