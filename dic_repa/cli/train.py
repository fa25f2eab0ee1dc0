"""`dic-repa train`."""

import contextlib
import json
import os
import shlex
import sys
import time
from pathlib import Path

import click

from dic_repa.cli import completion
from dic_repa.cli.judgements import evaluate_and_show
from dic_repa.cli.options import Command, Count, option_group
from dic_repa.errors import UserError, full_memory, is_main_process, lost_process, when_interrupted
from dic_repa.recipe import Recipe, load_training_recipe
from dic_repa.runs.checkpoints import checkpoint_step
from dic_repa.runs.folder import RunFolder
from dic_repa.runtime.progress import print_result, say
from dic_repa.runtime.threads import choose_threads
from dic_repa.trust import names_code, trusting_code

GIB = 2**30
GPU_SIZES = (16, 24, 40, 48, 80, 96, 141)  # GiB
MARGIN = 1.2  # of an estimate: workspaces, fragmentation, gradients of activations


@click.command("train", cls=Command)
@click.argument("recipe", required=False, shell_complete=completion.recipes)
@option_group(
    "The run",
    click.option("--out", "path", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/RECIPE]"),
    click.option(
        "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key of the recipe; repeatable."
    ),
    click.option("--overwrite", is_flag=True, help="Remove the run that is there, but no other file, and begin anew."),
)
@option_group(
    "Going on with a run",
    click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of a run."),
    click.option("--allow-change", is_flag=True, help="With --resume: also with a recipe that changes the run."),
)
@option_group(
    "Trying it out",
    click.option("--dry-run", is_flag=True, help="Three steps on random data, and what the whole run would take."),
    click.option("--processes", type=Count(1), default=1, help="With --dry-run: processes of the run."),
    click.option("--json", "as_json", is_flag=True, help="With --dry-run: print JSON."),
)
def command(
    recipe: str | None, path: Path | None, overrides: tuple[str, ...], resume: bool, allow_change: bool,
    overwrite: bool, dry_run: bool, processes: int, as_json: bool,
):  # fmt: skip
    """Train RECIPE (a name from `dic-repa recipes`, or a YAML file) into a run folder.

    Samples from the averaged weights and judges them at the end, where the recipe has an `evaluate` section. Ctrl-C is
    safe: the newest checkpoint stays whole, and the command to go on is printed. SIGTERM and SIGUSR1 save a checkpoint
    first and exit with code 75, on which a scheduler can requeue the job.

    --resume continues the run that RECIPE or --out names, with its own recipe. Keys that RECIPE or --set changes are
    listed; a change that affects the weights needs --allow-change.

    --dry-run builds everything, runs three steps on random data and prints parameters, memory, speed, time and energy
    to the end, the disk space for checkpoints, and how the recipe differs from its row of a paper. It writes nothing
    and needs no data; without a GPU the memory is estimated from shapes.

    \b
    Examples:
      dic-repa train digits-urepa
      dic-repa train digits-urepa --out runs/quick --set train.steps=200
      dic-repa train --resume runs/quick
      dic-repa train --resume runs/quick --set train.steps=1000
      dic-repa train dic-xl-urepa --dry-run --processes 8     does it fit, and how long will it take?
      dic-repa train dic-xl-urepa --set data.path=/data/imagenet256 --set train.micro_batch=16
      accelerate launch -m dic_repa train dic-xl-urepa        on all GPUs of this machine
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    if (as_json or processes > 1) and not dry_run:
        raise click.UsageError("--json and --processes go with --dry-run; a run has the processes it is launched in")
    settings, path = choose_recipe(recipe, path, overrides, resume)
    if dry_run:
        if resume:
            say("note: --resume is ignored: --dry-run tries the first steps of a run")
        from dic_repa.training.dry_run import dry_run as try_out

        report = try_out(settings, path, processes)
        if is_main_process():
            print_result(json.dumps(report, indent=2) if as_json else dry_run_text(report))
        return

    with when_interrupted(lambda: interrupted_message(path)):
        if not (resume and is_finished(settings, path, allow_change)):
            train_and_show(settings, path, resume, overwrite, allow_change)


def train_and_show(settings: Recipe, path: Path, resume: bool, overwrite: bool, allow_change: bool) -> None:
    """Train, score, and print where everything is. After a scheduler's signal, exit with the code to requeue by."""
    if not resume:
        RunFolder(path).check_new(overwrite)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    shared = f", shared by {launched} processes" if launched > 1 else ""
    # Now, since torch takes seconds to import.
    say(f"training into {path}: {settings.train.steps:,} steps of {settings.train.batch_size} images{shared}")
    from dic_repa.training import Preempted, train
    from dic_repa.training.preemption import REQUEUE_CODE, stop_request
    from dic_repa.training.trackers import Trackers

    choose_threads(tell=False)
    begin = time.perf_counter()
    try:
        with stop_request(save=False), Trackers() as trackers:
            run = train(settings, path, resume, overwrite, allow_change, trackers)
            if not is_main_process():
                return
            print_result(f"trained {settings.train.steps} steps in {time.perf_counter() - begin:.0f} s: {run.path}")
            if judged := show_results(run, settings):
                scores = {k: v for k, v in judged.scores.items() if isinstance(v, int | float) and "count" not in k}
                trackers.log({f"final/{name}": score for name, score in scores.items()}, judged.step, "final")
                trackers.log_picture("final/samples", judged.picture, judged.step)
    except Preempted as reason:
        if is_main_process():
            begun = (path / "recipe.yaml").is_file()
            print_result(f"{reason}; to go on: {resume_command(path) if begun else 'the same command'}", sys.stderr)
        raise SystemExit(REQUEUE_CODE) from None
    except (MemoryError, RuntimeError) as error:
        if memory := full_memory(error):
            hint = "lower train.micro_batch or set train.gradient_checkpointing=true, which change nothing else"
            hint += ", or lower data.workers" * ("GPU" not in memory)
            raise UserError(f"{memory}; {hint}; {kept_message(path)}") from error
        if lost := lost_process(error):
            raise UserError(f"{lost}; {kept_message(path)}") from error
        raise


def choose_recipe(
    recipe: str | None, path: Path | None, overrides: tuple[str, ...], resume: bool
) -> tuple[Recipe, Path]:
    """The recipe and the run's folder; with `resume`, those of a run that `recipe` or `path` names.

    `recipe` names a run if it holds a recipe.yaml, or has a slash and is not a YAML file.
    """
    file = Path(recipe or "")
    names_run = (file / "recipe.yaml").is_file() or ("/" in (recipe or "") and file.suffix not in (".yaml", ".yml"))
    if resume and (recipe is None or names_run):
        if recipe is None and path is None:
            raise click.UsageError("--resume without a recipe takes the run: dic-repa train --resume runs/NAME")
        if recipe and path and file.resolve() != path.resolve():
            raise click.UsageError(f"--resume names two runs, {recipe} and {path}; leave --out out")
        return RunFolder.open(path or file).recipe(overrides), path or file
    if recipe is None:
        raise click.UsageError("Missing argument 'RECIPE': a name from `dic-repa recipes`, or a YAML file")
    return load_training_recipe(recipe, overrides), path or Path("runs") / file.stem


def is_finished(settings: Recipe, path: Path, allow_change: bool) -> bool:
    """Whether the run has done all its steps; then say so, and score it if that has not been done yet."""
    run, steps = RunFolder(path), settings.train.steps
    run.check_resume(settings, allow_change)
    if not run.is_finished(steps):
        return False
    if is_main_process():
        run.remove_leftovers()
        print_result(f"{path} is finished: {steps} of {steps} steps")
        judged = any(run.path.glob(f"evaluation/step_{steps:08d}-*.json"))
        show_results(run, settings.model_copy(update={"evaluate": None}) if judged else settings)
    return True


def show_results(run: RunFolder, settings: Recipe):
    """Score a finished run, if its recipe says how, print where everything is, and return the judgement."""
    judged = None
    if settings.evaluate:
        with trusting_code():  # of the run that these settings have just made
            judged = evaluate_and_show([run.path])[0]
    if run.curves_file.is_file():
        print_result(f"loss curves: {run.curves_file}")
    if settings.train.sample_every:
        print_result(f"samples over training: {run.samples}")
    own_code = ["--trust-code"] * names_code(settings.model_dump())
    say(f"to sample from it: {shlex.join(['dic-repa', 'sample', str(run.path), *own_code])}", file=sys.stdout)
    return judged


def interrupted_message(path: Path) -> str:
    """The line after Ctrl-C: what is safe, and how to continue."""
    run = RunFolder(path)
    if not run.recipe_file.is_file():
        return "interrupted before the run began; nothing was written"
    return f"interrupted; {kept_message(path)}"


def kept_message(path: Path) -> str:
    """What a run keeps, and how to continue it."""
    newest = max(RunFolder(path).list_checkpoints(), key=checkpoint_step, default=None)
    safe = f"the checkpoint of step {checkpoint_step(newest)} is whole" if newest else "there is no checkpoint yet"
    return f"{safe}; to go on: {resume_command(path)}"


def resume_command(path: Path) -> str:
    """The command that continues the run at `path`."""
    own_code = []
    with contextlib.suppress(UserError):
        own_code = ["--trust-code"] * names_code(RunFolder(path).recipe(only_read=True).model_dump())
    return shlex.join(["dic-repa", "train", "--resume", str(path), *own_code])


def dry_run_text(report: dict) -> str:
    """The report of --dry-run as lines."""
    batch, p = report["batch"], report["parameters"]
    frozen = "".join(f"; frozen: {name} {count / 1e6:.1f} M" for name, count in p["encoders"].items())
    all_of_it = p["denoiser"] + p["heads"] + p["adapters"]
    if p["trained"] < all_of_it:
        frozen += f"; {p['trained'] / 1e6:.4g} M train"
    rows = [
        ("device", f"{report['device']}; {report['processes']} process{'es' * (report['processes'] > 1)}"),
        ("batch", f"{batch['global']}, {batch['of a process']} a process, {batch['of a pass']} a pass"),
        ("data", _data(**report["data"])),
        ("parameters", f"denoiser {p['denoiser'] / 1e6:.2f} M, heads {p['heads'] / 1e6:.2f} M{frozen}"),
        ("MACs", f"{report['gmacs']:.4g} G for an image, forward, denoiser"),
        ("memory", _memory(report)),
    ]
    if "micro_batch" in report:
        rows.append(("micro_batch", report["micro_batch"]["advice"]))
    if "steps_per_second" in report:
        speed = f"{report['steps_per_second']:.3g} steps/s, {report['images_per_second']:.4g} images/s "
        speed += f"(the first step took {report['first_step_seconds']:.1f} s)"
        if report["processes"] != report["launched"]:
            speed += f"; one process measured, {report['processes']} assumed as fast, their exchange not counted"
        rows.append(("speed", speed))
        energy = report["kwh_to_the_end"]
        spent = f"{energy:.4g} kWh at {report['watts']:.0f} W a GPU" if energy else "energy not measured"
        rows.append(("to the end", f"{_duration(report['hours_to_the_end'])}, {spent}"))
    else:
        rows.append(("speed", "not measured"))
    disk = report["disk"]
    snapshots = f" and {disk['snapshots']} snapshots" if disk["snapshots"] else ""
    enough = f"{_gib(disk['total'])} of {_gib(disk['free'])} free{' - TOO LITTLE' * (disk['total'] > disk['free'])}"
    rows.append(("disk", f"{_gib(disk['checkpoint'])} a checkpoint; {disk['kept']} at once{snapshots}: {enough}"))
    rows += _paper(report["paper"])
    rows += [("note", note) for note in report["notes"]]
    return "\n".join(f"{name:12}{text}" for name, text in rows)


def _data(shape: list[int], autoencoder: str | None) -> str:
    kind = f"latents of {autoencoder}" if autoencoder not in (None, "none") else "numbers of an image"
    return f"{'x'.join(map(str, shape))}, {kind}"


def _memory(report: dict) -> str:
    if memory := report.get("memory"):
        return f"peak {_gib(memory['peak'])} of {_gib(memory['total'])}, headroom {_gib(memory['headroom'])} (measured)"
    estimate = report["memory_estimate"]
    total = sum(estimate.values())
    parts = ", ".join(f"{name} {_gib(count)}" for name, count in estimate.items() if count)
    size = next((size for size in GPU_SIZES if MARGIN * total <= size * GIB), None)
    fits = f"a GPU of {size} GiB should do" if size else "more than one GPU has: lower train.micro_batch"
    return f"about {_gib(total)} of a GPU, an ESTIMATE from shapes ({parts}); {fits}"


def _paper(paper: dict | None) -> list[tuple[str, str]]:
    if paper is None:
        return [("paper", "no row of a paper")]
    results = _results(paper["results"])
    if not results and paper["elsewhere"]:
        others = ", ".join(f"{_results(values)} of {network}" for network, values in paper["elsewhere"].items())
        results = f"no published number of this network, {others}"
    rows = [("paper", paper["row"] + (f": {results}" if results else ""))]
    if paper["differs"]:
        rows.append(("", paper["differs"]))
    if paper["recipe"] is None:
        return [*rows, ("", "no recipe of that row comes with the package, so nothing to compare with")]
    changed = [
        f"{key}: {json.dumps(mine)} instead of {json.dumps(theirs)}" for key, (theirs, mine) in paper["changed"].items()
    ]
    return rows + [("", line) for line in changed or [f"all keys as in the recipe {paper['recipe']}"]]


def _results(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.1f} MiB"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"
