"""Measuring samples: the Fréchet distance and the judge of digits.

A recipe names its metric: `metrics.get(name)(images, labels)` gives a dict of scores, for images (N, C, H, W) in [0,
1].
"""

from dic_repa.evaluation.digits import judge_digits
from dic_repa.evaluation.frechet import frechet_distance, statistics
from dic_repa.registry import Registry

metrics = Registry("metric")
metrics.register("digits")(judge_digits)

__all__ = ["frechet_distance", "judge_digits", "metrics", "statistics"]
