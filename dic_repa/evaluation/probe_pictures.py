"""The pictures of a probe, of one model or of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dic_repa.files.pictures import new_figure, save_figure

TITLES = {
    "cka": "linear CKA",
    "cknna": "CKNNA",
    "linear_probe": "linear probe: accuracy",
    "cosine": "cosine through the head",
}


def save_pictures(records: Sequence[dict], names: Sequence[str], folder: Path) -> list[Path]:
    """heatmaps.png (taps over noise levels) and taps.png (curves over the taps) of one record or of several."""
    from matplotlib import colormaps

    measures = [name for name in TITLES if any(name in record["scores"] for record in records)]
    rows, columns = len(records), len(measures)
    tall = 1.2 + 0.3 * max(len(record["taps"]) for record in records)
    heat, axes = new_figure(rows, columns, (4.2 * columns, tall * rows))
    for j, measure in enumerate(measures):
        values = [record["scores"].get(measure) for record in records]
        known = [v for table in values if table for row in table for v in row if v is not None]
        for i, (record, name, table) in enumerate(zip(records, names, values)):
            axis = axes[i][j]
            axis.set_title(f"{name}  {TITLES[measure]}".strip(), fontsize=10)
            if table is None:
                axis.set_axis_off()
                continue
            cells = [[float("nan") if v is None else v for v in row] for row in table]
            shown = axis.imshow(cells, aspect="auto", vmin=min(0, *known), vmax=max(known), cmap="viridis")
            marks = ["● " if tap in record["aligned"] else "" for tap in record["taps"]]
            axis.set_yticks(range(len(cells)), [mark + tap for mark, tap in zip(marks, record["taps"])], fontsize=8)
            axis.set_xticks(range(len(record["times"])), [f"{t:g}" for t in record["times"]], fontsize=8)
            axis.set_xlabel("t (0 data, 1 noise)", fontsize=8)
            heat.colorbar(shown, ax=axis)
    files = [folder / "heatmaps.png", folder / "taps.png"]
    save_figure(heat, files[0], dpi=120)

    lines, axes = new_figure(1, columns, (4.2 * columns, 3.4))
    for axis, measure in zip(axes[0], measures):
        for record, name in zip(records, names):
            for j, t in enumerate(record["times"]):
                column = [row[j] for row in record["scores"].get(measure, [])]
                share = j / max(1, len(record["times"]) - 1)
                values = [float("nan") if v is None else v for v in column]
                axis.plot(
                    record["taps"][: len(values)],
                    values,
                    ".-",
                    color=colormaps["plasma"](0.9 * share),
                    label=f"{name}  {t:g}".strip(),
                )
        axis.set_title(TITLES[measure], fontsize=10)
        axis.tick_params("x", rotation=60, labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    style = {"loc": "upper left", "bbox_to_anchor": (1, 1), "fontsize": 8, "title_fontsize": 8}
    axes[0][-1].legend(title="t (0 data, 1 noise)", **style)
    save_figure(lines, files[1], dpi=120)
    return files
