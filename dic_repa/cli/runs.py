"""`dic-repa runs`."""

import dataclasses
import json
import time
from datetime import datetime, timezone
from pathlib import Path

import click

from dic_repa.errors import UserError, unknown_name
from dic_repa.runtime.progress import print_result
from dic_repa.runtime.table import format_rows, number

KEYS = {"run": "path", "recipe": "recipe", "step": "step", "state": "state", "speed": "images_per_second"}
UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


@click.command("runs")
@click.argument("folder", type=click.Path(path_type=Path), default="runs")
@click.option("--sort", "key", default="run", metavar="KEY", help="run, recipe, step, state, speed, age, or a score.")
@click.option("--reverse", is_flag=True, help="The largest first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, unrounded.")
def command(folder: Path, key: str, reverse: bool, as_json: bool):
    """List the runs in FOLDER and below it: recipe, steps, speed, age of the last write, scores, state.

    The scores are those of the newest evaluation. A run is running (its lock is held), finished, stopped before its
    last step, without a checkpoint, or damaged. Checkpoints are looked at by their sizes alone, so this is quick.

    \b
    Examples:
      dic-repa runs
      dic-repa runs --sort fd-digits
      dic-repa runs --sort age
      dic-repa runs sweeps/width --sort recognised --reverse --json
    """
    from dic_repa.runs.listing import list_runs, sort_runs

    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder of runs")
    if not folder.exists() and folder != Path("runs"):
        raise UserError(f"there is no folder {folder}")
    runs = list_runs(folder)
    known = [*KEYS, "age", *sorted({name for run in runs for name in run.scores})]
    if key not in known:
        raise unknown_name("key to sort by", key, known)
    # The least age is the latest write.
    runs = sort_runs(runs, "written", not reverse) if key == "age" else sort_runs(runs, KEYS.get(key, key), reverse)
    if as_json:
        print_result(json.dumps([_plain(run) for run in runs], indent=2))
    elif not runs:
        print_result(f"no runs in {folder} yet; `dic-repa train RECIPE` makes one")
    else:
        heading = ("run", "recipe", "step", "images/s", "written", "scores", "state")
        print_result(format_rows([heading, *map(_row, runs)], left=(0, 1, 5, 6)))


def _row(run) -> tuple[str, ...]:
    return (
        str(run.path),
        run.recipe,
        str(run.step) if run.steps is None else f"{run.step}/{run.steps}",
        "" if run.images_per_second is None else number(run.images_per_second),
        _age(time.time() - run.written) if run.written else "",
        ", ".join(f"{name} {number(value)}" for name, value in run.scores.items()),
        {"running": f"running ({run.why})", "damaged": f"damaged: {run.why}"}.get(run.state, run.state),
    )


def _age(seconds: float) -> str:
    """'3 min ago'."""
    for size, unit in UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"


def _plain(run) -> dict:
    written = datetime.fromtimestamp(run.written, timezone.utc).isoformat(timespec="seconds") if run.written else None
    return dataclasses.asdict(run) | {"path": str(run.path), "written": written}
