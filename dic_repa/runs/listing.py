"""Runs below a folder at a glance, from the small files of each, without torch and whatever state they are in."""

import contextlib
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from dic_repa.errors import UserError, first_line
from dic_repa.files.lock import holder
from dic_repa.files.manifest import find_damage
from dic_repa.files.outputs import LOCK
from dic_repa.files.reading import has_step, parse_json
from dic_repa.runs.checkpoints import checkpoint_step
from dic_repa.runs.folder import RunFolder

TAIL = 1 << 16  # bytes of metrics.jsonl's end that are looked at
LINES = 5  # of them give the speed
# A folder with two of these is a run, whatever else is missing.
_PARTS = ("recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", LOCK)
_TAKES_A_VALUE = ("--out", "--set", "--processes")  # of the options of `train`


@dataclass
class RunSummary:
    """One row of the list.

    Attributes:
        state: 'running', 'finished', 'stopped' (before its last step, with a checkpoint), 'no checkpoint' or 'damaged'.
        why: the process that holds the run, or the damage.
        scores: of the newest evaluation.
        images_per_second: the median of the last lines of metrics.jsonl.
        written: when anything was last written, in seconds since 1970.
    """

    path: Path
    recipe: str = ""
    step: int = 0
    steps: int | None = None
    state: str = "no checkpoint"
    why: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    images_per_second: float | None = None
    written: float = 0.0


def list_runs(folder: str | Path) -> list[RunSummary]:
    """All runs at and below `folder`, by their paths. One that cannot be read is listed as 'damaged'."""
    return [_summary(path) for path in find_runs(Path(folder))]


def find_runs(folder: Path) -> Iterator[Path]:
    """The folders of runs at and below `folder`; nothing is looked for inside a run."""
    for root, inside, files in os.walk(folder):
        if sum(name in _PARTS for name in [*inside, *files]) >= 2:
            inside.clear()
            yield Path(root)
        inside[:] = sorted(name for name in inside if not name.startswith("."))


def _summary(path: Path) -> RunSummary:
    summary = RunSummary(path)
    try:
        _fill(summary, RunFolder(path))
    except Exception as error:  # whatever is wrong with this one, the others are listed
        summary.state, summary.why = "damaged", first_line(error)
    return summary


def _fill(summary: RunSummary, run: RunFolder) -> None:
    summary.written = _last_write(run)
    lines = _last_lines(run.metrics_file)
    summary.step = max([line["step"] for line in lines], default=0)
    speeds = [speed for line in lines[-LINES:] if _is_number(speed := line.get("images_per_second"))]
    summary.images_per_second = statistics.median(speeds) if speeds else None
    summary.scores = _newest_scores(run.path / "evaluation")
    summary.recipe = _recipe_name(run)
    checkpoints = sorted(run.list_checkpoints(), key=checkpoint_step)
    done = checkpoint_step(checkpoints[-1]) if checkpoints else 0
    summary.step = max(summary.step, done)
    recipe = RunFolder.open(run.path).recipe(only_read=True)
    summary.steps = recipe.train.steps
    summary.recipe = summary.recipe or f"{recipe.model.name} on {recipe.data.name}"
    if owner := holder(run.path / LOCK):
        summary.state, summary.why = "running", owner
    elif checkpoints:
        if damage := find_damage(checkpoints[-1], thorough=False):
            raise UserError(f"{checkpoints[-1].name}: {damage}")
        summary.state = "finished" if done >= recipe.train.steps else "stopped"


def _last_write(run: RunFolder) -> float:
    places = [run.path, run.recipe_file, run.environment_file, run.metrics_file, run.checkpoints, run.samples]
    return max(place.stat().st_mtime for place in [*places, run.path / "evaluation"] if place.exists())


def _last_lines(file: Path) -> list[dict]:
    """The records at the end of metrics.jsonl, without lines that are cut short."""
    if not file.is_file():
        return []
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
        records = [_parse(line) for line in stream.read().splitlines()]
    return [record for record in records if has_step(record)]


def _newest_scores(folder: Path) -> dict[str, float]:
    """The numbers of the record with the most steps; of several, of the last one written."""
    newest: tuple[tuple[int, float], dict] = ((-1, 0.0), {})
    for file in [*folder.glob("step_*.json"), *folder.glob("step_*/metrics.json")]:
        record = _parse(file.read_bytes())
        name = file.parent.name if file.name == "metrics.json" else file.name
        step = name.removeprefix("step_").partition("-")[0]
        found = (record.get("scores") or record.get("metrics")) if isinstance(record, dict) else None
        if isinstance(found, dict) and step.isdecimal():
            newest = max(newest, ((int(step), file.stat().st_mtime), found), key=lambda entry: entry[0])
    numbers = {name: value for name, value in current_names(newest[1]).items() if _is_number(value)}
    return {name: value for name, value in numbers.items() if "count" not in name}


def current_names(scores: dict) -> dict:
    """The scores of a record by the names of today: earlier versions called fd-digits `frechet`."""
    renamed = {"fd-digits" if name == "frechet" else name: value for name, value in scores.items()}
    return {name: current_names(value) if name == "reference" else value for name, value in renamed.items()}


def _recipe_name(run: RunFolder) -> str:
    """The recipe that the first `dic-repa train` named; '' where that is not known."""
    sessions = _parse(run.environment_file.read_bytes()) if run.environment_file.is_file() else None
    command = sessions[0].get("command") if isinstance(sessions, list) and sessions else None
    if not isinstance(command, list) or "train" not in command:
        return ""
    words = iter(command[command.index("train") + 1 :])
    for word in words:
        if word in _TAKES_A_VALUE:
            next(words, None)
        elif not word.startswith("-"):
            return Path(word).stem
    return ""


def _parse(text: str | bytes):
    with contextlib.suppress(ValueError):
        return parse_json(text)
    return None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def sort_runs(runs: Sequence[RunSummary], key: str, reverse: bool = False) -> list[RunSummary]:
    """By a field of `RunSummary` or the name of a score; runs without a value come last either way."""

    def value(run: RunSummary):
        return run.scores.get(key) if key not in vars(run) else getattr(run, key)

    have = sorted((run for run in runs if value(run) is not None), key=value, reverse=reverse)
    return have + [run for run in runs if value(run) is None]
