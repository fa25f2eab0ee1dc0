"""A run as a notebook shows it."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING

from dic_repa.errors import UserError, printable
from dic_repa.files.reading import read_file
from dic_repa.runtime.table import html_table

if TYPE_CHECKING:
    from dic_repa.runs.folder import RunFolder

MOST_BYTES = 8 << 20  # of a picture that is shown
PNG = b"\x89PNG\r\n\x1a\n"


def run_html(run: RunFolder) -> str:
    """Name and step of a run, its last losses, the picture of their curves and the newest samples.

    It may come from a stranger: texts are escaped, and of pictures only PNG is shown.
    """
    metrics = run.metrics
    step = f"step {metrics['step'][-1]:,}" if metrics.get("step") else "no step yet"
    last = [(name, f"{column[-1]:.6g}") for name, column in metrics.items() if name != "step"]
    newest = max(run.samples.glob("step_*.png"), default=None)
    shown = [_picture(run.curves_file, "loss curves"), _picture(newest, f"samples: {newest and newest.name}")]
    head = f"<b>{html.escape(printable(str(run.path)))}</b>, {step}"
    table = html_table([("", "last"), *last]) if last else ""
    return f"<div>{head}{table}{''.join(shown)}</div>"


def _picture(file: Path | None, title: str) -> str:
    """A PNG file inside the page; '' if there is none, or something else."""
    try:
        if file is None or file.stat().st_size > MOST_BYTES:
            return ""
        content = read_file(file)
    except (OSError, UserError):
        return ""
    if not content.startswith(PNG):
        return ""
    data, title = base64.b64encode(content).decode(), html.escape(printable(title))
    picture = f'<img alt="{title}" style="max-width: 100%" src="data:image/png;base64,{data}">'
    return f"<figure><figcaption>{title}</figcaption>{picture}</figure>"
