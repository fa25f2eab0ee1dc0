"""One self-contained HTML page about a run, or about several side by side.

`read_run` gathers what a run's folder holds as plain data, `write_report` puts it as JSON into the page's template; the
page's script draws it. Pictures are inlined, nothing is fetched. What a run lacks (it goes on, or its folder is
damaged) is left out and named in its `problems`.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

from PIL import Image

from dic_repa import __version__
from dic_repa.errors import UserError, first_line
from dic_repa.evaluation.metrics import find_metric, metrics
from dic_repa.evaluation.records import has, number_of, numbers_of, parse, read_evaluations, read_record
from dic_repa.evaluation.tune import SEARCHES
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import MARK, check_file
from dic_repa.files.reading import has_step, read_file
from dic_repa.recipe import Recipe, load_training_recipe
from dic_repa.recipe.keys import flatten
from dic_repa.recipe.values import read_yaml
from dic_repa.runs.folder import RunFolder

MOST_POINTS = 1500  # of a curve: more than a screen has pixels
MOST_GRIDS = 60  # of the samples over training
WIDEST = 1100  # pixels of an inlined picture
LARGEST = 150_000  # bytes of a PNG that is inlined as it is
# What the cells of one guidance search have in common.
_SEARCH = ("checkpoint", "weights", "weak_weights", "score", "reference", "search")


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report of `runs` (run folders) to the file `out`, and return it.

    A UserError names the first path that is not a run, or an `out` that exists and is not a report of ours.
    """
    folders, out = [RunFolder.open(path) for path in runs], Path(out)
    check_file(out)
    names = distinct_names(folders)
    known = {name: metric for name in metrics.names() if (metric := find_metric(name))}
    data = {
        "version": __version__,
        "generated": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "scores": {name: metric.describe() for name, metric in known.items()},
        "runs": [read_run(run) | {"name": name} for run, name in zip(folders, names)],
    }
    assets = resources.files("dic_repa.evaluation").joinpath("assets")
    page, style, *scripts = (
        assets.joinpath(name).read_text("utf-8") for name in ("report.html", "report.css", "charts.js", "report.js")
    )
    parts = {
        "MARK": MARK,
        "TITLE": html.escape(", ".join(names)),
        "STYLE": style,
        "SCRIPT": "".join(scripts),
        # No text of a run can end the element that holds it: "<" appears in it only as an escape.
        "DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    write_whole(out, re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], page))
    return out


def distinct_names(runs: Sequence[RunFolder]) -> list[str]:
    """Each run's path below the folder that holds all of them."""
    paths = [run.path.resolve() for run in runs]
    root = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(root).as_posix() for path in paths]


def read_run(run: RunFolder) -> dict:
    """All that the page shows of one run, as plain data; `problems` says in words what could not be read."""
    problems: list[str] = []
    recipe, keys = _recipe(run, problems)
    curves = _curves(run, problems)
    done = curves["steps"][-1] if curves["steps"] else 0
    total = recipe.train.steps if recipe else None
    return {
        "description": recipe.description if recipe else "",
        "step": done,
        "steps": total,
        "finished": total is not None and done >= total,
        "alignments": [
            {"encoder": a.taught_by, "tap": a.tap, "head": a.head} for a in (recipe.alignments if recipe else [])
        ],
        "metrics": curves,
        "samples": list(_samples(run, problems)),
        "evaluations": read_evaluations(run, recipe, problems),
        "probe": _probe(run, problems),
        "tuning": _tuning(run, problems),
        "recipe": keys,
        "environment": _environment(run, problems),
        "problems": list(dict.fromkeys(problems)),
    }


def _recipe(run: RunFolder, problems: list[str]) -> tuple[Recipe | None, dict[str, str]]:
    """The run's recipe, and its keys and values as they are shown; without defaults if it is of another version."""
    try:
        recipe = load_training_recipe(run.recipe_file, only_read=True)
        return recipe, _shown(recipe.model_dump(mode="json"))
    except UserError as error:
        problems.append(str(error))
    with contextlib.suppress(OSError, ValueError):
        raw = read_yaml(read_file(run.recipe_file, "recipe-bytes").decode(), str(run.recipe_file))
        return None, _shown(raw) if isinstance(raw, dict) else {}
    return None, {}


def _shown(tree: dict) -> dict[str, str]:
    """Dotted keys and values as text."""
    leaves = flatten(tree).items()
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str) for k, v in leaves}


def _curves(run: RunFolder, problems: list[str]) -> dict:
    """The curves by name, a value or None for each of `steps`; means of neighbours if there are too many points."""
    records = []
    try:
        for line in read_file(run.metrics_file).decode(errors="replace").split("\n"):
            record = parse(line)
            if has_step(record):
                records.append(record)
            elif line.strip():
                problems.append("metrics.jsonl has a line that is cut short; it is left out")
    except OSError:
        problems.append("there is no metrics.jsonl yet")
    except UserError as error:
        problems.append(str(error))
    names = sorted({name for record in records for name in numbers_of(record)} - {"step"})
    chunk = math.ceil(len(records) / MOST_POINTS) or 1
    groups = [records[i : i + chunk] for i in range(0, len(records), chunk)]
    series = {name: [_mean([number_of(r.get(name)) for r in group]) for group in groups] for name in names}
    return {"steps": [group[-1]["step"] for group in groups], "series": series}


def _mean(values: list) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(f"{sum(numbers) / len(numbers):.6g}") if numbers else None


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
        source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        return {"src": source, "width": image.width, "height": image.height}


def _probe(run: RunFolder, problems: list[str]) -> dict | None:
    """What `dic-repa probe` found, of the newest step that it was run on."""
    files = sorted((run.path / "probe").glob("*.json"))
    shown = [r for r in map(read_record, files) if has(r, scores=dict) and r.get("taps") and r.get("times")]
    if len(shown) < len(files):
        problems.append("a record in probe/ is not whole; it is left out")
    return max(shown, key=lambda record: number_of(record.get("step")) or 0, default=None)


def _tuning(run: RunFolder, problems: list[str]) -> dict | None:
    """The grid of `dic-repa tune`: values by interval and scale, of the cells that have the fewest samples."""
    file = run.path / "tune" / "tune.json"
    if not file.is_file():
        return None
    try:
        record = read_record(file)
        score, best = record["score"], record["best"]
        # The file keeps the cells of other searches too: of another score, or before the run was trained on.
        own = [c for c in record["cells"] if all(c.get(key) == record.get(key) for key in _SEARCH)]
        cells = [(c["sample"]["guidance"], c["sample"]["num"], number_of(c["scores"][score])) for c in own]
        few = min(num for _, num, _ in cells)
        scale, when = SEARCHES[record.get("search", "guidance")]  # versions before did not name it
        guided = [(g, value) for g, num, value in cells if g and g[scale] != 1 and num == few]
        values = {(g[scale], tuple(g[when])): value for g, value in guided}
        plain = next((value for g, num, value in cells if not (g and g[scale] != 1) and num == few), None)
        scales = ([1] if plain is not None else []) + sorted({scale for scale, _ in values})
        intervals = sorted({interval for _, interval in values})
        return {
            "score": score,
            "title": "scale of internal guidance" if scale == "internal" else "scale",
            "better": record["better"],
            "num": few,
            "scales": scales,
            "intervals": [f"{low:g} to {high:g}" for low, high in intervals],
            "values": [[plain if s == 1 else values.get((s, interval)) for s in scales] for interval in intervals],
            "best": [{"options": b["options"], "num": b["num"], "value": number_of(b["value"])} for b in best],
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        problems.append("tune/tune.json is not whole; it is left out")
        return None


def _environment(run: RunFolder, problems: list[str]) -> list[dict[str, str]]:
    """An entry for each start and resume, its keys dotted."""
    content = read_record(run.environment_file)
    if content is None:
        problems.append("environment.json is missing or not whole")
    sessions = [s for s in (content if isinstance(content, list) else [content]) if isinstance(s, dict)]
    commands = [{"command": " ".join(map(str, s["command"]))} if has(s, command=list) else {} for s in sessions]
    return [_shown(session | command) for session, command in zip(sessions, commands)]
