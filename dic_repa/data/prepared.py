"""The data set that `dic-repa prepare` wrote, for training."""

import bisect
import io
import itertools
import zlib
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dic_repa.data.autoencoders import AutoencoderSpec, LatentStatistics, load_autoencoder
from dic_repa.data.files import stamp
from dic_repa.data.images import IMAGE_FORMATS, to_levels
from dic_repa.data.latents import LatentDataset
from dic_repa.data.registry import register_dataset
from dic_repa.data.statistics import read_statistics
from dic_repa.errors import UserError, first_line
from dic_repa.files.reading import check_regular, read_json
from dic_repa.limits import check_limit
from dic_repa.trust import check_code

SETTINGS_FILE = "prepare.json"
CHECKSUMS = "crc32"  # a column
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


@register_dataset("prepared")
class Prepared(LatentDataset):
    """Samples of a prepared folder, memory-mapped.

    A sample is a dict of `moments` (2C, size, size), float16 or float32, if an autoencoder was used; `image` (3, H, W),
    uint8; and `label`, int64. With `flip`, the second half of the samples mirrors the first.

    Args:
        size: height and width of the denoiser's data; None takes what is there.
        autoencoder: the same autoencoder, if it has another name now.
        flip: use the mirrored images, which must be stored; by default if they are.
    """

    def __init__(
        self,
        path: str | Path,
        size: int | None = None,
        split: str = "train",
        autoencoder: str | None = None,
        flip: bool | None = None,
    ):
        settings, state = read_settings(path), Path(path) / "state.json"
        if settings.get("layout") == "webdataset":
            raise UserError(f"{path} holds tar shards, which data.name=webdataset reads; set that")
        if not state.is_file():
            raise UserError(f"the preparation of {path} was not finished; run its `dic-repa prepare` again")
        self.path, self.spec = Path(path), prepared_spec(settings, autoencoder, path)
        self.class_names = tuple(settings["class_names"])
        self.size = settings["size"] // self.spec.downsample
        self.check_size(size or self.size, self.size, str(path))
        if flip and not settings["flip"]:
            raise UserError(
                f"{path} holds no mirrored images, which data.options.flip asks for: prepare it with --flip, or set "
                "data.options.flip=false to train without"
            )
        self.flip = settings["flip"] if flip is None else flip
        self.files = _shards(state)

    @classmethod
    def autoencoder_of(cls, path: str) -> str:
        name = read_settings(path)["autoencoder"]["name"]
        check_code({"autoencoder": name}, Path(path, SETTINGS_FILE))
        return name

    def __len__(self) -> int:
        return self.parts[0][-1] * (2 if self.flip else 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        starts, parts = self.parts
        place = index
        flipped, index = divmod(index, starts[-1])
        k = bisect.bisect_right(starts, index) - 1
        part, row = parts[k], index - starts[k]
        moments = "moments_flipped" if flipped else "moments"
        stored = {"label": part["label"][row]}
        if self.with_images or self.spec.name == "none":
            stored["image"] = part["image"][row].as_py()
        if self.spec.name != "none":
            stored[moments] = part[moments][row]
        if self._unread[place]:  # once in each process, which costs little beside decoding
            self.check_row(part, row, stored)
            self._unread[place] = False
        if not 0 <= stored["label"] < max(1, self.num_classes):
            raise _damaged(part, row, f"the label of its row {{}} is {stored['label']}, of {self.num_classes} classes")
        sample = {"label": torch.tensor(stored["label"])}
        if "image" in stored:
            # The formats are named, since Pillow would try a dozen others first.
            try:
                with Image.open(io.BytesIO(stored["image"]), formats=[*IMAGE_FORMATS]) as picture:
                    image = to_levels(picture)
            except Exception as error:  # Pillow raises anything on damaged data; none at all is a TypeError
                raise _damaged(part, row, f"the image of its row {{}} cannot be read ({first_line(error)})") from None
            if image.shape != self._image_shape:
                raise _damaged(part, row, f"the image of its row {{}} is {tuple(image.shape)}")
            sample["image"] = image.flip(-1) if flipped else image
        return sample if self.spec.name == "none" else sample | {"moments": torch.tensor(stored[moments])}

    @property
    def statistics(self) -> LatentStatistics:
        """Over all images, mirrored ones included if they are stored."""
        return read_statistics(self.path, self.files, self.spec)

    @property
    def labels(self) -> np.ndarray:
        """The class of each image (N,), int64, mirrored ones left out."""
        return np.concatenate([part["label"] for part in self.parts[1]])

    @cached_property
    def _image_shape(self) -> tuple[int, int, int]:
        return 3, self.size * self.spec.downsample, self.size * self.spec.downsample

    @cached_property
    def _unread(self) -> np.ndarray:
        return np.ones(len(self), dtype=bool)

    def check_row(self, part: dict, row: int, stored: dict[str, Any]) -> None:
        """A UserError if one of the `stored` values of a row has changed since it was prepared."""
        if CHECKSUMS not in part:
            return  # prepared by an earlier version
        expected = np.frombuffer(part[CHECKSUMS][row].as_py(), "<u4")
        names = part["names"]
        for name, value in stored.items():
            if len(expected) != len(names) or _checksum(value) != expected[names.index(name)]:
                raise _damaged(part, row, f"the {name} of its row {{}} has changed since it was prepared")

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the images for a feature cache."""
        return f"{stamp(self.path / name for name in self.files)} {self.flip}"

    @cached_property
    def parts(self) -> tuple[list[int], list[dict]]:
        """Where each record batch of all shards starts (and the total), and its columns, mapped from the files."""
        # Straight from Arrow, since the rows that `datasets` formats take longer than decoding the image.
        parts = [part for name in self.files for part in self._shard(self.path / name)]
        return [0, *itertools.accumulate(len(part["label"]) for part in parts)], parts

    def _shard(self, file: Path) -> list[dict[str, Any]]:
        """The record batches of a shard, as the columns of each; a UserError if it cannot be read."""
        import datasets  # noqa: F401  makes its array types known to Arrow
        import pyarrow as pa

        shape, parts, first = (self.spec.moments, self.size, self.size), [], 0
        needed = {"image", "label"} | ({"moments"} if self.spec.name != "none" else set())
        needed |= {"moments_flipped"} if self.flip and self.spec.name != "none" else set()
        try:
            _check_end(file)
            for batch in pa.ipc.open_stream(pa.memory_map(str(file))).read_all().to_batches():
                if missing := needed - {*batch.schema.names}:
                    raise ValueError(f"it has no column {', '.join(sorted(missing))}")
                parts.append(_columns(batch, shape) | {"file": file, "first": first})
                first += len(batch)
        except Exception as error:  # Arrow raises anything on damaged data
            raise UserError(
                f"{file} is missing or damaged ({first_line(error)}); remove it and prepare again"
            ) from None
        return parts

    def check_shard(self, name: str) -> bool:
        """Whether the rows of a shard, one of `files`, have checksums; a UserError if one is not as its own says."""
        parts = self._shard(self.path / name)
        for part, row in [(each, row) for each in parts for row in range(len(each["label"]))]:
            others = {key: part["batch"][key][row].as_py() for key in ("name", "width", "height")}
            moments = {key: part[key][row] for key in part["names"] if key.startswith("moments")}
            image = part["image"][row].as_py()
            self.check_row(part, row, {"label": part["label"][row], "image": image, **moments, **others})
        return all(CHECKSUMS in part for part in parts)

    def __getstate__(self) -> dict:
        # A worker that is spawned maps the files itself; pickled arrays would be copies of all of the data.
        return {key: value for key, value in self.__dict__.items() if key not in ("parts", "_unread", "autoencoder")}


def _columns(batch, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The columns of a record batch, mapped; a ValueError if they do not belong together."""
    batch["image"].validate(full=True)  # the places of the images, which Arrow would believe
    part = {"image": batch["image"].field("bytes"), "label": batch["label"].to_numpy()}
    if part["label"].dtype != np.int64:
        raise ValueError("its labels are no whole numbers")
    if CHECKSUMS in batch.schema.names:
        part[CHECKSUMS] = batch[CHECKSUMS]
        part[CHECKSUMS].validate(full=True)
    for name in {"moments", "moments_flipped"}.intersection(batch.schema.names):
        values = batch[name].storage  # nested lists, whose numbers lie one after another in the file
        while hasattr(values, "flatten") and values.type.num_fields:
            values = values.flatten()
        part[name] = values.to_numpy(zero_copy_only=True).reshape(len(batch), *shape)
    return part | {"names": sorted({*batch.schema.names} - {CHECKSUMS}), "batch": batch}


def _check_end(file: Path) -> None:
    """A ValueError if an Arrow stream is cut off, which Arrow itself does not notice between two of its batches."""
    check_regular(file)
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - len(_END)))
        if stream.read() != _END:
            raise ValueError("its end is missing")


def _damaged(part: dict, row: int, what: str) -> UserError:
    return UserError(
        f"{part['file']} is damaged: {what.format(part['first'] + row)}; remove that file, and run the same "
        "`dic-repa prepare` again, which makes it anew"
    )


def checksums(row: dict[str, Any]) -> bytes:
    """The CRC-32 of each value of a row, uint32, little-endian, by the order of the columns' names."""
    return np.array([_checksum(row[name]) for name in sorted(row)], "<u4").tobytes()


def _checksum(value: Any) -> int:
    """Of an image file's bytes, an array, a text or an integer."""
    if isinstance(value, dict):
        value = value["bytes"]
    if isinstance(value, str):
        value = value.encode(errors="surrogateescape")
    return zlib.crc32(value if isinstance(value, bytes) else np.asarray(value, order="C").tobytes())


class _Settings(BaseModel):
    """What training needs of prepare.json; `AutoencoderSpec.from_dict` checks the autoencoder."""

    model_config = ConfigDict(strict=True)

    source: dict[str, Any]
    size: int
    flip: bool
    autoencoder: dict[str, Any]
    class_names: list[str]


def prepared_spec(settings: dict[str, Any], autoencoder: str | None, path: str | Path) -> AutoencoderSpec:
    """The autoencoder that data at `path` was prepared with; a UserError if `autoencoder`, its name now, is another."""
    spec = AutoencoderSpec.from_dict(settings["autoencoder"])
    if autoencoder is None:
        check_code({"autoencoder": spec.name}, path)
    elif autoencoder != spec.name:
        found, spec = spec, load_autoencoder(autoencoder).spec
        if spec.fingerprint != found.fingerprint:
            raise UserError(f"{path} was prepared with the autoencoder {found.name}, not with {autoencoder}")
    return spec


def read_settings(path: str | Path) -> dict:
    """The `prepare.json` of a prepared folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file, then = Path(path) / SETTINGS_FILE, "restore it, or prepare into another folder"
    if not file.exists():
        raise UserError(f"{path} is not a prepared data set (no {SETTINGS_FILE}); make one by `dic-repa prepare`")
    content = read_json(file, then)
    check_settings(content, file, then)
    return content


def check_settings(content: Any, file: str | Path, then: str) -> None:
    """A UserError if this is not the content of a prepare.json; `file` has it, and `then` says what to do."""
    try:
        settings = _Settings.model_validate(content)
        spec = AutoencoderSpec.from_dict(settings.autoencoder)
        if settings.size < 1 or settings.size % spec.downsample:
            raise ValueError(f"its size {settings.size} is no multiple of {spec.downsample}")
    except ValueError as error:  # pydantic's too
        raise UserError(f"{file} is damaged ({_first_fault(error)}); {then}") from None
    check_limit("classes", len(settings.class_names), f"the number of classes of {file}")
    check_limit("image-pixels", settings.size**2, f"the number of pixels of an image of {file}")


def _first_fault(error: ValueError) -> str:
    """What pydantic, or a ValueError of ours, found first."""
    for fault in getattr(error, "errors", list)():
        return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" if fault["loc"] else fault["msg"]
    return first_line(error)


def _shards(state: Path) -> list[str]:
    """The names of the shards that `datasets`' state.json lists, which are files beside it."""
    then = "remove it, and run the same `dic-repa prepare` again"
    content = read_json(state, then)
    try:
        names = [entry["filename"] for entry in content["_data_files"]]
        if not names or len(set(names)) < len(names) or any(PurePath(name).name != name for name in names):
            raise ValueError("its files are not beside it, or twice in it")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{state} is damaged ({first_line(error)}); {then}") from None
    return names
