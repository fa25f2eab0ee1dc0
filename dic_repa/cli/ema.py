"""`dic-repa ema`."""

from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.options import Count
from dic_repa.runtime.progress import print_result


@click.command("ema")
@click.argument("run", type=click.Path(path_type=Path), shell_complete=completion.runs)
@click.option("--sigma-rel", type=float, help="Width of the average, as a share of the training: 0.01 to 0.25.")
@click.option("--step", type=Count(1), help="As if training had ended here.  [default: the last snapshot]")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder.  [default: RUN/averages/sigma_rel-...]")
def command(run: Path, sigma_rel: float | None, step: int | None, out: Path | None):
    """Make an average of RUN's weights of any width after the run, from its stored snapshots (post-hoc EMA).

    Train with `train.power_ema=[0.05,0.1]` and `train.snapshot_every`. Without --sigma-rel, lists the snapshots. What
    is made is an inference checkpoint: sample from it.

    \b
    Examples:
      dic-repa train digits-urepa --set train.power_ema=[0.05,0.1] --set train.snapshot_every=50
      dic-repa ema runs/digits-urepa --sigma-rel 0.15
      dic-repa sample runs/digits-urepa/averages/sigma_rel-0.15
    """
    from dic_repa.files.outputs import check_folder

    if out:
        check_folder(out, "average")

    from dic_repa.runs.folder import RunFolder
    from dic_repa.training.posthoc import list_snapshots, save_reconstruction

    folder = RunFolder.open(run)
    if sigma_rel is None:
        for snapshot in list_snapshots(folder):
            print_result(f"step {snapshot.step:8d}  sigma_rel {snapshot.sigma_rel:g}  {snapshot.path}")
        return
    out = out or folder.path / "averages" / (f"sigma_rel-{sigma_rel:g}" + (f"-step-{step}" if step else ""))
    step = save_reconstruction(folder, sigma_rel, out, step)
    print_result(f"average of width {sigma_rel:g} after step {step}: {out}")
