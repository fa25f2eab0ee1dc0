"""Quality against cost: the samples of one run, judged for each solver at several numbers of network evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dic_repa.evaluation.runs import evaluate_run
from dic_repa.recipe import SampleSection
from dic_repa.samplers import solver_info

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Point:
    """One solver at one cost: evaluations of the network per image, and what its samples scored."""

    solver: str
    evaluations: int
    recognised: float | None
    frechet: float


def compare_solvers(run: str | Path, solvers: Sequence[str], budgets: Sequence[int], num: int) -> Iterator[Point]:
    """Judge `num` samples of `run` for each solver and each budget of network evaluations, without guidance.

    A solver of k evaluations per step takes budget / k steps, and is left out where that is less than one; an
    adaptive one takes the tolerances instead. A UserError names an unknown solver.
    """
    infos = [solver_info(name) for name in solvers]
    for info in infos:
        settings = [{"rtol": tol, "atol": tol} for tol in TOLERANCES]
        if info.kind == "fixed":
            each = info.evaluations or 1  # an implicit method takes as many as it needs
            settings = [{"steps": budget // each} for budget in budgets if budget >= each]
        for options in settings:
            judged = evaluate_run(run, SampleSection(solver=info.name, num=num, batch_size=100, **options))
            yield Point(info.name, judged.evaluations, judged.scores["recognised"], judged.scores["frechet"])


def save_comparison(points: Sequence[Point], path: str | Path) -> None:
    """Plot both scores over the evaluations, a line for each solver; stochastic ones dashed, adaptive ones dotted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    labelled = all(point.recognised is not None for point in points)
    size = (5.2 * (1 + labelled), 3.8)
    figure, axes = plt.subplots(1, 1 + labelled, figsize=size, squeeze=False, layout="constrained")
    for i, solver in enumerate(dict.fromkeys(point.solver for point in points)):
        info = solver_info(solver)
        own = sorted((p for p in points if p.solver == solver), key=lambda p: p.evaluations)
        line = "--" if not info.deterministic else ":" if info.kind == "adaptive" else "-"
        style = {"label": solver, "linestyle": line, "marker": "osv^D*XP"[i % 8], "markersize": 5, "linewidth": 1.4}
        costs = [p.evaluations for p in own]
        axes[0][0].plot(costs, [p.frechet for p in own], **style)
        if labelled:
            axes[0][1].plot(costs, [100 * p.recognised for p in own], **style)
    axes[0][0].set(title="Fréchet distance (lower is better)", yscale="log")
    if labelled:
        axes[0][1].set(title="recognised, % (higher is better)")
    costs = sorted({point.evaluations for point in points})
    ticks = [cost for before, cost in zip([0, *costs], costs) if cost > 1.3 * before]  # the others would overlap
    for axis in axes[0]:
        axis.set(xlabel="network evaluations per image", xscale="log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
