"""Prepare a data set once: crop, encode, write shards that training reads, and look back at them.

`datasets.load_from_disk` opens the result. Its columns are `image` (a WebP, PNG or JPEG file), `moments` (mean and
standard deviation, float16 or float32), `moments_flipped` (of the mirrored image, on request), `label`, `name`, `width`
and `height` (of the original), and `crc32`, the row's checksums. `prepare.json` says how it was made. Shard k holds
`shard_size` images, from image k * shard_size on, for any number of processes or interruptions.
"""

import contextlib
import errno
import itertools
import json
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid

from dic_repa.data.files import by_reason
from dic_repa.data.images import BadImage, center_crop, encode_file, to_levels
from dic_repa.data.prepared import CHECKSUMS, SETTINGS_FILE, Prepared, checksums, read_settings
from dic_repa.data.sources import ImageSource
from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.outputs import begin_folder, check_folder, remove_leftovers
from dic_repa.files.pictures import save_side_by_side, to_pil, unit_images
from dic_repa.protocols import Autoencoder
from dic_repa.runtime.precision import tf32
from dic_repa.runtime.progress import progress_bar

PREVIEW = 64  # images at most
FORMAT = 2  # 1 is that of earlier versions, without checksums
DECODE_BATCH = 16  # images decoded at once: at 256 px these take about 3 GB


@dataclass
class Preparation:
    """Prepares a `source` into the folder `destination`: one process calls `begin`, then all call `write_shards`, then
    one calls `finish` and `check`.
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
        if check_folder(place, "prepared") and (place / SETTINGS_FILE).is_file():
            remove_leftovers(place)
            found, wanted = {"moments": "float16"} | read_settings(place), json.loads(json.dumps(wanted))
            found["format"] = FORMAT if found.get("format") == 1 else found.get("format")  # goes on without checksums
            for settings in (found, wanted):  # images and weights may move between two calls, but not change
                settings["source"].pop("path", None)
                settings["autoencoder"].pop("name", None)
            if differs := [key for key in wanted if wanted[key] != found.get(key)]:
                raise UserError(f"{place} was begun with another {', '.join(differs)}; choose another folder")
            return
        # All names at once, since the processes that will write them may be on several machines.
        others = ("dataset_info.json", "state.json", "check.json", "preview.png")
        begin_folder(place, "prepared", [SETTINGS_FILE, *self._shards, *others])
        self._write_json(SETTINGS_FILE, wanted)

    def write_shards(self, process: int = 0, processes: int = 1) -> None:
        """Write the shards of this process that are still missing; a shard is whole or not there.

        Raises:
            UserError: a damaged image (unless skip_bad), or a full disk.
        """
        # Split before finished ones are left out, so that processes that look at different times share no shard.
        mine = list(self._shards.items())[process::processes]
        todo = [(name, rows) for name, rows in mine if not (self.destination / name).is_file()]
        total = sum(len(rows) for _, rows in todo)
        label = "encoding" if processes == 1 else f"encoding (process 1 of {processes})"
        with (
            progress_bar(total=total, desc=label, unit="image", disable=process > 0 or not total) as bar,
            ThreadPoolExecutor(self.workers) as pool,
        ):
            for name, rows in todo:
                self._write_shard(name, self._encoded(_ahead(pool, self._load, rows, 3 * self.batch_size, bar)))

    def _write_shard(self, name: str, rows: Iterable[dict]) -> None:
        """Write one shard: it is whole or not there."""
        from datasets.arrow_writer import ArrowWriter

        with (
            _whole_or_not(self.destination / name) as aside,
            ArrowWriter(features=self._features(), path=str(aside), writer_batch_size=100) as writer,
        ):
            for row in rows:
                writer.write(row | ({CHECKSUMS: checksums(row)} if self._checked else {}))
            writer.finalize()

    def finish(self) -> None:
        """Make one data set of the shards, with the two small files that `datasets.load_from_disk` reads."""
        if missing := [name for name in self._shards if not (self.destination / name).is_file()]:
            count = f"{len(missing)} of {len(self._shards)}"
            raise UserError(f"{self.destination} still lacks {count} shards; run the same command again")
        self._write_json("dataset_info.json", {"features": self._features().to_dict()})
        state = {"_data_files": [{"filename": name} for name in self._shards], "_split": "train"}
        formats: dict = {
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
        }
        self._write_json("state.json", state | {"_fingerprint": self.source.fingerprint()} | formats)

    def check(self) -> dict:
        """Read all labels back, decode up to 64 images, and write preview.png and check.json, whose content it returns.

        The smallest and largest class are None without classes, `psnr` (dB) without an autoencoder.
        """
        import datasets

        data = Prepared(self.destination, flip=False)
        rows = datasets.load_from_disk(str(self.destination)).select_columns(["label", "name", "width", "height"])
        table = rows.with_format("arrow")[:].to_pydict()
        counts, stored = Counter(table["label"]), set(table["name"])
        by_size = sorted((counts[k], k) for k in range(data.num_classes))
        classes = [(data.class_names[k], count) for count, k in by_size]
        damaged = [name for name in self.source.names if name not in stored]
        left_out = by_reason(self.source.rejected | dict.fromkeys(damaged, "no whole image"))
        preview = self.destination / "preview.png"
        report = {
            "images": len(data),
            "expected": len(self.source),
            "classes": len(classes),
            "smallest_class": classes[0] if classes else None,
            "largest_class": classes[-1] if classes else None,
            "empty_classes": [name for name, count in classes if count == 0],
            "skipped": sorted(itertools.chain(*left_out.values())),
            "reasons": left_out,
            "notes": list(self.source.notes),
            "enlarged": sum(min(sides) < self.size for sides in zip(table["width"], table["height"])),
            "psnr": self._preview(data, preview) if len(data) else None,
            "preview": str(preview),
        }
        self._write_json("check.json", report)
        return report

    @cached_property
    def _shards(self) -> dict[str, range]:
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
            with tf32(False):
                moments = self.autoencoder.encode(images.to(self.autoencoder.device)).to(getattr(torch, self.moments))
        except torch.OutOfMemoryError as error:
            raise UserError(f"the GPU's memory is full ({first_line(error)}); lower --batch-size") from None
        if not moments.isfinite().all():
            hint = "store them with --moments float32" if self.moments == "float16" else "it cannot be used"
            raise UserError(f"{self.autoencoder.spec.name} gives moments beyond {self.moments}'s range; {hint}")
        return moments.cpu().numpy()

    def _preview(self, data: Prepared, path: Path) -> float | None:
        """Draw some of the stored images, each above its round trip; the PSNR of the round trip."""
        chosen = torch.linspace(0, len(data) - 1, min(PREVIEW, len(data))).round().long().tolist()
        samples = [data[index] for index in chosen]
        images = unit_images(torch.stack([sample["image"] for sample in samples]))
        versions, caption, quality = [images], "stored images", None
        if self.autoencoder.spec.name != "none":
            moments = torch.stack([sample["moments"] for sample in samples]).float()
            x = self.autoencoder.spec.normalise(self.autoencoder.spec.mean(moments))
            decoded = torch.cat([self.autoencoder.decode(part) for part in x.split(DECODE_BATCH)]).cpu()
            versions, caption = [images, decoded], "stored images, below each its round trip"
            quality = float(psnr(images, decoded).mean())
        columns = min(8, len(images))
        blank = images.new_ones(-len(images) % columns, *images.shape[1:])
        rows = torch.stack([torch.cat([version, blank]).unflatten(0, (-1, columns)) for version in versions], dim=1)
        save_side_by_side({caption: to_pil(make_grid(rows.flatten(0, 2), columns, padding=4, pad_value=1))}, path)
        return quality


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (B, C, H, W) in [0, 1]: 10 log10(1 / mean squared error), (B,)."""
    return -10 * (a - b).square().flatten(1).mean(dim=1).clamp_min(1e-12).log10()


def _ahead(pool: ThreadPoolExecutor, function, items: Iterable, depth: int, bar) -> Iterator:
    """`map` in the pool's threads, in order, at most `depth` items ahead of what is consumed."""
    items = iter(items)
    waiting = deque(pool.submit(function, item) for item in itertools.islice(items, depth))
    try:
        while waiting:
            yield waiting.popleft().result()
            bar.update()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
    finally:
        for future in waiting:
            future.cancel()


@contextlib.contextmanager
def _whole_or_not(path: Path) -> Iterator[Path]:
    """`write_aside`, with the free space in the message of an error."""
    try:
        with write_aside(path) as aside:
            yield aside
    except OSError as error:
        free = shutil.disk_usage(path.parent).free / 1e9
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        why, then = (f"{error}; {free:.1f} GB free", "make room and ") if full else (str(error), "")
        raise UserError(f"{path} could not be written ({why}); {then}run the same command again") from None
