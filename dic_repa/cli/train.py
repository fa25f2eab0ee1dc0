"""`dic-repa train`."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import click

from dic_repa.cli.evaluate import evaluate_and_show
from dic_repa.errors import UserError, first_line, is_main_process, tells_of_errors
from dic_repa.recipe import Recipe, load_training_recipe


@click.command("train")
@click.argument("recipe")
@click.option("--out", "path", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/RECIPE]")
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the recipe; repeatable."
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run.")
@click.option("--allow-change", is_flag=True, help="With --resume: also with a recipe that changes the run.")
@click.option("--overwrite", is_flag=True, help="Remove a run of that name and begin anew.")
@click.option("--dry-run", is_flag=True, help="Three steps on random data, and what the whole run would take.")
@click.option(
    "--processes", type=click.IntRange(1), default=1, help="With --dry-run: how many the run will have.  [default: 1]"
)
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print JSON.")
def command(
    recipe: str, path: Path | None, overrides: tuple[str, ...], resume: bool, allow_change: bool, overwrite: bool,
    dry_run: bool, processes: int, as_json: bool,
):  # fmt: skip
    """Train RECIPE (a name from `dic-repa recipes`, or a YAML file) into a run folder.

    Samples from the averaged weights and judges them at the end, where the recipe has an `evaluate` section. Ctrl-C is
    safe: the newest checkpoint stays whole, and the command to go on is printed. SIGTERM and SIGUSR1 save a checkpoint
    first and exit with code 75, on which a scheduler can requeue the job.

    --dry-run builds all of it, runs three steps on random data and prints parameters, memory, speed, time and energy to
    the end, the disk that checkpoints take, and where the recipe departs from its row of a paper. It writes nothing and
    needs no data; without a GPU the memory is estimated from shapes.

    \b
    Examples:
      dic-repa train digits-urepa
      dic-repa train digits-urepa --out runs/quick --set train.steps=200
      dic-repa train digits-urepa --resume
      dic-repa train dic-xl-urepa --dry-run --processes 8     does it fit, and how long will it take?
      dic-repa train dic-xl-urepa --set data.path=/data/imagenet256 --set train.micro_batch=16
      accelerate launch -m dic_repa train dic-xl-urepa        on all GPUs of this machine
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    if (as_json or processes > 1) and not dry_run:
        raise click.UsageError("--json and --processes go with --dry-run; a run has the processes it is launched in")
    settings = load_training_recipe(recipe, overrides)
    path = path or Path("runs") / Path(recipe).stem
    if dry_run:
        if resume:
            click.echo("note: --resume is ignored: --dry-run tries the first steps of a run", err=True)
        show_dry_run(settings, path, processes, as_json)
        return

    from torch import OutOfMemoryError

    from dic_repa.training import Preempted, train
    from dic_repa.training.preemption import REQUEUE_CODE, preempted_by_signals
    from dic_repa.training.trackers import Trackers

    begin = time.perf_counter()
    try:
        with preempted_by_signals(), Trackers() as trackers:
            run = train(settings, path, resume, overwrite, allow_change, trackers)
            if not is_main_process():
                return
            click.echo(f"trained {settings.train.steps} steps in {time.perf_counter() - begin:.0f} s: {run.path}")
            if settings.evaluate:
                (judged,) = evaluate_and_show([run.path])
                trackers.log_final(judged.scores, judged.picture, judged.step)
            click.echo(f"loss curves: {run.curves_file}")
            if settings.train.sample_every:
                click.echo(f"samples over training: {run.samples}")
            click.echo(f"to sample from it: {shlex.join(['dic-repa', 'sample', str(run.path)])}")
    except Preempted as reason:
        if is_main_process():
            begun = (path / "recipe.yaml").is_file()
            click.echo(f"{reason}; to go on:\n  {resume_command(path) if begun else 'the same command'}", err=True)
        raise SystemExit(REQUEUE_CODE) from None
    except OutOfMemoryError as error:
        fault = UserError(
            f"the GPU's memory is full ({first_line(error)}); lower train.micro_batch or set "
            "train.gradient_checkpointing=true, which change nothing else: --resume goes on with them"
        )
        if not tells_of_errors():  # the one that does may have enough
            click.echo(f"error: {fault}", err=True)
        raise fault from None
    except KeyboardInterrupt:
        if is_main_process():
            click.echo(interrupted_message(path), err=True)
        raise


def interrupted_message(path: Path) -> str:
    """What is safe, and how to go on."""
    from dic_repa.training.run_folder import RunFolder, checkpoint_step

    run = RunFolder(path)
    newest = run.newest_checkpoint()
    if not run.recipe_file.is_file():
        return "interrupted before the run began"
    safe = f"the checkpoint of step {checkpoint_step(newest)} is whole" if newest else "there is no checkpoint yet"
    return f"interrupted; {safe}. To go on:\n  {resume_command(path)}"


def resume_command(path: Path) -> str:
    """The line that goes on with the run at `path`."""
    return shlex.join(["dic-repa", "train", str(path / "recipe.yaml"), "--out", str(path), "--resume"])


def show_dry_run(settings: Recipe, path: Path, processes: int, as_json: bool) -> None:
    """Try the recipe out, and print what the run would take."""
    from dic_repa.cli.dry_run import dry_run_text
    from dic_repa.training.dry_run import dry_run

    report = dry_run(settings, path, processes)
    if is_main_process():
        click.echo(json.dumps(report, indent=2) if as_json else dry_run_text(report))
