"""Judging digits by a small network of its own, which `train_digits` has trained on the training split."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar

from safetensors.torch import load
from torch import Tensor, nn

from dic_repa.data.digits import NUM_CLASSES, load_digits, resize
from dic_repa.errors import UserError
from dic_repa.evaluation.extractors import extractors, tensors_fingerprint
from dic_repa.evaluation.features import FeatureSet, extract, frechet_distance, statistics
from dic_repa.evaluation.metrics import Metric, MetricSet, metrics

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


@extractors.register("digits")
class Digits(nn.Module):
    """The package's classifier of digits: `features`, the 64 numbers before its head, and `logits` of ten digits."""

    layers = ("features", "logits")
    resizing = "area to 16, grey"
    notes = ()

    def __init__(self):
        super().__init__()
        self.model = DigitsClassifier()
        weights = resources.files("dic_repa.evaluation").joinpath("weights/digits_classifier.safetensors")
        self.model.load_state_dict(load(weights.read_bytes()))
        self.fingerprint = tensors_fingerprint(self.model.state_dict())
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        grey = images.float().mean(dim=1, keepdim=True) / 255
        features = self.model.features(resize(grey, IMAGE_SIZE))
        return {"features": features, "logits": self.model.head(features)}


@metrics.register("recognised")
@dataclass(frozen=True)
class Recognised(Metric):
    """The share of digits that the judge reads as the class that was asked for; None if none was."""

    layer: str = "digits.logits"
    title: str = "recognised"
    better: ClassVar[str] = "higher"
    needs: ClassVar[str] = "labels"
    most: ClassVar[float | None] = 1.0

    def __call__(self, features: Tensor, labels: Tensor) -> float | None:
        asked = labels.cpu() < NUM_CLASSES
        return self._right(features, labels)[asked].double().mean().item() if asked.any() else None

    def details(self, features: Tensor, labels: Tensor) -> dict[str, Any]:
        """`recognised_count`, and `recognised_by_class`: the share of each class that was asked for, else None."""
        right = self._right(features, labels)
        by_class = [right[labels.cpu() == digit] for digit in range(NUM_CLASSES)]
        shares = {str(d): r.double().mean().item() if len(r) else None for d, r in enumerate(by_class)}
        return {"recognised_count": int(right.sum()), "recognised_by_class": shares}

    def deviation(self, features: Tensor, labels: Tensor, times: int) -> float:
        share, asked = self(features, labels), int((labels < NUM_CLASSES).sum())
        return 0.0 if share is None else math.sqrt(share * (1 - share) / asked)

    @staticmethod
    def _right(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.argmax(dim=1).cpu() == labels.cpu()


@metrics.register("digits")
class DigitsJudge(MetricSet):
    """Are digits read as asked (`recognised`), and are they spread as the 2,000 held-out ones are (`fd-digits`)?

    `bounds` are what the held-out digits score in `recognised`, and in `fd-digits` as many training digits as there are
    samples, since a distance grows as samples get fewer.
    """

    def __init__(self):
        super().__init__(("recognised", "fd-digits"), main="fd-digits")

    def reference(self) -> FeatureSet:
        features, _ = _real("held-out")
        return FeatureSet(len(features), gaussians={"digits.features": statistics(features)})

    def bounds(self, count: int) -> dict[str, Any]:
        (features, _), (held_out, recognised) = _real("train", count), _real("held-out")
        distance = frechet_distance(*statistics(features), *statistics(held_out))
        return {"recognised": recognised, "fd-digits": distance, "count": len(features)}

    def check(self, images: Tensor, labels: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) < 2 or not images.is_floating_point():
            raise UserError(
                "the digits to judge must be at least two float images (N, 1 or 3, H, W), "
                f"not {images.dtype} of shape {tuple(images.shape)}"
            )
        fits = labels.shape == (len(images),) and not labels.is_floating_point()
        if not fits or labels.min() < 0 or labels.max() > NUM_CLASSES:
            known = f"from 0 to {NUM_CLASSES - 1}, or {NUM_CLASSES} for none"
            raise UserError(f"labels must be {len(images)} integers {known}, not {labels.dtype} {labels.tolist()[:5]}")


@functools.cache
def _real(split: str, count: int | None = None) -> tuple[Tensor, float]:
    """The features (N, 64) of a split's digits, or of its first `count`, and the share of them that is read right."""
    images, labels = (part[:count] for part in load_digits(split))
    found = extract(images.split(500), {"digits": extractors.create("digits")}, ["digits.features", "digits.logits"])
    right = found.features["digits.logits"].argmax(dim=1) == labels
    return found.features["digits.features"], right.double().mean().item()
