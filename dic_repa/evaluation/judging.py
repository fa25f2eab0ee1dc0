"""Scoring the samples of a run by the metrics that its recipe names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dic_repa.errors import UserError, unknown_name
from dic_repa.evaluation.measuring import Measure
from dic_repa.evaluation.metrics import MetricSet, find_metric, metrics
from dic_repa.recipe import Recipe, load_training_recipe
from dic_repa.recipe.build import import_plugins


def measured(names: Sequence[str], reference) -> list[str]:
    """The metrics among `names` to measure against `reference`; a UserError for an unknown name.

    Left out: sets, which have a reference of their own, and without a `reference` what these sets give.
    """
    parts = {name: metrics.create(name) for name in names}
    given = {score for part in parts.values() if isinstance(part, MetricSet) for score in part.names}
    plain = [name for name, part in parts.items() if not isinstance(part, MetricSet)]
    return [name for name in plain if not (reference is None and name in given)]


def own_encoder(recipe: Recipe) -> dict[str, dict]:
    """The options of the extractor `encoder` for samples of a run: its first alignment's encoder."""
    if not recipe.alignments:
        return {}
    first = recipe.alignments[0]
    return {"encoder": {"encoder": first.encoder, **first.encoder_options}}


def by_encoder(names: Sequence[str]) -> list[str]:
    """The metrics among `names` that compare the tokens of a run's own encoder."""
    return [name for name in names if (metric := find_metric(name)) and metric.layer.startswith("encoder.")]


def encoder_of_runs(paths: Sequence[Path], names: Sequence[str]) -> dict[str, dict]:
    """`own_encoder` of the runs and checkpoints among `paths`, where a metric of `names` takes it.

    Raises:
        UserError: where they were aligned to different ones.
    """
    found: dict[str, dict] = {}
    for path in paths if by_encoder(names) else ():
        file = next((f for f in (path / "recipe.yaml", path / "ema" / "recipe.yaml") if f.is_file()), None)
        if file is None:
            continue
        recipe = load_training_recipe(file)
        import_plugins(recipe)
        own = own_encoder(recipe)
        if own and found and own != found:
            raise UserError(f"{path} was aligned to another encoder than the one before; name one for all by --encoder")
        found = found or own
    return found


class Judge:
    """`judge(images, labels)` gives a dict of scores, for images (N, C, H, W) in [0, 1] and their classes (N,).

    Args:
        names: metrics (`dic-repa evaluate --list-metrics`) or sets of them ('digits'), whose scores are merged.
        reference: the real images that metrics compare with, as `Measure` takes them; its features are computed once.
        extractor_options: as `Measure` takes them; `own_encoder` gives those of a run.

    `better` is 'higher' or 'lower' for each score; its first is the `main` one. A set adds the number of images, what
    its metrics tell besides, and as `reference` the scores of real images.

    Raises:
        UserError: for unknown names and a reference that is missing.
    """

    def __init__(
        self,
        names: Sequence[str],
        reference=None,
        device: str | torch.device = "cpu",
        extractor_options: dict[str, dict] | None = None,
    ):
        own = measured(names, reference)
        sets = [part for name in names if isinstance(part := metrics.create(name), MetricSet)]
        self.sets = [(part, Measure(part.names, part.reference(), device, batch_size=500)) for part in sets]
        self.measure = Measure(own, reference, device, extractor_options=extractor_options) if own else None
        order = [score for part in sets for score in (part.main, *part.names)] + own
        self.better: dict[str, str] = {score: metrics.create(score).better for score in order}

    @property
    def main(self) -> str | None:
        return next(iter(self.better), None)

    def check(self, score: str) -> str:
        """`score`, if this judge gives it; else a UserError."""
        if score not in self.better:
            raise unknown_name("score", score, self.better)
        return score

    def check_size(self, size: tuple[int, int]) -> None:
        """A UserError where images of `size`, (H, W), cannot be compared with the reference."""
        if self.measure:
            self.measure.check_size(size)

    def __call__(self, images: Tensor | Iterable[Tensor], labels: Tensor) -> dict:
        """The scores of images (N, C, H, W), or of batches of them. Batches are held all at once for a set alone."""
        found: dict = {}
        if self.sets:
            images = whole = images if isinstance(images, Tensor) else torch.cat(list(images))
        for part, measure in self.sets:
            part.check(whole, labels)
            scored = measure(whole.split(measure.batch_size), labels=labels)
            found |= {"count": scored.count, **scored.details, **scored.values, "reference": part.bounds(scored.count)}
        if self.measure:
            batches = images.split(self.measure.batch_size) if isinstance(images, Tensor) else images
            found |= self.measure(batches, labels=labels).values
        return found

    def is_better(self, score: str, value: float, other: float | None) -> bool:
        """Whether `value` is better than `other`; NaN never is, and anything else is better than NaN or None."""
        if math.isnan(value):
            return False
        if other is None or math.isnan(other):
            return True
        return value > other if self.better[score] == "higher" else value < other


def judge_digits(images: Tensor, labels: Tensor) -> dict:
    """The scores of images (N, 1, H, W), float in [0, 1], that should show the digits `labels` (N,).

    Returns:
        A dict that JSON can hold: `count`, `recognised`, `recognised_count`, `recognised_by_class` and `fd-digits` as
        the metrics of these names give them (label 10, the null class, asks for no digit), and `reference`, what real
        digits reach.

    Raises:
        UserError: for fewer than two images, other shapes, values that are not in [0, 1], and unknown labels.
    """
    return Judge(["digits"], device=images.device)(images, labels)


def judge_of_score(score: str | None, judge: str | None, reference, *options) -> Judge:
    """A judge that gives `score`: the set `judge` of a recipe, if it does so and there is no `reference`.

    Without a `score`, the `judge` itself.
    """
    part = metrics.create(judge) if judge else None
    if judge and (score is None or (isinstance(part, MetricSet) and score in part.names and reference is None)):
        score = judge
    return Judge([score or ""], reference, *options)
