"""One way to score labelled samples, whether by a judge of labelled images or by metrics against a reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dic_repa.errors import unknown_name
from dic_repa.evaluation import Measure, metrics, scores
from dic_repa.recipe import Recipe


def check_names(names: Sequence[str]) -> None:
    """A UserError for a name that is neither a judge's nor a metric's."""
    for name in names:
        if name not in metrics and name not in scores:
            raise unknown_name("metric", name, [*metrics.names(), *scores.names()])


def directions(name: str) -> dict[str, str]:
    """'higher' or 'lower', which is better, for each score that the judge or metric of this name gives."""
    return {name: scores.find(name).better} if name in scores else getattr(metrics.find(name), "better", {})


def all_directions() -> dict[str, str]:
    """The directions of all scores that are known."""
    return {score: better for name in [*metrics.names(), *scores.names()] for score, better in directions(name).items()}


def measured(names: Sequence[str], reference) -> list[str]:
    """The metrics among `names`, but for those that a judge among them gives as well where there is no `reference`."""
    judged = {score for name in names if name in metrics for score in directions(name)}
    return [name for name in names if name in scores and not (reference is None and name in judged)]


def title(score: str) -> str:
    """How a score is called where it is shown: a metric by its title ('FD-digits'), another by its name."""
    return scores.find(score).title if score in scores else score


def own_encoder(recipe: Recipe) -> dict[str, dict]:
    """What `Measure` is to build the extractor `encoder` with, for samples of a run: its first alignment's encoder."""
    if not recipe.alignments:
        return {}
    first = recipe.alignments[0]
    return {"encoder": {"encoder": first.encoder, **first.encoder_options}}


def by_encoder(names: Sequence[str]) -> list[str]:
    """The metrics among `names` that compare the tokens of a run's own encoder."""
    return [name for name in names if name in scores and scores.find(name).layer.startswith("encoder.")]


class Judge:
    """`judge(images, labels)` gives a dict of scores, for images (N, C, H, W) in [0, 1].

    Args:
        names: judges ('digits') or metrics (`dic-repa evaluate --list-metrics`), whose scores are merged.
        reference: the real images that metrics compare with, as `Measure` takes them; its features are computed once.
        extractor_options: as `Measure` takes them; `own_encoder` gives those of a run.

    `better` is 'higher' or 'lower' for each score that has a direction; its first is the `main` one. A judge of your
    own tells it by an attribute `better`, and by `most` what a score cannot exceed (1 for a share), for the report.
    Raises UserError for unknown names and a reference that is missing.
    """

    def __init__(
        self,
        names: Sequence[str],
        reference=None,
        device: str | torch.device = "cpu",
        extractor_options: dict[str, dict] | None = None,
    ):
        check_names(names)
        self.judges = [metrics.find(name) for name in names if name in metrics]
        own = measured(names, reference)
        self.measure = Measure(own, reference, device, extractor_options=extractor_options) if own else None
        self.better = {score: better for name in names for score, better in directions(name).items()}

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


def judge_of_score(
    score: str,
    judge: str | None,
    reference,
    device: str | torch.device = "cpu",
    extractor_options: dict[str, dict] | None = None,
) -> Judge:
    """Who gives `score`: the `judge` that a recipe names, unless there is a `reference` to measure a metric against."""
    judged = directions(judge) if judge else {}
    if score in scores and (reference is not None or score not in judged):
        return Judge([score], reference, device, extractor_options)
    if judge is None or score not in judged:
        raise unknown_name("metric", score, [*judged, *scores.names()])
    return Judge([judge], reference, device, extractor_options)
