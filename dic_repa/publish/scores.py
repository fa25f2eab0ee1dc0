"""The scores of the weights that are published, with how they were measured: from a run's records, or scores.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, PrivateAttr, ValidationError

from dic_repa.errors import UserError
from dic_repa.evaluation.judge import notes_on_scores
from dic_repa.evaluation.runs import describe_sampling
from dic_repa.files.reading import numbers, read_json
from dic_repa.publish.paths import without_paths
from dic_repa.recipe import Recipe, SampleSection
from dic_repa.runs.checkpoints import RAW, checkpoint_step
from dic_repa.runs.listing import current_names
from dic_repa.runtime.progress import warn
from dic_repa.sampling.load import Checkpoint
from dic_repa.sampling.weights import checkpoint_of, home_of

SCORES = "scores.json"


class Scored(BaseModel):
    """What one set of samples scored, and how they were drawn."""

    metrics: dict[str, FiniteFloat]
    real: dict[str, FiniteFloat] = {}  # of real images, scored as the samples are
    num: int
    sample: SampleSection
    evaluations: int | float | None = None  # of the network, for an image
    reference: str  # what they were compared with
    notes: list[str] = []
    _picture: Path | None = PrivateAttr(None)  # of the samples; a file that says otherwise is not believed


class Scores(BaseModel):
    """All scores of these weights: the averaged (or raw) ones after `step` steps, if that is known."""

    step: int | None = None
    weights: str = ""
    scored: list[Scored] = []

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


def scores_of(model: Checkpoint) -> Scores:
    """Those of the checkpoint that `model` was loaded from. A record that is not whole is left out, with a warning."""
    checkpoint = checkpoint_of(model.source)
    if checkpoint.parent.name == "checkpoints" and re.fullmatch(r"step_\d+", checkpoint.name):
        step = checkpoint_step(checkpoint)
        weights = RAW if model.source.resolve() == checkpoint else model.source.name
        found = _of_run(home_of(model.source) / "evaluation", step, model.recipe)
        own = [scored for scored in found if scored.sample.weights == weights]
        as_recipe = describe_sampling(model.recipe.sample)
        own.sort(key=lambda scored: describe_sampling(scored.sample) != as_recipe)  # those of the recipe come first
        return Scores(step=step, weights=weights, scored=own)
    file = checkpoint / SCORES
    try:
        return Scores.model_validate(read_json(file, "remove it")) if file.is_file() else Scores()
    except ValidationError:
        raise UserError(f"{file} is damaged; remove it to publish without scores") from None


def _of_run(folder: Path, step: int, recipe: Recipe) -> Iterator[Scored]:
    """The records of `dic-repa train` and `tune` (NAME.json) and of `evaluate` (NAME/metrics.json) of that step."""
    stem = f"step_{step:08d}"
    for file in [*sorted(folder.glob(f"{stem}-*.json")), *sorted(folder.glob(f"{stem}-*/metrics.json"))]:
        try:
            record = read_json(file, "it is left out", dict)
            scored = _judged(record, recipe) if file.parent == folder else _measured(record)
            scored._picture = file.with_suffix(".png")
            yield scored
        except UserError as error:
            warn(str(error))
        except (KeyError, TypeError, ValueError, AttributeError):
            warn(f"{file} is damaged; it is left out")


def _judged(record: dict, recipe: Recipe) -> Scored:
    scores = current_names(record["scores"])
    names = recipe.evaluate.names if recipe.evaluate else []
    reference = (recipe.evaluate and recipe.evaluate.reference) or recipe.data.name
    sample = SampleSection.model_validate(without_paths(record["sample"]))
    return Scored(
        metrics=_values(scores),
        real=_values(scores.get("reference") or {}),
        num=scores.get("count", sample.num),
        sample=sample,
        evaluations=record.get("evaluations"),
        reference=without_paths(reference),
        notes=notes_on_scores(names, recipe),
    )


def _measured(record: dict) -> Scored:
    samples, made = record["samples"], record["samples"]["sampling"]
    extractors: list[dict[str, Any]] = list(record.get("extractors", {}).values())
    return Scored(
        metrics=_values(record["metrics"]),
        real=_values((record.get("bound") or {}).get("metrics", {})),
        num=samples["count"],
        sample=SampleSection.model_validate(without_paths(made["sample"])),
        evaluations=made.get("evaluations_per_image"),
        reference=without_paths((record.get("reference") or {}).get("path", "nothing")),
        notes=[note for extractor in extractors for note in extractor.get("notes", ())],
    )


def _values(scores: dict) -> dict[str, float]:
    return {name: value for name, value in numbers(scores).items() if "count" not in name}
