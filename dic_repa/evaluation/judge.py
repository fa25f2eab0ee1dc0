"""Who scores the samples of a run: a `Judge`, by the metrics of its recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dic_repa.data.registry import datasets, named_data
from dic_repa.errors import UserError, unknown_name
from dic_repa.evaluation.extractors import LITE2, extractors, judged_by_its_teacher, no_fid
from dic_repa.evaluation.image_sets import ImageSet, near_data, open_data, open_images
from dic_repa.evaluation.measuring import Measure, check_metrics
from dic_repa.evaluation.metrics import MetricSet, find_metric, metrics, plain_names
from dic_repa.evaluation.ratios import find_ratios
from dic_repa.recipe import Recipe


class Judge:
    """`judge(images, labels)` gives a dict of scores, for images (N, C, H, W) in [0, 1] and their classes (N,).

    `reference`, `extractor_options` and `bound` are those of `Measure`.

    Args:
        names: metrics or sets of them ('digits'), whose scores are merged.

    `better` is 'higher' or 'lower' for each score; its first is the `main` one. A set adds the number of images and the
    `details` of its metrics. As `reference` come the scores of real images: those of the `bound`, and what a set knows.

    Raises:
        UserError: for unknown names and a reference that is missing.
    """

    def __init__(
        self,
        names: Sequence[str],
        reference=None,
        device: str | torch.device = "cpu",
        extractor_options: dict[str, dict] | None = None,
        bound=None,
    ):
        own = check_metrics(names, reference)
        sets = [part for name in names if isinstance(part := metrics.create(name), MetricSet)]
        self.sets = [(part, Measure(part.names, part.reference(), device, batch_size=500)) for part in sets]
        given = {"extractor_options": extractor_options, "bound": bound}
        self.measure = Measure(own, reference, device, **given) if own else None
        order = [score for part in sets for score in (part.main, *part.names)] + own + plain_names(own)
        self.better: dict[str, str] = {score: metrics.create(score).better for score in order}
        self.main = next(iter(self.better), None)

    def check(self, score: str) -> str:
        """`score`, if this judge gives it; else a UserError."""
        if score not in self.better:
            raise unknown_name("score", score, self.better)
        return score

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
            measured = self.measure(batches, labels=labels)
            found |= measured.values
            if real := measured.real:
                found["reference"] = found.get("reference", {}) | {"count": real.count, **real.values}
        return found

    def is_better(self, score: str, value: float, other: float | None) -> bool:
        """Whether `value` is better than `other`; NaN never is, and anything else is better than NaN or None."""
        if math.isnan(value) or other is None or math.isnan(other):
            return not math.isnan(value)
        return value > other if self.better[score] == "higher" else value < other


def judge_digits(images: Tensor, labels: Tensor) -> dict:
    """The scores of images (N, 1 or 3, H, W), float in [0, 1], that should show the digits `labels` (N,).

    Returns:
        A dict for JSON: `count`, `recognised`, `recognised_count`, `recognised_by_class` and `fd-digits` (label 10, the
        null class, asks for no digit), and `reference`, what real digits reach.

    Raises:
        UserError: for fewer than two images, other shapes, values that are not in [0, 1], and unknown labels.
    """
    return Judge(["digits"], device=images.device)(images, labels)


def judge_of(recipe: Recipe, device: str | torch.device) -> Judge:
    """The judge that the recipe's `evaluate` section asks for."""
    section = recipe.evaluate
    assert section is not None
    return _judge_by(section.names, recipe, section.reference, device)


def judge_of_score(recipe: Recipe, score: str | None, reference: str | None, device: str | torch.device) -> Judge:
    """A judge that gives `score`, by default that of the recipe's metric.

    It is the recipe's set of metrics, if that gives the score and there is no `reference`; else a metric, which
    compares with the recipe's reference by default.
    """
    section = recipe.evaluate
    own = metrics.create(section.metric) if section else None
    if section and isinstance(own, MetricSet) and (score is None or (score in own.names and reference is None)):
        return _judge_by([section.metric], recipe, None, device)
    name = score or (section.metric if section else "")
    return _judge_by([name], recipe, reference or (section.reference if section else None), device)


def _judge_by(names: Sequence[str], recipe: Recipe, reference: str | None, device: str | torch.device) -> Judge:
    bound = real_images(recipe, recipe.evaluate.bound) if recipe.evaluate else None
    return Judge(names, real_images(recipe, reference), device, own_encoder(recipe), bound)


def real_images(recipe: Recipe, source: str | None) -> ImageSet | str | None:
    """What `source` means in a recipe: a named data set is of the size and file that the recipe trains on."""
    named, data = named_data(source) if source else None, recipe.data
    if source is None or named is None or named[0] != data.name:
        return source
    given = {"split": named[1], "size": data.size, "path": data.place, "autoencoder": data.autoencoder}
    return open_data(datasets.create(data.name, **{key: value for key, value in given.items() if value}), source)


def real_name(recipe: Recipe) -> str:
    """What real images are called that are shown beside samples: the bound, or else the data."""
    return (recipe.evaluate.bound if recipe.evaluate else None) or recipe.data.name


def own_encoder(recipe: Recipe) -> dict[str, dict]:
    """The options of the extractor `encoder` for samples of a run: its first encoder; empty if it has none."""
    first = next((section for section in recipe.alignments if section.encoder), None)
    return {"encoder": {"encoder": first.encoder, **first.encoder_options}} if first else {}


def by_encoder(names: Iterable[str], extractor: str = "encoder") -> list[str]:
    """The metrics among `names` that compare the features of an extractor; by default the run's own encoder."""
    parts = [part for name in names if (metric := find_metric(name)) for part in getattr(metric, "names", (name,))]
    return [name for name in parts if metrics.create(name).layer.startswith(f"{extractor}.")]


def notes_on_scores(names: Iterable[str], recipe: Recipe) -> list[str]:
    """What a reader of a run's scores should know of the encoders behind them: no FID, and perhaps its own teacher."""
    teachers = [section.encoder for section in recipe.alignments if section.encoder]
    judges = teachers[:1] if by_encoder(names) else []
    judges += [LITE2] if by_encoder(names, "lite2") else []
    notes = [(no_fid(judge), judged_by_its_teacher(judge) if judge in teachers else "") for judge in judges]
    return [note for pair in notes for note in pair if note]


def check_judge(names: Sequence[str], reference, extractor_options: dict[str, dict] | None = None, bound=None) -> None:
    """Load what judges samples, and forget it: a UserError now where weights, `reference` or `bound` are missing."""
    find_ratios(names, bound)
    layers = [metrics.create(name).layer for name in plain_names(names)]
    for network in dict.fromkeys(layer.partition(".")[0] for layer in layers):
        extractors.find(network)(**(extractor_options or {}).get(network, {}))
    for what, source in (("reference", reference), ("bound", bound)):
        if isinstance(source, str) and not Path(source).exists():
            if not named_data(source):
                raise UserError(f"there is no {what} {source} to compare samples with{near_data(source)}")
            open_images(source)  # its split may be unknown
