"""Rows of a measurement as a table, as JSON and as a bar chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.benchmark import Measurement

from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import MARK
from dic_repa.files.pictures import new_figure, save_figure
from dic_repa.runtime.table import format_rows

HEADINGS = {
    "label": "what",
    "batch": "batch",
    "images_per_second": "images/s",
    "spread": "quartiles",
    "ratio": "to first",
    "milliseconds": "ms",
    "gmacs": "GMACs",
    "tflops": "TFLOP/s",
    "matrix_share": "of matrix peak",
    "convolution_share": "of conv peak",
    "memory_mb": "MB",
    "difference": "differs by",
    "time_in_convolutions": "in convs",
    "evaluations": "NFE",
    "decode_share": "decoding",
}
_FORMATS = {
    "images_per_second": "{:.4g}", "ratio": "{:.2f}", "milliseconds": "{:.4g}", "gmacs": "{:.2f}", "tflops": "{:.3g}",
    "matrix_share": "{:.0%}", "convolution_share": "{:.0%}", "memory_mb": "{:.0f}", "difference": "{:.1e}",
    "time_in_convolutions": "{:.0%}", "decode_share": "{:.0%}",
}  # fmt: skip


def speed(timing: Measurement, images: int) -> dict[str, float | list[float]]:
    """Images per second, with quartiles, and milliseconds of one call on `images` images."""
    low, high = map(float, np.quantile(timing.times, (0.25, 0.75)))
    return {
        "images_per_second": images / timing.median,
        "spread": [images / high, images / low],
        "milliseconds": 1000 * timing.median,
    }


def add_ratios(rows: Sequence[dict]) -> None:
    """To each row, its images per second over those of the first row of the same batch size."""
    first: dict[int, float] = {}
    for row in rows:
        row["ratio"] = row["images_per_second"] / first.setdefault(row["batch"], row["images_per_second"])


def table(rows: Sequence[dict]) -> str:
    """The rows under headings, with the columns that at least one of them has."""
    keys = [key for key in HEADINGS if any(row.get(key) is not None for row in rows)]
    cells = [[HEADINGS[key] for key in keys], *([_cell(key, row.get(key)) for key in keys] for row in rows)]
    return format_rows(cells, left=(0,))


def _cell(key: str, value) -> str:
    if value is None:
        return ""
    if key == "spread":
        return "{:.4g}-{:.4g}".format(*value)
    return _FORMATS.get(key, "{}").format(value)


def environment_lines(environment: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in environment.items())


def save_json(result: dict, path: Path) -> None:
    write_whole(path, json.dumps({"made_by": MARK, **result}, indent=2) + "\n")


def save_chart(rows: Sequence[dict], path: Path, title: str) -> None:
    """Images per second of each row as a bar with its quartiles, one panel for each batch size."""
    batches = sorted({row["batch"] for row in rows})
    widest = max(sum(row["batch"] == batch for row in rows) for batch in batches)
    figure, axes = new_figure(len(batches), 1, (9, len(batches) * (0.9 + 0.36 * widest)))
    for axis, batch in zip(axes[:, 0], batches):
        shown = [row for row in rows if row["batch"] == batch]
        values = [row["images_per_second"] for row in shown]
        errors = [[abs(v - row["spread"][end]) for v, row in zip(values, shown)] for end in (0, 1)]
        axis.barh(range(len(shown)), values, xerr=errors, color="#4878a8", ecolor="#333333", capsize=2)
        axis.set_yticks(range(len(shown)), [row["label"] for row in shown], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        for i, row in enumerate(shown):
            text = f"{row['images_per_second']:.4g} ({row['ratio']:.2f}x)"
            place = (max(row["images_per_second"], row["spread"][1]), i)
            axis.annotate(text, place, xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_xlabel(f"images per second at batch {batch}")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path, dpi=150)
