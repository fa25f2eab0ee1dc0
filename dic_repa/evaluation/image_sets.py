"""Sets of images to measure: a folder, zip or tar, an ADM `.npz`, a prepared or Arrow data set, or one in memory or in
the package.

All become an `ImageSet`, read a batch at a time by several threads.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dic_repa.data.files import stamp
from dic_repa.data.images import BadImage, center_crop, decode_image
from dic_repa.data.registry import datasets, named_data
from dic_repa.data.sources import open_source
from dic_repa.errors import UserError, did_you_mean
from dic_repa.files.hashing import fingerprint
from dic_repa.files.npz import NpzFile
from dic_repa.files.reading import read_file, read_json
from dic_repa.limits import check_limit
from dic_repa.recipe.keys import flatten
from dic_repa.sampling import SAMPLES_FILE, SAMPLES_NPZ

THREADS = 8


@dataclass
class ImageSet:
    """`count` images; `load(i)` gives one as uint8 (H, W, 3); `name(i)` is for messages.

    `fingerprint` changes with the contents; `notes` are what a reader of its scores should know; `made_by` is what
    `dic-repa sample` wrote beside its images; `labels` are the classes of all of them, if they are known.
    """

    source: str
    count: int
    load: Callable[[int], np.ndarray] = field(repr=False)
    fingerprint: str
    name: Callable[[int], str] = field(repr=False, default="image {}".format)
    notes: tuple[str, ...] = ()
    resize: int | None = None
    made_by: dict[str, Any] = field(default_factory=dict)
    labels: Sequence[int] = field(repr=False, default=())

    def __len__(self) -> int:
        return self.count

    def batches(self, batches: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Batches of these indices, uint8 (B, 3, H, W); the next one is read while one is in use.

        A UserError for a damaged image and for one of another size than the set's first.
        """
        size = self.size()
        with ThreadPoolExecutor(THREADS) as pool:
            coming: list[Future[Tensor]] = []
            for indices in [*batches, ()]:
                ready, coming = coming, [pool.submit(self._read, i, size) for i in indices]
                if ready:
                    yield torch.stack([future.result() for future in ready])

    def spread(self, most: int) -> ImageSet:
        """At most so many of the images, evenly over the set."""
        count = min(most, len(self))
        chosen = [i * len(self) // count for i in range(count)]
        load, name, labels = self.load, self.name, [self.labels[i] for i in chosen] if self.labels else ()
        return replace(
            self,
            count=count,
            load=lambda i: load(chosen[i]),
            name=lambda i: name(chosen[i]),
            labels=labels,
            fingerprint=f"{self.fingerprint} {count}",
        )

    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        _, height, width = self._read(0).shape
        return height, width

    def _read(self, index: int, size: tuple[int, int] | None = None) -> Tensor:
        try:
            array = self.load(index)
            if self.resize and array.shape[:2] != (self.resize, self.resize):
                array = np.asarray(center_crop(Image.fromarray(array), self.resize, self.name(index)))
        except BadImage as error:
            raise BadImage(f"{self.source}: {error}") from None
        if size not in (None, array.shape[:2]):
            raise UserError(
                f"{self.source}: {self.name(index)} is {array.shape[1]}x{array.shape[0]}, the first image "
                f"{size[1]}x{size[0]}; remove what does not belong there, or crop all to one size with --resize"
            )
        return torch.from_numpy(np.array(array)).permute(2, 0, 1)


def open_images(source, resize: int | None = None, hub: bool = False) -> ImageSet:
    """The images of a path, of a data set in the package such as 'emoji:train' (see `named_data`), or of one in memory.

    Args:
        source: a folder, zip or tar of image files, at any depth; an `.npz` with `arr_0` (N, H, W, C), uint8; what
            `dic-repa prepare` or `datasets` wrote; the name of a data set, with its split behind a colon; a data set in
            memory, whose samples are dicts with `x` (1 or 3, H, W) in [-1, 1], or `image` in [0, 1] if `x` is latent;
            a list of PIL images; a tensor (N, 1 or 3, H, W), uint8 or float in [0, 1]; or an `ImageSet`.
        resize: crop each image to that size as ADM does.
        hub: what is no path may be a data set of the Hugging Face hub, 'ID[:SPLIT]'.

    Raises:
        UserError: what `source` lacks.
    """
    path = Path(source) if isinstance(source, (str, Path)) else None
    if isinstance(source, ImageSet):
        images = replace(source)
    elif isinstance(source, Tensor | list | tuple):
        images = _of_memory(source)
    elif path is None:
        images = open_data(source)
    elif named := named_data(source):
        images = open_data(_open_named(*named, resize), str(source))
    elif path.suffix == ".npz":
        images = _of_npz(path)
    elif not path.exists() and not (hub and str(source).count("/") == 1):
        raise UserError(f"there is no folder, zip or tar {path}{near_data(source)}")
    elif (path / "dataset_dict.json").is_file():
        raise UserError(f"{path} has several splits; name one of them, such as {path / 'validation'}")
    elif (path / "prepare.json").is_file():
        images = _of_prepared(path)
    elif (path / SAMPLES_FILE).is_file():
        images = _of_samples(path)
    else:
        images = _of_source(path)
    images.resize = resize
    if not len(images):
        raise UserError(f"{images.source} holds no images")
    return images


def near_data(source: str | Path) -> str:
    """', and no such data set; did you mean emoji?' for what may have been meant as the name of one, else ''."""
    name = str(source).partition(":")[0]
    if name != Path(name).name:
        return ""
    return ", and no such data set" + did_you_mean(name, [known for known in datasets.names() if named_data(known)])


def _open_named(name: str, split: str, size: int | None) -> Any:
    with contextlib.suppress(UserError):  # it may come in one size alone, and is then cropped like others
        return datasets.create(name, split=split, size=size)
    return datasets.create(name, split=split)


def _of_source(path: Path) -> ImageSet:
    """Image files or a Hugging Face data set, read as `dic-repa prepare` reads them."""
    source = open_source(path, skip_bad=True, unlabelled=True)
    notes = [f"{path}: {line}" for line in source.left_out()]
    lossy = sum(name.lower().endswith((".jpg", ".jpeg")) for name in source.names)
    if 0 < lossy < len(source):
        notes.append(f"{path} mixes {lossy} JPEG files with others: what JPEG loses counts as a difference")
    load = lambda i: np.asarray(source.load(i))  # noqa: E731
    return ImageSet(str(path), len(source), load, source.state(), source.names.__getitem__, tuple(notes))


def _of_samples(path: Path) -> ImageSet:
    """What `dic-repa sample` wrote: the numbered images, without the grid beside them."""
    then = "sample again with --overwrite"
    record = read_json(path / SAMPLES_FILE, then, dict)
    num, labels = flatten(record).get("sample.num"), record.get("labels", [])
    are_labels = isinstance(labels, list) and all(type(label) is int and 0 <= label < 2**31 for label in labels)
    if type(num) is not int or not are_labels:
        raise UserError(f"{path / SAMPLES_FILE} is damaged (it does not tell num and labels); {then}")
    check_limit("images", num, f"the number of images in {path / SAMPLES_FILE}")
    names = [f"{i:06d}.png" for i in range(num)]
    missing = set(names) - set(os.listdir(path))
    if missing and (path / SAMPLES_NPZ).is_file():  # by --format npz, the images are there alone
        images = _of_npz(path / SAMPLES_NPZ)
        if len(images) == num:  # else more samples were asked for since
            return replace(images, source=str(path), made_by=record, labels=labels)
    if missing:
        there = f"{len(names) - len(missing)} of its {len(names)} images"
        raise UserError(f"{path} has {there}; run its `dic-repa sample` again to finish them")
    load = lambda i: np.asarray(decode_image(read_file(path / names[i]), names[i]))  # noqa: E731
    digest = _digest(record, stamp(path / name for name in names))
    return ImageSet(str(path), len(names), load, digest, names.__getitem__, made_by=record, labels=labels)


def _of_npz(path: Path) -> ImageSet:
    file = NpzFile(path)
    array = file.mapped("arr_0")
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise UserError(f"{path}: arr_0 must be images (N, H, W, 3), not {tuple(array.shape)}")
    if not array.size:
        raise UserError(f"{path} holds no images: arr_0 is of the shape {tuple(array.shape)}")
    if array.dtype != np.uint8:
        raise UserError(f"{path}: arr_0 is {array.dtype}; images in an .npz are uint8, from 0 to 255")
    size = (*array.shape[1:3], 3)
    return ImageSet(str(path), len(array), lambda i: np.broadcast_to(array[i], size), file.checksum())


def _of_prepared(path: Path) -> ImageSet:
    from dic_repa.data.prepared import Prepared
    from dic_repa.data.shard_lists import INDEX
    from dic_repa.data.webdataset import WebDataset

    if (path / INDEX).is_file():
        shards = WebDataset(path, flip=False)
        return ImageSet(str(path), len(shards), lambda i: _from_float(shards[i]["image"]), _digest(shards.fingerprint))
    data = Prepared(path, flip=False)
    # If an image is replaced, the names in state.json stay the same; the shards do not.
    digest = _digest((path / "state.json").read_text(), stamp(path.glob("*.arrow")))
    return ImageSet(str(path), len(data), lambda i: _from_float(data[i]["image"]), digest)


def _of_memory(images: Tensor | Sequence[Any]) -> ImageSet:
    """A tensor (N, 1 or 3, H, W), PIL images, or samples as a data set has them."""
    if isinstance(images, Tensor):
        levels = as_uint8(images.detach().cpu()) if images.numel() else images
        load = lambda i: levels[i].expand(3, -1, -1).permute(1, 2, 0).numpy()  # noqa: E731
        return ImageSet("the tensor", len(levels), load, fingerprint(levels))
    if images and isinstance(images[0], dict):
        return open_data(images)
    for i, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise UserError(f"image {i} of the list is a {type(image).__name__}, not a PIL image")
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    digest = fingerprint(*(part for array in arrays for part in (str(array.shape), array.tobytes())))
    return ImageSet("the list", len(arrays), arrays.__getitem__, digest)


def open_data(data, name: str = "") -> ImageSet:
    """The images of a data set in memory; `name` is for messages."""
    name, latent = name or type(data).__name__, getattr(getattr(data, "spec", None), "name", "none") != "none"
    if not hasattr(data, "__len__") or not isinstance(data[0], dict) or not {"image", "x"} & data[0].keys():
        raise UserError(f"a {name} is not a set of images: its samples must be dicts with an `image`")
    pixels = not latent and "x" in data[0]  # what an encoder sees, `image`, may be of another size

    def load(index: int) -> np.ndarray:
        sample = data[index]
        return _from_float((sample["x"] / 2 + 0.5).clamp(0, 1) if pixels else sample["image"])

    parts = torch.linspace(0, len(data) - 1, min(len(data), 64)).round().int().tolist()
    probe = [fingerprint(load(i).tobytes()) for i in parts]
    labels = getattr(data, "labels", ())  # of a data set with mirrored images, fewer
    known = isinstance(labels, Sequence | Tensor) and len(labels) == len(data)
    return ImageSet(name, len(data), load, _digest(len(data), probe), labels=list(map(int, labels)) if known else ())


def _from_float(image: Tensor) -> np.ndarray:
    return as_uint8(image[None])[0].expand(3, -1, -1).permute(1, 2, 0).numpy()


def as_uint8(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W), uint8 or float in [0, 1], as uint8; a UserError for NaN and values out of range."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"images must be (B, 1 or 3, H, W), not {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise UserError(f"images must be uint8, or float in [0, 1], not {images.dtype}")
    if broken := int((~images.isfinite()).flatten(1).any(dim=1).sum()):
        raise UserError(f"{broken} of {len(images)} images hold NaN or infinity")
    if images.min() < 0 or images.max() > 1:
        raise UserError(f"float images must be in [0, 1], not from {images.min():.3g} to {images.max():.3g}")
    return (images * 255).round().to(torch.uint8)


def _digest(*parts) -> str:
    return fingerprint(json.dumps(parts, default=str))
