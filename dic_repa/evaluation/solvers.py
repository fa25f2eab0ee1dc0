"""Quality against cost: the samples of one run, judged for each solver at several numbers of network evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dic_repa.errors import UserError
from dic_repa.evaluation.metrics import find_metric, title
from dic_repa.evaluation.runs import evaluate_run
from dic_repa.files.pictures import new_figure, save_figure
from dic_repa.recipe import SampleSection
from dic_repa.samplers import solver_info

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Point:
    """One solver at one cost: evaluations of the network per image, and what its samples scored."""

    solver: str
    evaluations: int
    scores: dict[str, float]


def compare_solvers(run: str | Path, solvers: Sequence[str], budgets: Sequence[int], num: int) -> Iterator[Point]:
    """Judge `num` samples of `run` for each solver and each budget of network evaluations, without guidance.

    A solver of k evaluations per step takes budget / k steps, and is left out if that is less than one; an adaptive one
    takes the tolerances instead. A UserError names an unknown solver.
    """
    for info in [solver_info(name) for name in solvers]:  # all of them first
        settings = [{"rtol": tol, "atol": tol} for tol in TOLERANCES]
        if info.kind == "fixed":
            each = info.evaluations or 1  # an implicit method takes as many as it needs
            settings = [{"steps": budget // each} for budget in budgets if budget >= each]
        for options in settings:
            judged = evaluate_run(run, SampleSection(solver=info.name, num=num, batch_size=100, **options))
            found = {name: value for name, value in judged.scores.items() if isinstance(value, float)}
            if not found:
                raise UserError(f"the recipe of {run} gives no score to plot")
            yield Point(info.name, judged.evaluations, found)


def save_comparison(points: Sequence[Point], path: str | Path) -> None:
    """Plot each score over the evaluations, a line for each solver; stochastic ones dashed, adaptive ones dotted."""
    from matplotlib.ticker import LogFormatter, NullFormatter

    class PlainLogFormatter(LogFormatter):
        """5.3 and 0.3 instead of 5.3 x 10^0 and 3e-01."""

        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    shown = list(dict.fromkeys(score for point in points for score in point.scores))
    figure, axes = new_figure(1, len(shown), (5.2 * len(shown), 3.8))
    for i, solver in enumerate(dict.fromkeys(point.solver for point in points)):
        info = solver_info(solver)
        own = sorted((p for p in points if p.solver == solver), key=lambda p: p.evaluations)
        line = "--" if not info.deterministic else ":" if info.kind == "adaptive" else "-"
        style = {"label": solver, "linestyle": line, "marker": "osv^D*XP"[i % 8], "markersize": 5, "linewidth": 1.4}
        for axis, score in zip(axes[0], shown):
            axis.plot([p.evaluations for p in own], [p.scores.get(score, math.nan) for p in own], **style)
    ticks: list[int] = []
    for cost in sorted({point.evaluations for point in points}):
        if not ticks or cost > 1.3 * ticks[-1]:  # the others would overlap
            ticks.append(cost)
    for axis, score in zip(axes[0], shown):
        metric = find_metric(score)
        axis.set_title(f"{title(score)} ({metric.better} is better)" if metric else score)
        if metric and metric.better == "lower" and all(point.scores.get(score, 1) > 0 for point in points):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(PlainLogFormatter())
            axis.yaxis.set_minor_formatter(PlainLogFormatter())
        axis.set(xlabel="network evaluations per image", xscale="log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8)
    save_figure(figure, path, dpi=130)
