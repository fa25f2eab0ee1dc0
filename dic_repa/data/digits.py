"""The embedded digits: 10,000 real MNIST images, so that everything runs with no download.

The file is shuffled. The first 8,000 train the denoiser, the encoder and the classifier that measures; the last 2,000
are held out from all three.
"""

from importlib import resources

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dic_repa.data.autoencoders import load_spec
from dic_repa.data.latents import LatentDataset
from dic_repa.data.registry import register_dataset
from dic_repa.errors import unknown_name

NUM_CLASSES = 10
TRAIN_COUNT = 8000
_SPLITS = {"train": slice(0, TRAIN_COUNT), "held-out": slice(TRAIN_COUNT, None)}


def load_digits(split: str = "train") -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28), float32 in [0, 1], and labels (N,), int64, of the split 'train' or 'held-out'."""
    if split not in _SPLITS:
        raise unknown_name("split", split, _SPLITS)
    with resources.files("dic_repa.data").joinpath("assets/mnist_10k.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        images, labels = arrays["images"][_SPLITS[split]], arrays["labels"][_SPLITS[split]]
    return torch.from_numpy(images).unsqueeze(1).float() / 255, torch.from_numpy(labels).long()


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) in [0, 1] to (B, C, size, size), antialiased and clamped to [0, 1]."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp_(0, 1)


@register_dataset("digits")
class Digits(LatentDataset):
    """Samples of `x` (1, size, size) in [-1, 1], `image` (1, 28, 28) in [0, 1] for the encoder, and `label`, int64.

    Behind an `autoencoder` they have no `x`: the training step encodes the `image`, which then has three like channels
    and `size` times the reduction as its height and width.
    """

    num_classes = NUM_CLASSES
    class_names = tuple(str(digit) for digit in range(10))
    splits = tuple(_SPLITS)
    reference_split = "held-out"  # of the reference `digits`

    def __init__(self, split: str = "train", size: int = 16, autoencoder: str = "none"):
        self.size, self.spec = size, load_spec(autoencoder)
        self.images, self.labels = load_digits(split)
        self.x = None
        if self.spec.name == "none":
            self.x = resize(self.images, size) * 2 - 1
        else:
            self.images = resize(self.images, size * self.spec.downsample).expand(-1, 3, -1, -1)

    @property
    def channels(self) -> int:
        return self.spec.channels if self.x is None else 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = {"image": self.images[index], "label": self.labels[index]}
        return sample if self.x is None else {"x": self.x[index]} | sample
