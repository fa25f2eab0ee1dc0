"""Where images come from: a class-per-folder tree or a flat one, with a labels file or without (each a folder, zip or
tar), a Hugging Face data set, or a data set in the package. All become an `ImageSource`, in an order that depends on
names alone, from which one can also train without preparation.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dic_repa.data.autoencoders import load_spec
from dic_repa.data.copies import Copies
from dic_repa.data.files import FileTree, by_reason, open_tree, stamp
from dic_repa.data.images import EXTENSIONS, BadImage, center_crop, decode_image, encode_file, to_levels
from dic_repa.data.labels import counted, numbered, read_labels
from dic_repa.data.latents import LatentDataset
from dic_repa.data.registry import datasets as in_package
from dic_repa.data.registry import named_data, register_dataset
from dic_repa.errors import UserError, first_line, is_main_process
from dic_repa.files.hashing import fingerprint
from dic_repa.files.hub import pin
from dic_repa.files.pictures import to_pil, unit_images
from dic_repa.files.reading import read_file
from dic_repa.runtime.progress import warn

LABEL_FILES = ("dataset.json", "labels.json", "labels.csv")
ONLY_CLASS = "images"  # of flat images without labels; not the folder's name, which may change between two calls


@dataclass
class ImageSource:
    """Images `load(i)` with `names[i]` and `labels[i]`; without classes, all labels are 0, the null class."""

    path: str
    names: Sequence[str]
    labels: Sequence[int]
    class_names: tuple[str, ...]
    read: Callable[[Any], bytes] = field(repr=False)  # the file of one of the `keys`
    keys: Sequence[Any] = field(repr=False)
    rejected: dict[str, str] = field(default_factory=dict)  # names that are left out, and why
    notes: tuple[str, ...] = ()  # what else a reader should know was left out
    files: Sequence[Path] = field(repr=False, default=())  # that the images are in
    version: str = ""  # of a data set on the hub, which has no `files`

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Image.Image:
        """Image `index` as 8-bit RGB; BadImage names a damaged one."""
        try:
            data = self.read(self.keys[index])
        except (OSError, UserError) as error:  # the latter for a size beyond the limit
            raise BadImage(f"{self.names[index]} cannot be read ({error}); restore it") from None
        return decode_image(data, self.names[index])

    def fingerprint(self) -> str:
        """A hash of names, labels and classes, by which a resumed preparation knows the same images."""
        return fingerprint(*map(json.dumps, (list(self.names), list(map(int, self.labels)), self.class_names)))

    def left_out(self) -> list[str]:
        """A line for each reason for which files are left out."""
        reasons = by_reason(self.rejected).items()
        return [f"{counted(names)} {reason}, and left out" for reason, names in reasons] + list(self.notes)

    def state(self) -> str:
        """A text that changes with any image; the images are not read."""
        return f"{self.fingerprint()} {stamp(self.files)} {self.version}"


def open_source(
    path: str | Path, labels: str | Path | None = None, skip_bad: bool = False, unlabelled: bool = False
) -> ImageSource:
    """Open the images at `path`, of any kind.

    Args:
        path: a folder, zip or tar, with a folder for each class or flat; a Hugging Face data set, local or
            'ID[:SPLIT]' on the hub; or a data set in the package, 'NAME[:SPLIT]' (`named_data`), by default what is
            trained on.
        labels: the labels of flat files, by default one of `LABEL_FILES` in `path`; without any, they are one class.
        skip_bad: leave out what is not named as an image, no regular file, a link in an archive or to nothing, or a
            folder that is reached twice.
        unlabelled: no image has a class.

    Raises:
        UserError: files that are no images (unless `skip_bad`), an empty class, or files without a label.
    """
    path = str(path)
    if labels and unlabelled:
        raise UserError(f"the images are to be unlabelled, and {labels} labels them; leave out one of the two")
    if named := named_data(path):
        if labels:
            raise UserError(f"{path} has its own labels; leave the labels file out")
        return _open_in_package(named[0], path.partition(":")[2] or "train", unlabelled)
    if _is_hugging_face(path):
        if labels:
            raise UserError("a Hugging Face data set has its own labels; leave the labels file out")
        return _open_hugging_face(path, unlabelled)
    tree = open_tree(path)
    inside = [name for name in LABEL_FILES if name in tree.names]
    beside = Path(os.path.relpath(labels, path)).as_posix() if labels else ""
    tree.names = [name for name in tree.names if name not in inside and name != beside]
    names = tree.ending_in(EXTENSIONS)
    rejected = tree.left_out | dict.fromkeys({*tree.names}.difference(names), "not named as an image")
    if rejected and not skip_bad:
        reasons = ", ".join(f"{counted(found)} {reason}" for reason, found in by_reason(rejected).items())
        raise UserError(f"{path}: {reasons}; remove them, or pass --skip-bad")
    if not names:
        raise UserError(f"{path} holds no images ({', '.join(sorted(EXTENSIONS))})")
    if len(inside) > 1 and not (labels or unlabelled):
        raise UserError(f"{path} has {' and '.join(inside)}; name the right one with --labels")
    notes = _hidden(tree)
    class_names: tuple[str, ...] = ()
    if unlabelled:
        numbers = [0] * len(names)
    elif labels or inside:
        label_file = str(labels or f"{path}/{inside[0]}")
        text = read_file(labels) if labels else _read_inside(tree, inside[0])
        numbers, class_names, unused = read_labels(text, label_file, names)
        if absent := [name for name in unused if name.lower().endswith(tuple(EXTENSIONS))]:
            notes.append(f"{counted(absent)} in {label_file}, and no image that is there")
    else:
        numbers, class_names = _labels_of_folders(tree, names)
    files = [tree.path / name for name in names] if tree.path.is_dir() else [tree.path]
    return ImageSource(path, names, numbers, class_names, tree.read, names, rejected, tuple(notes), files)


@register_dataset("images")
class ImageFolder(LatentDataset):
    """Samples of any source that `dic-repa prepare` takes, without preparation: for small data.

    A sample is a dict of `image` (3, H, W), uint8, and `label`; the training step encodes the image. With `flip`, the
    second half of the samples mirrors the first; with `shift`, all are also moved (`Copies`). A damaged image stops the
    run, also with `skip_bad`.

    `path`, `labels`, `skip_bad` and `unlabelled` are those of `open_source`.

    Args:
        size: height and width of the denoiser's data; images are larger by the autoencoder's reduction.
        autoencoder: 'none' for pixels, a hub id or a local folder.
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        split: str = "train",
        autoencoder: str = "none",
        labels: str | None = None,
        flip: bool = False,
        skip_bad: bool = False,
        unlabelled: bool = False,
        shift: int = 0,
    ):
        self.size, self.spec, self.flip, self.shift = size, load_spec(autoencoder), flip, shift
        self.source = open_source(path, labels, skip_bad, unlabelled)
        self.class_names, self.labels = self.source.class_names, self.source.labels
        count = len(self.source)
        self.copies = Copies(count, range(count if flip else 0), shift, size * self.spec.downsample)
        if is_main_process():
            for line in self.source.left_out():
                warn(f"{path}: {line}")

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the images for a feature cache."""
        return f"{self.source.state()} {self.size} {self.flip}" + f" {self.shift}" * bool(self.shift)

    def __len__(self) -> int:
        return len(self.copies)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = self.copies.picture(index)
        picture = self.source.load(place)
        image = to_levels(center_crop(picture, self.size * self.spec.downsample, self.source.names[place]))
        return {"image": self.copies.apply(image, index), "label": torch.tensor(self.source.labels[place])}


def _hidden(tree: FileTree) -> list[str]:
    """A note about hidden images and folders; a Mac's ._ files beside the real ones are none."""
    shown = [name for name in tree.hidden if name.lower().endswith(("/", *EXTENSIONS)) and "/._" not in f"/{name}"]
    return [f"{counted(shown)} hidden, and left out"] if shown else []


def _read_inside(tree: FileTree, name: str) -> bytes:
    try:
        return tree.read(name)
    except OSError as error:
        raise UserError(f"{tree.path}: the labels cannot be read ({error}); restore {name}") from None


def _labels_of_folders(tree: FileTree, names: list[str]) -> tuple[list[int], tuple[str, ...]]:
    """The class is the first folder below those that hold all (a zip's 'train/'); without folders there is one."""
    if not tree.folders and not any("/" in name for name in names):
        return [0] * len(names), (ONLY_CLASS,)
    depth = 0
    while len({name.split("/")[depth] for name in names}) == 1 and all(name.count("/") > depth + 1 for name in names):
        depth += 1
    if loose := [name for name in names if name.count("/") <= depth]:
        raise UserError(
            f"{tree.path}: {counted(loose)} in no class folder, beside folders; move them into one, give a labels file "
            "(--labels), or take all without classes (--unlabelled)"
        )
    classes = [name.split("/")[depth] for name in names]
    base = "".join(part + "/" for part in names[0].split("/")[:depth])
    folders = {folder[len(base) :].split("/")[0] for folder in tree.folders if folder.startswith(base)} - {""}
    if empty := sorted(folders - set(classes)):
        raise UserError(f"{tree.path}: class {counted(empty)} without images; fill or remove the folder")
    return numbered(classes, str(tree.path))


def _open_in_package(name: str, split: str, without_labels: bool) -> ImageSource:
    data, path = in_package.create(name, split=split), f"{name}:{split}"
    if "image" not in data[0]:
        raise UserError(f"the data set {name} has no images to prepare")
    labels = [0 if without_labels else int(data[k]["label"]) for k in range(len(data))]
    class_names = () if without_labels else tuple(map(str, data.class_names))
    read = lambda k: encode_file(to_pil(unit_images(data[k]["image"])), "png")  # noqa: E731
    names = [f"{path}#{k}" for k in range(len(data))]
    return ImageSource(path, names, labels, class_names, read, range(len(data)))


def _is_hugging_face(path: str) -> bool:
    local = Path(path)
    if local.is_dir():
        return any(any(local.glob(name)) for name in ("state.json", "dataset_dict.json", "*.parquet", "data/*.parquet"))
    return not local.exists() and path.count("/") == 1 and not path.startswith((".", "/", "~"))


def _open_hugging_face(path: str, without_labels: bool) -> ImageSource:
    import datasets

    place, _, split = (path, "", "") if Path(path).exists() else path.partition(":")
    local, version = Path(place), ""
    try:
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(place)
            data = data[split or "train"] if isinstance(data, datasets.DatasetDict) else data
            files = [Path(part["filename"]) for part in data.cache_files]
        else:
            commit = None
            if not local.exists():
                place, commit = pin(place, "dataset")
            data = datasets.load_dataset(place, split=split or "train", **{"revision": commit} if commit else {})
            files = list(local.rglob("*.parquet"))  # not the Arrow files that were made of these
            version = "" if local.exists() else str(data._fingerprint)  # covers the hub's commit and the split
    except Exception as error:  # anything from ConnectionError to DatasetNotFoundError and ValueError
        absent = "" if local.exists() else f"there is no folder {path}, and "
        raise UserError(
            f"{absent}the data set {path} cannot be loaded ({first_line(error)}); if the hub cannot be reached, "
            "download it elsewhere (`hf download --repo-type dataset ID --local-dir FOLDER`) and name the folder"
        ) from None
    image = only_column(data, datasets.Image, "image", path)
    labels, class_names = [0] * len(data), ()
    if not without_labels:
        label = only_column(data, datasets.ClassLabel, "label", path)
        class_names = tuple(data.features[label].names)
        labels = data.select_columns([label]).with_format("arrow")[:][label].to_pylist()
        if missing := sum(value is None or not 0 <= value < len(class_names) for value in labels):
            raise UserError(
                f"{path}: {missing} images have no label; choose another split, ID:SPLIT, or take all without classes "
                "(--unlabelled)"
            )
    rows = data.cast_column(image, datasets.Image(decode=False))
    name = local.resolve().name if local.exists() else path  # the same, however the folder is typed
    names = [f"{name}#{k}" for k in range(len(labels))]
    read = partial(_read_row, rows, image)
    return ImageSource(path, names, labels, class_names, read, range(len(names)), files=files, version=version)


def _read_row(rows: Any, column: str, index: int) -> bytes:
    entry = rows[index][column] or {}  # None for a row without an image
    if entry.get("bytes") is None and entry.get("path") is None:
        raise OSError("its row has none")
    return entry["bytes"] if entry["bytes"] is not None else read_file(entry["path"])


def only_column(data, kind: type, preferred: str, path: str) -> str:
    """The column of that `kind` of a data set of `datasets`; the `preferred` one of several. A UserError if unclear."""
    found = [name for name, feature in data.features.items() if isinstance(feature, kind)]
    if preferred in found or len(found) == 1:
        return preferred if preferred in found else found[0]
    raise UserError(
        f"{path} has no {kind.__name__} column '{preferred}' (columns: {', '.join(data.features)}); "
        f"rename or cast one to datasets.{kind.__name__}"
    )
