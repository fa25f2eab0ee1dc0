"""Prepare a data set once: crop, encode, and write shards that training reads.

`datasets.load_from_disk` opens the result. Its columns are `image` (a WebP, PNG or JPEG file), `moments` (mean and
standard deviation, float16 or float32), `moments_flipped` (of the mirrored image, on request), `label`, `name`, `width`
and `height` (of the original). `prepare.json` says how it was made. Shard k holds `shard_size` images, from image
k * shard_size on, whatever the number of processes or interruptions.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dic_repa.data.autoencoders import Autoencoder, AutoencoderSpec
from dic_repa.data.images import BadImage, center_crop, encode_file, to_levels
from dic_repa.data.sources import ImageSource
from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.outputs import begin_folder, check_folder
from dic_repa.files.pictures import unit_images
from dic_repa.runtime.precision import tf32
from dic_repa.runtime.progress import progress_bar

SETTINGS_FILE = "prepare.json"


@dataclass(frozen=True)
class PrepareSettings:
    """How to prepare."""

    size: int = 256  # of the crop, in pixels
    flip: bool = False  # store the moments of the mirrored images too
    image_format: str = "webp"
    moments: str = "float16"  # or float32, as REPA has them
    shard_size: int = 1000  # images
    batch_size: int = 32  # images encoded at once
    skip_bad: bool = False
    workers: int = 8  # threads that read and crop


def begin(source: ImageSource, destination: str | Path, spec: AutoencoderSpec, settings: PrepareSettings) -> None:
    """Make the destination, or check that it was begun with the same settings. One process does this, first.

    Raises:
        UserError: the destination holds something else.
    """
    destination, wanted = Path(destination), describe(source, spec, settings)
    if settings.size % spec.downsample:
        raise UserError(f"--size {settings.size} is not a multiple of {spec.downsample}, the autoencoder's reduction")
    file = destination / SETTINGS_FILE
    there = check_folder(destination, "prepared")
    if there and file.is_file():
        # Images and weights may move between two calls, but not change.
        found, wanted = {"moments": "float16"} | json.loads(file.read_text()), json.loads(json.dumps(wanted))
        if differs := [key for key in wanted if _content(wanted[key]) != _content(found.get(key))]:
            raise UserError(f"{destination} was begun with another {', '.join(differs)}; choose another folder")
        return
    # All names at once, since the processes that will write them may be on several machines.
    others = ("dataset_info.json", "state.json", "check.json", "preview.png")
    begin_folder(destination, "prepared", [SETTINGS_FILE, *_shards(source, settings), *others])
    write_json(file, wanted)


def write_shards(
    source: ImageSource,
    destination: str | Path,
    autoencoder: Autoencoder,
    settings: PrepareSettings,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Write the shards of this process that are still missing; a shard is whole or not there.

    Raises:
        UserError: a damaged image (unless skip_bad), or a full disk.
    """
    from datasets.arrow_writer import ArrowWriter

    destination, features = Path(destination), _features(autoencoder.spec, source, settings)
    # Split before finished ones are left out, so that processes that look at different times share no shard.
    mine = list(_shards(source, settings).items())[process::processes]
    todo = [(name, rows) for name, rows in mine if not (destination / name).is_file()]
    total = sum(len(rows) for _, rows in todo)
    label = "encoding" if processes == 1 else f"encoding (process 1 of {processes})"
    with (
        progress_bar(total=total, desc=label, unit="image", disable=process > 0 or not total) as bar,
        ThreadPoolExecutor(settings.workers) as pool,
    ):
        for name, rows in todo:
            with (
                _whole_or_not(destination / name) as aside,
                ArrowWriter(features=features, path=str(aside), writer_batch_size=100) as writer,
            ):
                for row in _encoded(source, rows, autoencoder, settings, pool, bar):
                    writer.write(row)
                writer.finalize()


def _shards(source: ImageSource, settings: PrepareSettings) -> dict[str, range]:
    """The file name of each shard, and the indices of its images."""
    starts = range(0, len(source), settings.shard_size)
    return {
        f"data-{k:05d}-of-{len(starts):05d}.arrow": range(len(source))[start : start + settings.shard_size]
        for k, start in enumerate(starts)
    }


def describe(source: ImageSource, spec: AutoencoderSpec, settings: PrepareSettings) -> dict:
    """What determines the prepared data, as `prepare.json` keeps it; not `skip_bad`, which may be added later."""
    return {
        "format": 1,
        "source": {"path": str(source.path), "images": len(source), "fingerprint": source.fingerprint()},
        "size": settings.size,
        "flip": settings.flip,
        "image_format": settings.image_format,
        "moments": settings.moments,
        "shard_size": settings.shard_size,
        "autoencoder": spec.to_dict(),
        "class_names": list(source.class_names),
    }


def finish(source: ImageSource, destination: str | Path, spec: AutoencoderSpec, settings: PrepareSettings) -> None:
    """Make one data set of the shards, with the two small files that `datasets.load_from_disk` reads."""
    destination = Path(destination)
    files = list(_shards(source, settings))
    if missing := [name for name in files if not (destination / name).is_file()]:
        raise UserError(f"{destination} still lacks {len(missing)} of {len(files)} shards; run the same command again")
    features = _features(spec, source, settings).to_dict()
    write_json(destination / "dataset_info.json", {"features": features})
    state = {"_data_files": [{"filename": name} for name in files], "_fingerprint": source.fingerprint()}
    formats: dict = {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    write_json(destination / "state.json", state | formats | {"_split": "train"})


def write_json(path: Path, content: dict) -> None:
    """Write JSON, whole or not at all."""
    with _whole_or_not(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n")


def _content(value):
    return {k: v for k, v in value.items() if k not in ("path", "name")} if isinstance(value, dict) else value


def _features(spec: AutoencoderSpec, source: ImageSource, settings: PrepareSettings):
    from datasets import Array3D, ClassLabel, Features, Value
    from datasets import Image as ImageFeature

    side = settings.size // spec.downsample
    moments = {}
    if spec.name != "none":  # the pixels' moments would be the image again
        names = ["moments", "moments_flipped"] if settings.flip else ["moments"]
        moments = {name: Array3D((2 * spec.channels, side, side), settings.moments) for name in names}
    return Features(
        {
            "image": ImageFeature(),
            **moments,
            "label": ClassLabel(names=list(source.class_names)) if source.class_names else Value("int64"),
            "name": Value("string"),
            "width": Value("int32"),
            "height": Value("int32"),
        }
    )


def _encoded(
    source: ImageSource, rows: range, autoencoder: Autoencoder, settings: PrepareSettings, pool: ThreadPoolExecutor, bar
) -> Iterator[dict]:
    """The rows of one shard. Threads read and crop what comes next while a batch is encoded."""

    def load(index: int):
        try:
            image = source.load(index)
        except BadImage as error:
            if settings.skip_bad:
                return None
            raise BadImage(f"{error}, or pass --skip-bad") from None
        cropped = center_crop(image, settings.size)
        row = {
            "image": {"bytes": encode_file(cropped, settings.image_format), "path": None},
            "label": int(source.labels[index]),
            "name": source.names[index],
            "width": image.width,
            "height": image.height,
        }
        return row, to_levels(cropped)

    loaded = (item for item in _ahead(pool, load, rows, 3 * settings.batch_size, bar) if item is not None)
    while batch := list(itertools.islice(loaded, settings.batch_size)):
        if autoencoder.spec.name == "none":
            yield from (row for row, _ in batch)
            continue
        images = unit_images(torch.stack([image for _, image in batch]))
        moments = {"moments": _moments(autoencoder, images, settings.moments)}
        if settings.flip:
            moments["moments_flipped"] = _moments(autoencoder, images.flip(-1), settings.moments)
        for k, (row, _) in enumerate(batch):
            yield row | {name: values[k] for name, values in moments.items()}


def _moments(autoencoder: Autoencoder, images: torch.Tensor, dtype: str) -> np.ndarray:
    try:
        with tf32(False):
            moments = autoencoder.encode(images.to(autoencoder.device)).to(getattr(torch, dtype))
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is full ({first_line(error)}); lower --batch-size") from None
    if not moments.isfinite().all():
        hint = "store them with --moments float32" if dtype == "float16" else "it cannot be used"
        raise UserError(f"{autoencoder.spec.name} gives moments beyond {dtype}'s range; {hint}")
    return moments.cpu().numpy()


def _ahead(pool: ThreadPoolExecutor, function, items: Iterable, depth: int, bar) -> Iterator:
    """`map` in the pool's threads, in order, at most `depth` items ahead of what is consumed."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
                bar.update()
        while waiting:
            yield waiting.popleft().result()
            bar.update()
    finally:
        for future in waiting:
            future.cancel()


@contextlib.contextmanager
def _whole_or_not(path: Path):
    """`write_aside`, with the free space in the message of an error."""
    try:
        with write_aside(path) as aside:
            yield aside
    except OSError as error:
        free = shutil.disk_usage(path.parent).free / 1e9
        raise UserError(
            f"{path} could not be written ({error}; {free:.1f} GB free); make room and run the same command again"
        ) from None
