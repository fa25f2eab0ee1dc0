"""One way to score labelled samples, whether by a judge of labelled images or by metrics against a reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dic_repa.errors import UserError, unknown_name
from dic_repa.evaluation import Measure, metrics, scores


def check_names(names: Sequence[str]) -> None:
    """A UserError for a name that is neither a judge's nor a metric's."""
    for name in names:
        if name not in metrics and name not in scores:
            raise unknown_name("metric", name, [*metrics.names(), *scores.names()])


class Judge:
    """`judge(images, labels)` gives a dict of scores, for images (N, C, H, W) in [0, 1].

    Args:
        names: judges ('digits') or metrics (`dic-repa evaluate --list-metrics`), whose scores are merged.
        reference: the real images that metrics compare with, as `Measure` takes them; its features are computed once.

    `better` is 'higher' or 'lower' for each score that has a direction; its first is the `main` one. A judge of your
    own tells it by an attribute `better`. Raises UserError for unknown names and a reference that is missing.
    """

    def __init__(self, names: Sequence[str], reference=None, device: str | torch.device = "cpu"):
        check_names(names)
        self.judges = [metrics.get(name) for name in names if name in metrics]
        measured = [name for name in names if name in scores]
        self.measure = Measure(measured, reference, device) if measured else None
        self.better: dict[str, str] = {}
        for name in names:
            self.better |= (
                {name: scores.get(name).better} if name in scores else getattr(metrics.get(name), "better", {})
            )

    @property
    def main(self) -> str | None:
        return next(iter(self.better), None)

    def check(self, score: str) -> str:
        """`score`, if there is one of that name with a direction; else a UserError."""
        if score not in self.better:
            raise unknown_name("score", score, self.better)
        return score

    def check_size(self, size: tuple[int, int]) -> None:
        """A UserError where images of `size`, (H, W), cannot be compared with the reference."""
        if self.measure:
            self.measure.check_size(size)

    def __call__(self, images: Tensor | Iterable[Tensor], labels: Tensor) -> dict:
        """The scores of images (N, C, H, W), or of batches of them: metrics take these as they come, and never hold all
        of them; a judge of labelled images is given all at once."""
        found: dict = {}
        if self.judges and not isinstance(images, Tensor):
            images = torch.cat(list(images))
        for judge in self.judges:
            found |= judge(images, labels)
        if self.measure is None:
            return found
        batches = images.split(self.measure.batch_size) if isinstance(images, Tensor) else images
        return found | self.measure(batches).values

    def beats(self, score: str, value: float, other: float | None) -> bool:
        """Whether `value` is better than `other`; NaN never is, and anything else beats NaN or None."""
        if math.isnan(value):
            return False
        if other is None or math.isnan(other):
            return True
        return value > other if self.better[score] == "higher" else value < other


def judge_of_score(score: str, judge: str | None, reference, device: str | torch.device = "cpu") -> Judge:
    """Who gives `score`: a metric of that name against `reference`, or else the `judge` that a recipe names."""
    if score in scores:
        return Judge([score], reference, device)
    if judge is None:
        raise unknown_name("metric", score, scores.names())
    found = Judge([judge], reference, device)
    if score not in found.better:
        raise UserError(str(unknown_name("metric", score, [*found.better, *scores.names()])))
    return found
