"""How long runs took until a score, from the scores that they have over their steps: EP of RAEv2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dic_repa.errors import UserError, unknown_name
from dic_repa.evaluation.measuring import OF_REFERENCE
from dic_repa.evaluation.metrics import Metric, MetricSet, find_metric, metrics
from dic_repa.evaluation.records import read_evaluations
from dic_repa.recipe import Recipe
from dic_repa.recipe.build import build_dataset, import_plugins
from dic_repa.runs.folder import RunFolder

# What is known of the ratio of two numbers of epochs, by what is known of both.
_OF_RATIO = {
    ("", ""): "",
    ("at most ", ""): "at most ",
    ("more than ", ""): "more than ",
    ("", "at most "): "at least ",
    ("more than ", "at most "): "more than ",
    ("", "more than "): "less than ",
    ("at most ", "more than "): "less than ",
}


@dataclass(frozen=True)
class Reached:
    """When the samples of a run, drawn in one way, first reached a score.

    step: the first scored step that reaches it; if none does, the last one scored.
    before: the scored step before it, which does not; None where `step` is the first that was scored.
    known: "at most ", if no earlier step is scored; "more than ", if none reaches it; else "".
    best: the best score of all steps.
    images: that were trained on until `step`; epoch: how many the data has, None where it is not here.
    """

    run: str
    score: str
    sampling: str
    step: int
    before: int | None
    known: str
    best: float
    images: int
    epoch: int | None

    def times_fewer(self, other: Reached) -> str:
        """How many times fewer images than the `other` run it took, in words; "" where that is not known."""
        words = _OF_RATIO.get((other.known, self.known))
        return "" if words is None else f"{words}{other.images / self.images:.2g}"


def epochs_to(value: float, runs: Sequence[str | Path], score: str | None = None) -> list[Reached]:
    """When each of `runs` first reached `value` in a score: at or below it, or above where higher is better.

    RAEv2's EP_FID@k (arXiv 2605.18324), epochs to an unguided FID of at most k, is one of these. Nothing is sampled:
    the scores are those in RUN/evaluation, of `evaluate.every` or `dic-repa evaluate`, one series for each way in which
    samples were drawn.

    Args:
        score: by default what the first run is judged by.

    Raises:
        UserError: a path is no run, a run has no such score, or there is no metric of that name.
    """
    folders = [RunFolder.open(path) for path in runs]
    recipes = [run.recipe(only_read=True) for run in folders]
    for recipe in recipes:
        import_plugins(recipe)
    score = score or _main_score(folders[0], recipes[0])
    if (metric := find_metric(score)) is None:
        metrics.create(score)  # tells a feature space that is not known
        raise unknown_name("metric", score, metrics.names())
    pairs = zip(folders, recipes)
    return [found for run, recipe in pairs for found in _reached(run, recipe, value, score, metric)]


def _reached(run: RunFolder, recipe: Recipe, value: float, score: str, metric: Metric) -> list[Reached]:
    higher = metric.better == "higher"
    series: dict[str, dict[int, float]] = {}
    for entry in read_evaluations(run, recipe, []):
        if score in entry["scores"]:
            series.setdefault(entry["sampling"], {})[entry["step"]] = entry["scores"][score]
    if not series:
        more = " --reference ..." if metric.needs in OF_REFERENCE else ""
        raise UserError(
            f"{run.path} has no {score} of any step; train with evaluate.every, or measure the checkpoints that it "
            f"kept: dic-repa evaluate {run.path}/checkpoints/step_* --metrics {score}{more}"
        )
    epoch, found = _images_of(recipe), []
    for sampling, scores in series.items():
        steps = sorted(scores)
        reaching = [step for step in steps if (scores[step] >= value if higher else scores[step] <= value)]
        step = reaching[0] if reaching else steps[-1]
        before = max((other for other in steps if other < step), default=None)
        known = ("" if before is not None else "at most ") if reaching else "more than "
        best = (max if higher else min)(scores.values())
        images = step * recipe.train.batch_size
        found.append(Reached(str(run.path), score, sampling, step, before, known, best, images, epoch))
    return found


def _main_score(run: RunFolder, recipe: Recipe) -> str:
    section = recipe.evaluate
    if section is None:
        raise UserError(f"the recipe of {run.path} has no `evaluate` section; name the score by --metrics")
    part = metrics.create(section.metric)
    return section.best or (part.main if isinstance(part, MetricSet) else section.metric)


def _images_of(recipe: Recipe) -> int | None:
    """How many images an epoch is; None if the data is not on this machine."""
    try:
        return len(build_dataset(recipe.data))
    except (UserError, OSError):
        return None
