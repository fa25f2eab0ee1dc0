"""Plain images, cropped as they are read and encoded in the training step."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dic_repa.data.autoencoders import load_spec
from dic_repa.data.images import center_crop, to_levels
from dic_repa.data.latents import LatentDataset
from dic_repa.data.sources import open_source


class ImageFolder(LatentDataset):
    """Samples of any source that `dic-repa prepare` takes, without preparation: for small data.

    A sample is a dict of `image` (3, H, W), uint8, and `label`; the training step encodes the image. With `flip`, the
    second half of the samples mirrors the first.

    Args:
        path: a folder, zip, tar or Hugging Face data set.
        size: height and width of the denoiser's data; images are larger by the autoencoder's reduction.
        autoencoder: 'none' for pixels, a hub id or a local folder.
        labels: a labels file for a flat folder, which is otherwise one class.
        skip_bad: leave out files that are not named as images. A damaged image still stops the run.
        unlabelled: no image has a class.
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
    ):
        self.size, self.spec, self.flip = size, load_spec(autoencoder), flip
        self.source = open_source(path, labels, skip_bad, unlabelled)
        self.class_names = self.source.class_names

    @cached_property
    def fingerprint(self) -> str:
        """What a feature cache knows the images by."""
        return f"{self.source.state()} {self.size} {self.flip}"

    def __len__(self) -> int:
        return len(self.source) * (2 if self.flip else 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture = self.source.load(index % len(self.source))
        image = to_levels(center_crop(picture, self.size * self.spec.downsample))
        image = image.flip(-1) if index >= len(self.source) else image
        return {"image": image, "label": torch.tensor(self.source.labels[index % len(self.source)])}
