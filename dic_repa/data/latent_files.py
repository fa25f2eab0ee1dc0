"""Data that was prepared for REPA or DiT, read without conversion.

REPA's preprocessing writes images/ (picture files) and vae-sd/ (.npy moments and dataset.json), each a folder or a zip.
DiT's, which DiC's authors use, writes *_features/ (.npy latents, already scaled) and *_labels/ (.npy labels of the same
names), and no images.
"""

import io
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dic_repa.data.autoencoders import load_spec
from dic_repa.data.autoencoders.spec import SCALING_FACTOR
from dic_repa.data.files import FileTree, open_tree, stamp
from dic_repa.data.images import EXTENSIONS, decode_image, to_levels
from dic_repa.data.labels import read_labels
from dic_repa.data.latents import LatentDataset
from dic_repa.data.registry import register_dataset
from dic_repa.errors import UserError, first_line
from dic_repa.files.npz import read_array
from dic_repa.limits import check_limit

DEFAULT_AUTOENCODER = "stabilityai/sd-vae-ft-ema"


@register_dataset("repa")
class RepaLayout(LatentDataset):
    """Samples of REPA's layout: dicts of `moments` (2C, size, size), `image` (3, H, W), uint8, and `label`.

    `path` has images/ and vae-sd/ (or images.zip and vae-sd.zip). They pair up in sorted order of their names, labels
    come from vae-sd/dataset.json, as REPA does it. `num_classes` is by default one more than the highest label. The
    scale and shift of the `autoencoder` matter: it must be what made the moments.
    """

    default_autoencoder = DEFAULT_AUTOENCODER

    def __init__(
        self,
        path: str | Path,
        size: int,
        split: str = "train",
        autoencoder: str = DEFAULT_AUTOENCODER,
        num_classes: int | None = None,
    ):
        self.path, self.size, self.spec = Path(path), size, load_spec(autoencoder)
        self.images, self.moments = _part(self.path, "images"), _part(self.path, "vae-sd")
        self.image_names = self.images.ending_in(EXTENSIONS | {".npy"})
        self.moment_names = self.moments.ending_in({".npy"})
        if not self.moment_names or len(self.image_names) != len(self.moment_names):
            raise UserError(
                f"{path} has {len(self.image_names)} images and {len(self.moment_names)} moments; each needs the other"
            )
        table = _read(self.moments, "dataset.json")
        self.labels, names, _ = read_labels(table, f"{self.moments.path}/dataset.json", self.moment_names)
        check_limit("classes", num_classes or 0, "data.options.num_classes")
        if num_classes is not None and len(names) > num_classes:
            raise UserError(f"{path} has the label {len(names) - 1}, which is beyond num_classes {num_classes}")
        self.class_names = tuple(map(str, range(num_classes))) if num_classes else names
        self.check_size(size, _side(self.moments, self.moment_names[0]), str(path))

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the images for a feature cache."""
        place = self.images.path
        return stamp([place] if place.is_file() else [place / name for name in self.image_names])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        shape = (self.spec.moments, self.size, self.size)
        sample = {
            "moments": _latents(self.moments, self.moment_names[index], shape),
            "label": torch.tensor(self.labels[index]),
        }
        if not self.with_images:
            return sample
        image = self._image(self.image_names[index])
        if image.shape != self.image_shape:
            found, first = ("x".join(map(str, shape)) for shape in (image.shape, self.image_shape))
            raise UserError(f"{self.images.path}/{self.image_names[index]} is {found}, the first image {first}")
        return sample | {"image": image}

    @cached_property
    def image_shape(self) -> torch.Size:
        return self._image(self.image_names[0]).shape

    def _image(self, name: str) -> Tensor:
        if not name.lower().endswith(".npy"):
            return to_levels(decode_image(_read(self.images, name), name))
        levels = _array(self.images, name)
        if levels.ndim < 2:
            raise UserError(f"{self.images.path}/{name} is no image (3, H, W), but of the shape {list(levels.shape)}")
        return torch.from_numpy(levels.reshape(-1, *levels.shape[-2:]))


@register_dataset("dit")
class DitLayout(LatentDataset):
    """Samples of the DiC authors' layout: dicts of `x` (C, size, size), the latents as they are, and `label`.

    `path` has NAME_features/ and NAME_labels/, whose labels are read one by one as they are used. There are no images,
    so nothing can be aligned to an encoder. The `autoencoder` is for decoding samples.
    """

    default_autoencoder = DEFAULT_AUTOENCODER

    def __init__(
        self,
        path: str | Path,
        size: int,
        split: str = "train",
        autoencoder: str = DEFAULT_AUTOENCODER,
        num_classes: int = 1000,
    ):
        self.path, self.size, self.spec = Path(path), size, load_spec(autoencoder)
        self.features = _only_folder(self.path, "_features")
        self.labels = _only_folder(self.path, "_labels")
        self.names = self.features.ending_in({".npy"})
        # The two folders number the same files; labels that miss one would pair the rest wrongly.
        labelled = set(self.labels.names)
        if missing := [name for name in self.names if name not in labelled]:
            raise UserError(f"{self.labels.path} misses the labels of {len(missing)} files, such as {missing[0]}")
        if not self.names:
            raise UserError(f"{self.features.path} holds no .npy files")
        check_limit("classes", num_classes, "data.options.num_classes")
        self.class_names = tuple(str(k) for k in range(num_classes))
        self.check_size(size, _side(self.features, self.names[0]), str(path))

    def normalise(self, how: str) -> None:
        if how != SCALING_FACTOR:
            raise UserError(
                f"latent.normalise={how}: the latents in {self.path} are the denoiser's data already; leave it out"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name = self.names[index]
        stored = _array(self.labels, name)
        if stored.size != 1 or stored.dtype.kind not in "iu":
            raise UserError(f"{self.labels.path}/{name} is not one class number, but {stored.dtype} {stored.shape}")
        label = int(stored.reshape(()))
        if not 0 <= label < self.num_classes:
            raise UserError(f"{self.labels.path}/{name} is {label}, beyond num_classes {self.num_classes}")
        x = _latents(self.features, name, (self.channels, self.size, self.size))
        return {"x": x.float(), "label": torch.tensor(label)}


def _part(path: Path, name: str) -> FileTree:
    for place in (path / name, path / f"{name}.zip"):
        if place.exists():
            return _whole(place)
    raise UserError(f"{path} has neither {name}/ nor {name}.zip, which REPA's layout needs")


def _only_folder(path: Path, ending: str) -> FileTree:
    found = [entry for entry in path.glob(f"*{ending}") if entry.is_dir()] if path.is_dir() else []
    if len(found) != 1:
        raise UserError(f"{path} must hold one folder *{ending}, and holds {len(found)}")
    return _whole(found[0])


def _whole(place: Path) -> FileTree:
    """The tree at `place`, refused if a file of it cannot be read: images and latents pair up by their order."""
    tree = open_tree(place)
    for name, reason in sorted(tree.left_out.items()):
        raise UserError(f"{place}/{name} is {reason}; restore or remove it")
    return tree


def _array(tree: FileTree, name: str) -> np.ndarray:
    """A .npy file; never anything pickled."""
    content, place = _read(tree, name), f"{tree.path}/{name}"
    try:
        return read_array(io.BytesIO(content), len(content), place)
    except ValueError as error:
        raise UserError(f"{place} is not a whole .npy file of numbers ({first_line(error)}); restore it") from None


def _read(tree: FileTree, name: str) -> bytes:
    try:
        return tree.read(name)
    except OSError as error:
        raise UserError(f"{tree.path}/{name} cannot be read ({error}); restore it") from None


def _side(tree: FileTree, name: str) -> int:
    """The width of the latents in a .npy file."""
    if len(shape := _array(tree, name).shape) < 3:
        raise UserError(f"{tree.path}/{name} has the shape {list(shape)}, and is no latents (C, size, size)")
    return shape[-1]


def _latents(tree: FileTree, name: str, shape: tuple[int, int, int]) -> Tensor:
    array = _array(tree, name)
    if array.size != np.prod(shape) or array.shape[-3:] != shape:
        raise UserError(f"{tree.path}/{name} has the shape {list(array.shape)} instead of {list(shape)}")
    return torch.from_numpy(array.reshape(shape))
