"""Plain images, cropped as they are read and encoded in the training step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dic_repa.data.autoencoders import load_spec
from dic_repa.data.images import center_crop, to_tensor
from dic_repa.data.latents import LatentDataset
from dic_repa.data.sources import open_source


class ImageFolder(LatentDataset):
    """Samples of any source that `dic-repa prepare` takes, without preparation: for a look, and for small data.

    A sample is a dict of `image` (3, H, W) in [0, 1], `label`, and, without an autoencoder, `x` (3, size, size) in [-1,
    1]. With one, the training step encodes the images. With `flip`, the second half of the samples are the first,
    mirrored.

    Args:
        path: a folder, zip, tar or Hugging Face data set.
        size: height and width of the denoiser's data; the images' is that times the autoencoder's reduction.
        autoencoder: 'none' for pixels, a hub id or a local folder.
        labels: a labels file, for a flat folder.
        skip_bad: leave out files that are no image by their names. A damaged one stops the run all the same.
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
    ):
        self.size, self.spec, self.flip = size, load_spec(autoencoder), flip
        self.source = open_source(path, labels, skip_bad)
        self.class_names = self.source.class_names

    def __len__(self) -> int:
        return len(self.source) * (2 if self.flip else 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        picture = self.source.load(index % len(self.source))
        image = to_tensor(center_crop(picture, self.size * self.spec.downsample))
        image = image.flip(-1) if index >= len(self.source) else image
        sample = {"image": image, "label": torch.tensor(self.source.labels[index % len(self.source)])}
        return sample | {"x": image * 2 - 1} if self.spec.name == "none" else sample
