"""Measuring samples.

`measure(images, reference, metrics=["fid"], device="cpu", **options) -> dict[str, float]` scores a set of images:
`images` are batches (B, 1 or 3, H, W), uint8 or float in [0, 1], or an `ImageSet` from `open_images(path)`;
`reference` is a path (folder, `.npz`, prepared data set, saved statistics) or a data set whose samples have an
`image`. `metrics.names()` lists them. `Measure(names, reference, device, **options)` keeps the reference and
the networks for several sets; its call gives a `Measured`, with `values`, `intervals` and `warnings`.

`Judge(names, reference, device)` scores the samples of a run, whose labels are known: `judge(images, labels)`.
"""

from dic_repa.evaluation.frechet import frechet_distance, statistics
from dic_repa.evaluation.image_sets import ImageSet, open_images
from dic_repa.evaluation.measuring import Judge, Measure, Measured, judge_digits, measure
from dic_repa.evaluation.metrics import Metric, metrics

__all__ = [
    "ImageSet",
    "Judge",
    "Measure",
    "Measured",
    "Metric",
    "frechet_distance",
    "judge_digits",
    "measure",
    "metrics",
    "open_images",
    "statistics",
]
