"""How `evaluate` and `train` show the scores of runs that are judged by their recipes."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dic_repa.cli.sampling_options import sample_settings
from dic_repa.errors import UserError, is_main_process
from dic_repa.recipe import load_recipe
from dic_repa.runtime.progress import print_result, progress_bar, say
from dic_repa.runtime.table import format_rows, number
from dic_repa.runtime.threads import choose_threads

if TYPE_CHECKING:
    from dic_repa.evaluation.runs import Judgement

BOTH = ("balanced", "random")  # ways to choose classes
NO_COLUMN = {"count", "recognised_count", "reference"}  # of a judge's scores


def ways_to_choose(both: bool = False, drawn_classes: str | None = None, **_options) -> Sequence[str | None]:
    """How the classes of each run's samples are chosen, once for each row; None: as its recipe says."""
    return BOTH if both else (drawn_classes,)


def evaluate_and_show(
    runs: Sequence[Path], recipe: str | None = None, again: bool = False, **options
) -> list[Judgement]:
    """Judge each run with a progress bar, then print the table and, for a single run, where its picture is."""
    from dic_repa.evaluation.runs import evaluate_run, no_judge
    from dic_repa.runs.folder import RunFolder

    if not is_main_process():
        return []  # a judge looks at few images: one process does it
    for run in runs:
        if run.exists() and not (run / "recipe.yaml").is_file():
            raise UserError(f"{run} is not a run: it has no recipe.yaml; to measure images, give a --reference")
        if RunFolder.open(run).recipe().evaluate is None:
            raise no_judge(run, "give a --reference")
    choose_threads()
    given = load_recipe(recipe).sample if recipe else None
    judgements = []
    for run, way in ((run, way) for run in runs for way in ways_to_choose(**options)):
        chosen = {**options, "drawn_classes": way}
        settings = sample_settings(given or RunFolder.open(run).recipe().sample, **chosen)
        with progress_bar(total=settings.num, desc=f"sampling {run}", unit="image", delay=0.1) as bar:
            judgements.append(evaluate_run(run, settings, again, bar.update))
    print_judgements(judgements)
    if len(judgements) == 1:
        print_result(f"samples: {judgements[0].picture}")
    return judgements


def show_epochs(value: float, runs: Sequence[Path], names: Sequence[str] | None) -> None:
    """Print when each run first reached the score, a row for each way in which its samples were drawn."""
    from dic_repa.evaluation.epochs import Reached, epochs_to
    from dic_repa.evaluation.metrics import title

    if not is_main_process():
        return
    if names and len(names) > 1:
        raise UserError(f"--epochs-to asks for one score, not {', '.join(names)}")
    found = epochs_to(value, runs, *(names or ()))
    firsts: dict[str, Reached] = {}
    heads = (f"best {title(found[0].score)}", f"epochs to {value:g}", "steps", "not yet at", "times fewer")
    rows = [("run", "samples", *heads)]
    for one in found:
        first = firsts.setdefault(one.sampling, one)
        epochs = "" if one.epoch is None else f"{one.known}{number(one.images / one.epoch)}"
        before = "" if one.before is None or one.known else str(one.before)
        fewer = "" if first is one else one.times_fewer(first)
        rows.append((one.run, one.sampling, number(one.best), epochs, f"{one.known}{one.step}", before, fewer))
    print_result(format_rows(rows, left=(0, 1)))
    if any(one.epoch is None for one in found):
        say("note: the data of some runs is not here, so that its number of images is not known: see the steps")


def print_judgements(judgements: Sequence[Judgement]) -> None:
    """A row for each run, one for runs that differ in the seed alone, and one for real images."""
    from dic_repa.evaluation.judge import notes_on_scores, real_name
    from dic_repa.evaluation.metrics import title
    from dic_repa.evaluation.runs import describe_sampling

    first = judgements[0].scores
    shown = [key for key, value in first.items() if key not in NO_COLUMN and not isinstance(value, dict)]

    def cells(scores: dict) -> list[str]:
        found = [scores.get(key, "") for key in shown]
        return ["no labels" if v is None else number(v) if isinstance(v, float) else str(v) for v in found]

    rows = [("run", "step", "samples", "classes", *map(title, shown))]
    groups: dict[str, dict[int, Judgement]] = {}
    for j in judgements:
        others = describe_sampling(j.sample.model_copy(update={"classes": BOTH[0]}))
        rows.append((str(j.run), str(j.step), others, j.sample.classes, *cells(j.scores)))
        recipe = j.recipe.model_dump_json(
            exclude={"description": True, "folders": True, "train": {"seed"}, "sample": True}
        )
        groups.setdefault(f"{j.step} {j.sample.model_dump_json()} {recipe}", {})[j.recipe.train.seed] = j
    for seeds in groups.values():
        if len(seeds) > 1:
            group = list(seeds.values())
            name = os.path.commonprefix([str(j.run) for j in group]) + "*"  # noqa: RUF071, by letters
            spreads = [_spread([j.scores.get(key) for j in group]) for key in shown]
            rows.append((f"{name} ({len(group)} seeds)", "", "", group[0].sample.classes, *spreads))
    if isinstance(first.get("reference"), dict):
        count = str(first["reference"].get("count", ""))
        rows.append((f"real {real_name(judgements[0].recipe)}", "", count, "", *cells(first["reference"])))
    print_result(format_rows(rows, left=(0, 2, 3)))
    for note in dict.fromkeys(note for j in judgements for note in notes_on_scores(shown, j.recipe)):
        say(f"note: {note}")


def _spread(values: list) -> str:
    """Mean and standard deviation, to the digits of the mean."""
    values = [value for value in values if isinstance(value, (int, float))]
    if len(values) < 2:
        return ""
    mean = number(statistics.mean(values))
    return f"{mean} ± {statistics.stdev(values):.{len(mean.partition('.')[2])}f}"
