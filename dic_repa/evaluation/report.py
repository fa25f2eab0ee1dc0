"""One self-contained HTML page about a run, or about several side by side.

`report_data.read_run` gathers what a run's folder holds, `write_report` puts it as JSON into the page's template; the
page's script draws it. Pictures are inlined, nothing is fetched.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

from dic_repa import __version__
from dic_repa.evaluation.metrics import find_metric, metrics
from dic_repa.evaluation.report_data import read_run
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import MARK, check_file
from dic_repa.runs.folder import RunFolder


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report of `runs` (run folders) to the file `out`, and return it.

    A UserError names the first path that is no run, or says that `out` is there and no report of ours.
    """
    folders, out = [RunFolder.open(path) for path in runs], Path(out)
    check_file(out)
    write_whole(out, render([read_run(run) | {"name": name} for run, name in zip(folders, distinct_names(folders))]))
    return out


def render(runs: list[dict]) -> str:
    """The page for runs as `read_run` gives them."""
    assets = resources.files("dic_repa.evaluation").joinpath("assets")
    generated = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    known = {name: metric for name in metrics.names() if (metric := find_metric(name))}
    scores = {name: {"title": m.title, "better": m.better, "most": m.most} for name, m in known.items()}
    data = {"version": __version__, "generated": generated, "scores": scores, "runs": runs}
    parts = {
        "MARK": MARK,
        "TITLE": html.escape(", ".join(run["name"] for run in runs)),
        "STYLE": assets.joinpath("report.css").read_text("utf-8"),
        "SCRIPT": assets.joinpath("charts.js").read_text("utf-8") + assets.joinpath("report.js").read_text("utf-8"),
        # No text of a run can end the element that holds it: "<" appears in it only as an escape.
        "DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    page = assets.joinpath("report.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], page)


def distinct_names(runs: Sequence[RunFolder]) -> list[str]:
    """Each run's folder name, with as many of its parents as tell it from the others."""
    parts = [run.path.resolve().parts for run in runs]
    names = []
    for i, mine in enumerate(parts):
        others = [other for j, other in enumerate(parts) if j != i and other != mine]
        depth = next((d for d in range(1, len(mine)) if all(o[-d:] != mine[-d:] for o in others)), len(mine))
        names.append("/".join(mine[-depth:]))
    return names
