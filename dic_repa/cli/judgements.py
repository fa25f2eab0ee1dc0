"""The table of what runs have scored, those of several seeds summed up."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dic_repa.runtime.progress import say
from dic_repa.runtime.table import format_rows, number

if TYPE_CHECKING:
    from dic_repa.evaluation.runs import Judgement

_NO_COLUMN = {"count", "recognised_count", "reference"}


def print_judgements(judgements: Sequence[Judgement]) -> None:
    """A row for each run, one for runs that differ in the seed alone, and one for real images."""
    from dic_repa.evaluation.extractors import no_fid
    from dic_repa.evaluation.metrics import title
    from dic_repa.evaluation.runs import by_encoder, describe_sampling

    first = judgements[0].scores
    shown = [key for key, value in first.items() if key not in _NO_COLUMN and not isinstance(value, dict)]

    def cells(scores: dict) -> list[str]:
        return [_score(key, scores.get(key)) for key in shown]

    rows = [("run", "step", "samples", *map(title, shown))]
    rows += [(str(j.run), str(j.step), describe_sampling(j.sample), *cells(j.scores)) for j in judgements]
    groups: dict[str, dict[int, Judgement]] = {}
    for j in judgements:
        groups.setdefault(_without_seed(j), {})[j.recipe.train.seed] = j
    for seeds in groups.values():
        if len(seeds) > 1:
            group = list(seeds.values())
            name = os.path.commonprefix([str(j.run) for j in group]) + "*"  # noqa: RUF071, by letters
            spreads = [_spread([j.scores.get(key) for j in group]) for key in shown]
            rows.append((f"{name} ({len(group)} seeds)", "", "", *spreads))
    if isinstance(first.get("reference"), dict):
        rows.append((f"real {judgements[0].recipe.data.name}", "", "", *cells(first["reference"])))
    print(format_rows(rows, left=(0, 2)))
    if by_encoder(shown):
        for encoder in dict.fromkeys(j.recipe.alignments[0].encoder for j in judgements if j.recipe.alignments):
            say(f"note: {no_fid(encoder)}")


def _score(key: str, value) -> str:
    if value is None:
        return "no labels" if key == "recognised" else ""
    return number(value) if isinstance(value, float) else str(value)


def _without_seed(judgement: Judgement) -> str:
    """What runs that differ in nothing but the seed have in common."""
    recipe = judgement.recipe.model_dump_json(
        exclude={"description": True, "folders": True, "train": {"seed"}, "sample": True}
    )
    return f"{judgement.step} {judgement.sample.model_dump_json()} {recipe}"


def _spread(values: list) -> str:
    """Mean and standard deviation, to the digits of the mean."""
    values = [value for value in values if isinstance(value, (int, float))]
    if len(values) < 2:
        return ""
    mean = number(statistics.mean(values))
    return f"{mean} ± {statistics.stdev(values):.{len(mean.partition('.')[2])}f}"
