"""`dic-repa evaluate`."""

from __future__ import annotations

import statistics
from itertools import takewhile
from pathlib import Path

import click

from dic_repa.cli.sample import sample_settings, sampling_options
from dic_repa.recipe import load_recipe


@click.command("evaluate")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--recipe", help="A recipe whose `sample` section to use.  [default: the run's own]")
@sampling_options
@click.option("--again", is_flag=True, help="Sample and judge anew, though this was done before.")
def command(runs: tuple[Path, ...], recipe: str | None, again: bool, **options):
    """Judge the samples of RUNS (run folders): sample from the averaged weights, measure, print a table.

    Runs that differ in nothing but the seed are also summed up as mean and standard deviation. The samples' picture
    and the scores are kept in RUN/evaluation.

    \b
    Examples:
      dic-repa evaluate runs/digits-urepa
      dic-repa evaluate runs/digits-urepa --recipe digits-cfg
      dic-repa evaluate runs/urepa-* runs/baseline-*
    """
    evaluate_and_show(list(runs), recipe, again, **options)


def evaluate_and_show(runs: list[Path], recipe: str | None = None, again: bool = False, **options) -> None:
    """Evaluate each run with a progress bar, then print the table and, for a single run, where its picture is."""
    from dic_repa.evaluation.runs import evaluate_run
    from dic_repa.training.run_folder import RunFolder

    given = load_recipe(recipe).sample if recipe else None
    judgements = []
    for run in runs:
        settings = sample_settings(given or RunFolder.open(run).recipe().sample, **options)
        with click.progressbar(length=settings.num, label=f"sampling {run}", show_pos=True) as bar:
            judgements.append(evaluate_run(run, settings, again, bar.update))
    _print_table(judgements)
    if len(judgements) == 1:
        click.echo(f"samples: {judgements[0].picture}")


def _print_table(judgements) -> None:
    from dic_repa.evaluation.runs import describe_sampling

    rows = [("run", "step", "samples", "recognised", "Fréchet distance")]
    for j in judgements:
        share, frechet = j.scores["recognised"], f"{j.scores['frechet']:.2f}"
        recognised = "no labels" if share is None else f"{share:.1%}"
        rows.append((str(j.run), str(j.step), describe_sampling(j.sample), recognised, frechet))
    groups = {}
    for j in judgements:
        groups.setdefault(_without_seed(j), {})[j.recipe.train.seed] = j
    for group in groups.values():
        if len(group) > 1:
            group = list(group.values())
            name = _common_start([str(j.run) for j in group]) + "*"
            shares = [100 * j.scores["recognised"] for j in group if j.scores["recognised"] is not None]
            recognised = _spread(shares, 1) + " %" if shares else ""
            frechet = _spread([j.scores["frechet"] for j in group], 2)
            rows.append((f"{name} ({len(group)} seeds)", "", "", recognised, frechet))
    reference = judgements[0].scores["reference"]
    rows.append(("real digits", "", "", f"{reference['recognised']:.1%}", f"{reference['frechet']:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(w) if i in (0, 2) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        click.echo("  ".join(cells).rstrip())


def _without_seed(judgement) -> str:
    """What runs that differ in nothing but the seed have in common."""
    recipe = judgement.recipe.model_dump_json(exclude={"description": True, "train": {"seed"}, "sample": True})
    return f"{judgement.step} {judgement.sample.model_dump_json()} {recipe}"


def _common_start(names: list[str]) -> str:
    return "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*names)))


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
