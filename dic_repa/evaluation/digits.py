"""Judging digits: are they read as the digit that was asked for, and are they spread as real ones are?

The judge is a small convolutional network that shares neither architecture nor weights with the encoder that training
is aligned with; `train_digits_classifier` trained it, on the training split.
"""

from __future__ import annotations

import functools
from importlib import resources

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dic_repa.data.digits import NUM_CLASSES, load_digits, resize
from dic_repa.errors import UserError
from dic_repa.evaluation.frechet import frechet_distance, statistics
from dic_repa.runtime.precision import tf32

IMAGE_SIZE = 16
FEATURES = 64


class DigitsClassifier(nn.Module):
    """Digits (B, 1, 16, 16) in [0, 1] to logits (B, 10); `features` gives the 64 numbers that they are read from."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.body = nn.Sequential(
            *_conv(1, width),
            *_conv(width, width),
            nn.MaxPool2d(2),
            *_conv(width, 2 * width),
            *_conv(2 * width, 2 * width),
            nn.MaxPool2d(2),
            *_conv(2 * width, 2 * width),
            nn.Flatten(),
            nn.Linear(2 * width * (IMAGE_SIZE // 4) ** 2, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images - 0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def _conv(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()]


def judge_digits(images: Tensor, labels: Tensor) -> dict:
    """What the judge makes of images (N, 1, H, W), float in [0, 1], and the classes (N,) that they should show.

    Returns a dict that JSON can hold:
    - `count`: N; `recognised_count` and `recognised`: how many, and which share of those with a class, are read as it;
      the share is None where no image was asked to show one (label 10, the null class);
    - `recognised_by_class`: that share for each class, by its name; None where no image should show it;
    - `fd-digits`: the Fréchet distance of the judge's features to those of the 2,000 held-out digits, as the metric of
      that name measures it against `digits`;
    - `reference`: the bounds that real digits set: `recognised`, the share of the held-out ones that the judge reads
      right, and `fd-digits`, the distance to them of the first `count` training digits: as many as were judged,
      because the distance grows as samples get fewer.

    Shares lie in [0, 1].

    Raises UserError for fewer than two images, other shapes or types, values that are not in [0, 1], and unknown
    labels.
    """
    _check(images, labels)
    labels = labels.cpu()
    features, predicted = _read(images)
    asked = labels < NUM_CLASSES
    right = predicted == labels
    by_class = [right[labels == digit] for digit in range(NUM_CLASSES)]
    return {
        "count": len(images),
        "recognised_count": int(right.sum()),
        "recognised": right[asked].double().mean().item() if asked.any() else None,
        "recognised_by_class": {str(d): r.double().mean().item() if len(r) else None for d, r in enumerate(by_class)},
        "fd-digits": frechet_distance(*statistics(features), *_held_out()[0]),
        "reference": _reference(len(images)),
    }


# The first is what a search goes by.
judge_digits.better = {"fd-digits": "lower", "recognised": "higher"}  # type: ignore[attr-defined]  # of a function
judge_digits.most = {"recognised": 1.0}  # type: ignore[attr-defined]


def _check(images: Tensor, labels: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 1 or not images.is_floating_point():
        raise UserError(
            f"the digits to judge must be float (N, 1, H, W), not {images.dtype} of shape {tuple(images.shape)}"
        )
    if len(images) < 2:
        raise UserError(f"judging takes at least two images, not {len(images)}; sample more")
    if not images.isfinite().all():
        bad = int((~images.isfinite()).flatten(1).any(dim=1).sum())
        raise UserError(f"{bad} of {len(images)} images hold NaN or infinity; the training may have diverged")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise UserError(
            f"the digits to judge must lie in [0, 1], not from {low:.3g} to {high:.3g}; rescale or clamp them"
        )
    if labels.shape != (len(images),) or labels.is_floating_point():
        raise UserError(
            f"labels must be {len(images)} integers, one for each image, not {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() > NUM_CLASSES:
        raise UserError(
            f"labels must be 0 to {NUM_CLASSES - 1}, or {NUM_CLASSES} for none, "
            f"not from {labels.min().item()} to {labels.max().item()}"
        )


@functools.cache
def load_digits_classifier(device: torch.device | str = "cpu") -> DigitsClassifier:
    """The judge with the weights in the package, in eval mode."""
    model = DigitsClassifier()
    with resources.as_file(
        resources.files("dic_repa.evaluation").joinpath("weights/digits_classifier.safetensors")
    ) as path:
        model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False).to(device)


@tf32(False)
@torch.no_grad()
def _read(images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, 64) and predicted classes (N,), both on the CPU, of images (N, 1, H, W)."""
    model = load_digits_classifier(images.device)
    features = torch.cat([model.features(resize(part.float(), IMAGE_SIZE)) for part in images.split(500)])
    return features.cpu(), model.head(features).argmax(dim=1).cpu()


@functools.cache
def _held_out() -> tuple[tuple[Tensor, Tensor], float]:
    """The statistics of the held-out digits' features, and the share of them that is read right."""
    images, labels = load_digits("held-out")
    features, predicted = _read(images)
    return statistics(features), (predicted == labels).double().mean().item()


@functools.cache
def _reference(count: int) -> dict:
    held_out, recognised = _held_out()
    images, _ = load_digits("train")
    features, _ = _read(images[:count])
    return {
        "recognised": recognised,
        "fd-digits": frechet_distance(*statistics(features), *held_out),
        "count": len(features),
    }
