"""The data set that `dic-repa prepare` wrote, for training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dic_repa.data.autoencoders import AutoencoderSpec, load_autoencoder
from dic_repa.data.images import decode_image, to_tensor
from dic_repa.data.latents import LatentDataset
from dic_repa.data.prepare import SETTINGS_FILE
from dic_repa.errors import UserError


class Prepared(LatentDataset):
    """Samples of a prepared folder, memory-mapped.

    A sample is a dict: `moments` (2C, size, size), float16 (or `x` (3, size, size) in [-1, 1] where no autoencoder was
    used); `image` (3, H, W), float32 in [0, 1]; `label`, an int64 scalar. Where mirrored moments are stored, the second
    half of the samples are the first, mirrored.

    Args:
        path: the folder.
        size: height and width of the denoiser's data.
        autoencoder: the same autoencoder, where it is no longer found under the name that it had in preparation.
        flip: use the mirrored images, where they are stored.
    """

    def __init__(
        self, path: str | Path, size: int, split: str = "train", autoencoder: str | None = None, flip: bool = True
    ):
        import datasets

        settings = read_settings(path)
        if not (Path(path) / "state.json").is_file():
            raise UserError(f"the preparation of {path} was not finished; run its `dic-repa prepare` again")
        self.path, self.size = Path(path), size
        self.spec = prepared_spec(path, autoencoder)
        self.class_names = tuple(settings["class_names"])
        self.check_size(size, settings["size"] // self.spec.downsample, str(path))
        self.rows = datasets.load_from_disk(str(path)).with_format("arrow")
        self.flip = flip and settings["flip"]

    def __len__(self) -> int:
        return len(self.rows) * (2 if self.flip else 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.rows[index % len(self.rows)]
        flipped = index >= len(self.rows)
        stored = row["image"][0]["bytes"].as_py()
        image = to_tensor(decode_image(stored, f"{self.path}, image {index}"))
        image = image.flip(-1) if flipped else image
        sample = {"image": image, "label": torch.tensor(row["label"][0].as_py())}
        if self.spec.name == "none":
            return sample | {"x": image * 2 - 1}
        values = _flat(row["moments_flipped" if flipped else "moments"].chunk(0))
        shape = (2 * self.spec.channels, self.size, self.size)
        return sample | {"moments": torch.from_numpy(values.reshape(shape).copy())}


def read_settings(path: str | Path) -> dict:
    """The `prepare.json` of a prepared folder."""
    file = Path(path) / SETTINGS_FILE
    if not file.is_file():
        raise UserError(f"{path} is no prepared data set (it has no {SETTINGS_FILE}); make one by `dic-repa prepare`")
    return json.loads(file.read_text())


def prepared_spec(path: str | Path, autoencoder: str | None = None) -> AutoencoderSpec:
    """The spec of the autoencoder that a folder was prepared with; a UserError where `autoencoder` is another one."""
    found = AutoencoderSpec.from_dict(read_settings(path)["autoencoder"])
    if autoencoder is None or autoencoder == found.name:
        return found
    given = load_autoencoder(autoencoder).spec
    if given.fingerprint != found.fingerprint:
        raise UserError(f"{path} was prepared with the autoencoder {found.name}, not with {autoencoder}")
    return given


def _flat(array) -> np.ndarray:
    """The values of a one-row Array3D column, as they lie in the file."""
    values = array.storage
    while hasattr(values, "flatten") and values.type.num_fields:
        values = values.flatten()
    return values.to_numpy(zero_copy_only=True)
