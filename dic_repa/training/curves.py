"""The picture of the loss curves, of one run or of several side by side."""

import json

from dic_repa.files.pictures import new_figure, save_figure
from dic_repa.runs.folder import RunFolder

_PANELS = {
    "denoising": ("denoising loss", 1.0),
    "token": ("similarity to the encoder", -1.0),
    "manifold": ("manifold loss", 1.0),
}


def read_metrics(run: RunFolder) -> list[dict]:
    """The lines of metrics.jsonl, without a last one that a kill has cut short."""
    records = []
    for line in run.metrics_file.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def save_curves(runs: list[RunFolder], path=None) -> None:
    """Plot the runs' curves into `path`, by default into the first run's curves.png."""
    from matplotlib.ticker import MaxNLocator

    records = {run.path.name: read_metrics(run) for run in runs}
    names = {name for lines in records.values() for line in lines for name in line}
    terms = {name.split(".")[2] for name in names if name.startswith("alignment.")}
    panels = [panel for panel in _PANELS if panel in names | terms]
    panels += sorted(terms - set(_PANELS))  # of the user's own alignment loss
    if not panels:
        return
    figure, axes = new_figure(1, len(panels), (4.6 * len(panels), 3.4))
    for axis, panel in zip(axes[0], panels):
        title, sign = _PANELS.get(panel, (f"{panel}, of the alignment", 1.0))
        for run, lines in records.items():
            for series in sorted(n for n in names if n.split(".")[-1] == panel):
                points = [(line["step"], sign * line[series]) for line in lines if line.get(series) is not None]
                if points:
                    label = run if series.count(".") < 2 else f"{run} [{series.split('.')[1]}]"
                    axis.plot(*zip(*points), label=label, linewidth=1.4, marker="o" if len(points) == 1 else None)
        axis.set(title=title, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if panels[0] == "denoising":
        axes[0][0].set_yscale("log")
        axes[0][0].yaxis.set_major_formatter("{x:g}")
        axes[0][0].yaxis.set_minor_formatter("{x:g}")
    if len(runs) > 1:
        axes[0][0].legend(fontsize=8)
    save_figure(figure, path or runs[0].curves_file, dpi=130)
