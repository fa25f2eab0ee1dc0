"""Measuring samples.

`measure(images, reference, metrics)` scores one set of images, `Measure(metrics, reference)` several against the same
reference, `Judge(metrics, reference)` the samples of a run, whose labels are known. `metrics.names()` lists them.
`epochs_to` tells when runs reached a score, `check_autoencoder` what an autoencoder loses.
"""

from dic_repa.evaluation.epochs import epochs_to
from dic_repa.evaluation.features import frechet_distance, statistics
from dic_repa.evaluation.image_sets import ImageSet, open_images
from dic_repa.evaluation.judge import Judge, judge_digits
from dic_repa.evaluation.measuring import Measure, Measured, measure
from dic_repa.evaluation.metrics import Metric, metrics
from dic_repa.evaluation.reconstruction import RoundTrip, check_autoencoder
from dic_repa.evaluation.scores import Scores, evaluate

__all__ = [
    "ImageSet",
    "Judge",
    "Measure",
    "Measured",
    "Metric",
    "RoundTrip",
    "Scores",
    "check_autoencoder",
    "epochs_to",
    "evaluate",
    "frechet_distance",
    "judge_digits",
    "measure",
    "metrics",
    "open_images",
    "statistics",
]
