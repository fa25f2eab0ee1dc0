"""What a run's folder holds, gathered for the report as plain data.

Whatever a run lacks (it may be going on, or its folder be damaged) is left out, and named among its `problems`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from dic_repa.errors import UserError, first_line
from dic_repa.recipe import Recipe, SampleSection, load_training_recipe
from dic_repa.recipe.keys import flatten
from dic_repa.runs.folder import RunFolder
from dic_repa.runs.listing import current_names

MOST_POINTS = 1500  # of a curve: more than a screen has pixels
MOST_GRIDS = 60  # of the samples over training
WIDEST = 1100  # pixels of an inlined picture
LARGEST = 150_000  # bytes of a PNG that is inlined as it is
# What the cells of one guidance search have in common.
_SEARCH = ("checkpoint", "weights", "weak_weights", "score", "reference")


def read_run(run: RunFolder) -> dict:
    """All that the page shows of one run, as plain data; `problems` says in words what could not be read."""
    problems: list[str] = []
    recipe, keys = _recipe(run, problems)
    metrics = _metrics(run, problems)
    done = metrics["steps"][-1] if metrics["steps"] else 0
    total = recipe.train.steps if recipe else None
    return {
        "path": str(run.path),
        "description": recipe.description if recipe else "",
        "step": done,
        "steps": total,
        "finished": total is not None and done >= total,
        "alignments": [a.model_dump(include={"encoder", "tap", "head"}) for a in (recipe.alignments if recipe else [])],
        "metrics": metrics,
        "samples": list(_samples(run, problems)),
        "evaluations": list(_evaluations(run, recipe, problems)),
        "probe": _probe(run, problems),
        "tuning": _tuning(run, problems),
        "recipe": keys,
        "environment": _environment(run, problems),
        "problems": list(dict.fromkeys(problems)),
    }


def _recipe(run: RunFolder, problems: list[str]) -> tuple[Recipe | None, dict[str, str]]:
    """The run's recipe, and its keys and values as they are shown; without defaults where it is of another version."""
    try:
        recipe = load_training_recipe(run.recipe_file)
        return recipe, _shown(recipe.model_dump(mode="json"))
    except UserError as error:
        problems.append(str(error))
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        raw = yaml.safe_load(run.recipe_file.read_text("utf-8"))
        return None, _shown(raw) if isinstance(raw, dict) else {}
    return None, {}


def _shown(tree: dict) -> dict[str, str]:
    """Dotted keys and values as text."""
    leaves = flatten(tree).items()
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str) for k, v in leaves}


def _metrics(run: RunFolder, problems: list[str]) -> dict:
    """The curves by name, a value or None for each of `steps`; means of neighbours where there are too many points."""
    records = []
    try:
        for line in run.metrics_file.read_text("utf-8", errors="replace").splitlines():
            record = _parse(line)
            if _has(record, step=int):
                records.append(record)
            elif line.strip():
                problems.append("metrics.jsonl has a line that is cut short; it is left out")
    except OSError:
        problems.append("there is no metrics.jsonl yet")
    names = sorted({name for record in records for name, value in record.items() if _number(value) is not None})
    chunk = math.ceil(len(records) / MOST_POINTS) or 1
    groups = [records[i : i + chunk] for i in range(0, len(records), chunk)]
    series = {name: [_mean([r.get(name) for r in g]) for g in groups] for name in names if name != "step"}
    return {"steps": [group[-1]["step"] for group in groups], "series": series}


def _samples(run: RunFolder, problems: list[str]) -> Iterator[dict]:
    """The grids over training, as many as a slider can use, evenly over the steps."""
    files = sorted(run.samples.glob("step_*.png"))
    if len(files) > MOST_GRIDS:
        files = [files[round(i * (len(files) - 1) / (MOST_GRIDS - 1))] for i in range(MOST_GRIDS)]
    for file in files:
        try:
            yield {"step": int(file.stem.removeprefix("step_")), **inline_picture(file)}
        except (OSError, ValueError) as error:
            problems.append(f"samples/{file.name} cannot be shown: {first_line(error)}")


def inline_picture(path: Path) -> dict:
    """A picture as a data URI `src` with its `width` and `height`; a large one is made smaller, as WebP."""
    content, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        image: Image.Image = opened
        if len(content) > LARGEST or image.width > WIDEST:
            image = image.convert("RGB")
            image.thumbnail((WIDEST, 10 * WIDEST))
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=85)
            content, kind = buffer.getvalue(), "webp"
        size = {"width": image.width, "height": image.height}
    return {"src": f"data:image/{kind};base64,{base64.b64encode(content).decode()}", **size}


def _evaluations(run: RunFolder, recipe: Recipe | None, problems: list[str]) -> Iterator[dict]:
    """The records of judged samples, by step; `own` are those sampled as the run's recipe says."""
    found: list[dict[str, Any]] = []
    own = _describe(recipe.sample) if recipe else None
    for file in sorted((run.path / "evaluation").glob("*.json")):
        record = _read_json(file)
        if record is None:
            problems.append(f"evaluation/{file.name} is not whole; it is left out")
        elif _has(record, scores=dict, step=int):
            scores, sampling = current_names(record["scores"]), _describe(record.get("sample"))
            judged: dict[str, Any] = {"step": record["step"], "metric": str(record.get("metric", ""))}
            judged |= {"sampling": sampling, "own": sampling == own, "evaluations": _number(record.get("evaluations"))}
            judged |= {"count": _number(scores.get("count")), "scores": _scores(scores)}
            found.append(judged | {"reference": _scores(scores["reference"]) if _has(scores, reference=dict) else {}})
    for file in sorted((run.path / "evaluation").glob("step_*/metrics.json")):  # of `dic-repa evaluate --reference`
        record, (step, _, sampling) = _read_json(file), file.parent.name.removeprefix("step_").partition("-")
        if not (_has(record, metrics=dict) and step.isdigit()):
            problems.append(f"evaluation/{file.parent.name}/metrics.json is not whole; it is left out")
            continue
        entry = next((e for e in found if (e["step"], e["sampling"].replace(" ", "-")) == (int(step), sampling)), None)
        if entry is None:
            own_too = sampling == (own or "").replace(" ", "-")
            entry = {"step": int(step), "metric": "", "sampling": sampling.replace("-", " "), "own": own_too}
            entry |= {"evaluations": None, "count": None, "scores": {}, "reference": {}}
            found.append(entry)
        # Samples that are judged and measured have one entry; a score that both give is the judge's.
        entry["scores"] |= {n: v for n, v in _scores(record["metrics"]).items() if n not in entry["scores"]}
    yield from sorted(found, key=lambda e: (e["step"], e["sampling"]))


def _scores(scores: dict) -> dict[str, float]:
    numbers = {name: _number(value) for name, value in scores.items() if "count" not in name}
    return {name: value for name, value in numbers.items() if value is not None}


def _describe(sample: Any) -> str:
    from dic_repa.evaluation.runs import describe_sampling

    try:
        return describe_sampling(SampleSection.model_validate(sample))
    except ValueError:
        return ""


def _probe(run: RunFolder, problems: list[str]) -> dict | None:
    """What `dic-repa probe` found, of the newest step that it was run on."""
    files = sorted((run.path / "probe").glob("*.json"))
    if not files:
        return None
    records = map(_read_json, files)
    shown = [r for r in records if _has(r, scores=dict) and r.get("taps") and r.get("times")]
    if len(shown) < len(files):
        problems.append("a record in probe/ is not whole; it is left out")
    return _finite(max(shown, key=lambda r: r.get("step") or 0, default=None))


def _tuning(run: RunFolder, problems: list[str]) -> dict | None:
    """The grid of `dic-repa tune`: values by interval and scale, of the cells that have the fewest samples."""
    file = run.path / "tune" / "tune.json"
    if not file.is_file():
        return None
    try:
        record = _read_json(file)
        score, best = record["score"], record["best"]
        # The file keeps the cells of other searches too: of another score, or before the run was trained on.
        own = [c for c in record["cells"] if all(c.get(key) == record.get(key) for key in _SEARCH)]
        cells = [(c["sample"]["guidance"], c["sample"]["num"], _number(c["scores"][score])) for c in own]
        few = min(num for _, num, _ in cells)
        values = {(g["scale"], tuple(g["interval"])): value for g, num, value in cells if g and num == few}
        plain = next((value for g, num, value in cells if not g and num == few), None)
        scales = ([1] if plain is not None else []) + sorted({scale for scale, _ in values})
        intervals = sorted({interval for _, interval in values})
        return {
            "score": score,
            "better": record["better"],
            "num": few,
            "scales": scales,
            "intervals": [f"{low:g} to {high:g}" for low, high in intervals],
            "values": [[plain if s == 1 else values.get((s, interval)) for s in scales] for interval in intervals],
            "best": [{"options": b["options"], "num": b["num"], "value": _number(b["value"])} for b in best],
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        problems.append("tune/tune.json is not whole; it is left out")
        return None


def _environment(run: RunFolder, problems: list[str]) -> list[dict[str, str]]:
    """An entry for each start and resume, its keys dotted."""
    content = _read_json(run.environment_file)
    if content is None:
        problems.append("environment.json is missing or not whole")
        return []
    shown = []
    for session in content if isinstance(content, list) else [content]:
        if _has(session, command=list):
            session = session | {"command": " ".join(map(str, session["command"]))}
        if isinstance(session, dict):
            shown.append(_shown(session))
    return shown


def _has(record: Any, **kinds: type) -> bool:
    """Whether `record` is a dict with values of these kinds."""
    return isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items())


def _parse(text: str) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(text)


def _read_json(path: Path) -> Any:
    with contextlib.suppress(OSError):
        return _parse(path.read_text("utf-8", errors="replace"))


def _number(value: Any) -> float | int | None:
    """A finite number as it is, else None: JSON in a browser knows neither NaN nor infinity."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return value if numeric and math.isfinite(value) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return _number(value) if isinstance(value, float) else value


def _mean(values: list) -> float | None:
    numbers = [number for value in values if (number := _number(value)) is not None]
    return float(f"{sum(numbers) / len(numbers):.6g}") if numbers else None
