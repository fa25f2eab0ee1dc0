"""Measuring samples.

`measure(images, reference, metrics=["fid"], device="cpu", **options) -> dict[str, float]` scores a set of images:
`images` are batches (B, 1 or 3, H, W), uint8 or float in [0, 1], or an `ImageSet` from `open_images(path)`;
`reference` is a path (folder, `.npz`, prepared data set, saved statistics) or a data set whose samples have an
`image`. `scores.names()` lists the metrics. `Measure(metrics, reference, device, **options)` keeps the reference and
the networks for several sets; its call gives a `Measured`, with `values`, `intervals` and `warnings`.

A recipe's `evaluate.metric` names a judge of labelled images instead: `metrics.find(name)(images, labels)` gives a dict
of scores, for images (N, C, H, W) in [0, 1].
"""

from dic_repa.evaluation.digits import judge_digits
from dic_repa.evaluation.frechet import frechet_distance, statistics
from dic_repa.evaluation.image_sets import ImageSet, open_images
from dic_repa.evaluation.measuring import Measure, Measured, measure
from dic_repa.evaluation.scores import Score, scores
from dic_repa.registry import Registry

metrics = Registry("metric")
metrics.register("digits")(judge_digits)

__all__ = [
    "ImageSet",
    "Measure",
    "Measured",
    "Score",
    "frechet_distance",
    "judge_digits",
    "measure",
    "metrics",
    "open_images",
    "scores",
    "statistics",
]
