"""`dic-repa solvers`."""

from __future__ import annotations

from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.groups import Group
from dic_repa.cli.options import PATH, Count, Several
from dic_repa.errors import UserError
from dic_repa.registry import import_plugin
from dic_repa.runtime.progress import print_result
from dic_repa.runtime.table import format_rows
from dic_repa.samplers import list_solvers


@click.group("solvers", cls=Group, invoke_without_command=True)
@click.option("--plugin", "plugins", metavar="MODULE", multiple=True, help="Import a module that registers solvers.")
@click.pass_context
def command(context: click.Context, plugins: tuple[str, ...]):
    """List the solvers: order, network evaluations per step, deterministic or not, and when to take which.

    The order is that of the error in the step size (for an SDE in the mean): at order 2, half the step makes a
    quarter of the error. "auto" means that the solver chooses its steps itself, from --rtol and --atol.

    \b
    Examples:
      dic-repa solvers
      dic-repa solvers compare runs/digits-urepa
    """
    for plugin in plugins:
        import_plugin(plugin)
    if context.invoked_subcommand is not None:
        return
    rows = [("solver", "process", "order", "evaluations", "random", "")]
    for info in list_solvers():
        facts = (str(info.order), str(info.evaluations or "auto"), "no" if info.deterministic else "yes")
        rows.append((info.name, info.process, *facts, info.description))
    print_result(format_rows(rows, left=(0, 1, 4, 5)))


@command.command("compare")
@click.argument("run", type=PATH, shell_complete=completion.runs)
@click.option(
    "--solvers",
    "names",
    type=Several(str),
    shell_complete=completion.solvers,
    default="euler,heun,ab2,dpmpp-2m,rk4,dopri5,euler_maruyama,ou",
)
@click.option(
    "--evaluations",
    type=Several(Count(1, "solver-steps")),
    default="6,12,24,48,96",
    help="Network evaluations per image.",
)
@click.option("--num", type=Count(2, "images"), default=500, help="Samples for each point.")
@click.option("--out", type=PATH, help="The plot.  [default: RUN/evaluation/solvers.png]")
def compare(run: Path, names: list[str], evaluations: list[int], num: int, out: Path | None):
    """Sample RUN with each solver at each cost, judge the samples, and plot quality against cost.

    An adaptive solver is run at tolerances from 1e-1 to 1e-4, and plotted at the evaluations it needs. Each point is
    kept in RUN/evaluation, so that a second call draws the plot anew at once.

    \b
    Example:
      dic-repa solvers compare runs/digits-urepa --solvers euler,heun,ab2 --evaluations 8,16,32
    """
    from dic_repa.evaluation.metrics import title
    from dic_repa.evaluation.solvers import compare_solvers, save_comparison
    from dic_repa.files.pictures import check_figure

    out = out or run / "evaluation" / "solvers.png"
    check_figure(out)
    points = []
    for point in compare_solvers(run, names, evaluations, num):
        points.append(point)
        shown = ", ".join(f"{title(score)} {value:.4g}" for score, value in point.scores.items())
        print_result(f"{point.solver:15} {point.evaluations:4} evaluations  {shown}")
    if not points:
        raise UserError(f"no solver of {', '.join(names)} takes as few as {max(evaluations)} evaluations: allow more")
    save_comparison(points, out)
    print_result(f"plot: {out}")
