"""The scores that a run has over its steps, from the records in its folder, whatever state these are in."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import Any

from dic_repa.errors import UserError
from dic_repa.evaluation.runs import describe_sampling
from dic_repa.files.reading import parse_json, read_file
from dic_repa.recipe import Recipe, SampleSection
from dic_repa.runs.folder import RunFolder
from dic_repa.runs.listing import current_names


def read_evaluations(run: RunFolder, recipe: Recipe | None, problems: list[str]) -> list[dict]:
    """The scores of judged and measured samples, by step; `own` are those sampled as the run's recipe says.

    Samples that are judged (NAME.json) and measured (NAME/metrics.json) have one entry; if both give a score, the
    judge's is taken.
    """
    found: dict[str, dict[str, Any]] = {}
    folder, own = run.path / "evaluation", describe_sampling(recipe.sample) if recipe else ""
    for file in [*sorted(folder.glob("*.json")), *sorted(folder.glob("step_*/metrics.json"))]:
        record, measured = read_record(file), file.parent != folder
        step, _, sampling = file.parent.name.removeprefix("step_").partition("-")
        if record is None or (measured and not (has(record, metrics=dict) and step.isdecimal())):
            problems.append(f"{file.relative_to(run.path)} is not whole; it is left out")
        elif measured:
            sampling = own if sampling == own.replace(" ", "-") else sampling.replace("-", " ")
            real = numbers_of(record["bound"]["metrics"]) if has(record.get("bound"), metrics=dict) else {}
            new = {"step": int(step), "sampling": sampling, "evaluations": None, "scores": {}, "reference": {}}
            entry = found.setdefault(file.parent.name, new)
            entry["reference"] |= {n: v for n, v in real.items() if n not in entry["reference"]}
            entry["scores"] |= {n: v for n, v in numbers_of(record["metrics"]).items() if n not in entry["scores"]}
        elif has(record, scores=dict, step=int):
            scores = current_names(record["scores"])
            found[file.stem] = {
                "step": record["step"],
                "sampling": _describe(record.get("sample")),
                "evaluations": number_of(record.get("evaluations")),
                "scores": numbers_of(scores),
                "reference": numbers_of(scores["reference"]) if has(scores, reference=dict) else {},
            }
    for entry in found.values():
        entry |= {"own": recipe is not None and entry["sampling"] == own, "classes": _classes(entry["sampling"])}
    return sorted(found.values(), key=lambda entry: (entry["step"], entry["sampling"]))


def _describe(sample: Any) -> str:
    try:
        return describe_sampling(SampleSection.model_validate(sample))
    except ValueError:
        return ""


def _classes(sampling: str) -> str:
    """How classes were chosen: what `describe_sampling` names, or balanced; "" where a record does not say."""
    named = re.search(r"(\w+) classes", sampling)
    return named[1] if named else "balanced" if sampling else ""


def has(record: Any, **kinds: type) -> bool:
    """Whether `record` is a dict with values of these kinds."""
    return isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items())


def parse(text: str) -> Any:
    """JSON; None for text that is none, and for NaN and infinity, which a browser does not know."""
    with contextlib.suppress(ValueError):
        return parse_json(text, parse_constant=lambda _: None, parse_float=_finite, parse_int=_finite)


def read_record(path: Path) -> Any:
    """The content of a file of JSON; None if it cannot be read."""
    with contextlib.suppress(OSError, UserError):
        return parse(read_file(path, "record-bytes").decode(errors="replace"))


def _finite(text: str) -> float | int | None:
    value = float(text)
    if not math.isfinite(value):
        return None
    return value if any(mark in text for mark in ".eE") else int(text)


def number_of(value: Any) -> float | int | None:
    """`value` if it is a number, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def numbers_of(scores: dict) -> dict[str, float]:
    """The scores in a record: its numbers, but for what it counts."""
    numbers = {name: number_of(value) for name, value in scores.items() if "count" not in name}
    return {name: value for name, value in numbers.items() if value is not None}
