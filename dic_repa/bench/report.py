"""Rows of a measurement as a table and as a bar chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dic_repa.files.pictures import new_figure, save_figure
from dic_repa.runtime.table import format_rows

COLUMNS = {  # key of a row: heading and format
    "label": ("what", "{}"),
    "batch": ("batch", "{}"),
    "images_per_second": ("images/s", "{:.4g}"),
    "spread": ("quartiles", "{0[0]:.4g}-{0[1]:.4g}"),
    "ratio": ("to first", "{:.2f}"),
    "milliseconds": ("ms", "{:.4g}"),
    "gmacs": ("GMACs", "{:.2f}"),
    "tflops": ("TFLOP/s", "{:.3g}"),
    "matrix_share": ("of matrix peak", "{:.0%}"),
    "convolution_share": ("of conv peak", "{:.0%}"),
    "memory_mb": ("MB", "{:.0f}"),
    "difference": ("differs by", "{:.1e}"),
    "time_in_convolutions": ("in convs", "{:.0%}"),
    "evaluations": ("NFE", "{}"),
    "decode_share": ("decoding", "{:.0%}"),
}


def table(rows: Sequence[dict]) -> str:
    """The rows under headings, with the columns that at least one of them has."""
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    cells = [[COLUMNS[key][1].format(row[key]) if key in row else "" for key in keys] for row in rows]
    return format_rows([[COLUMNS[key][0] for key in keys], *cells], left=(0,))


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
