"""The training loop: corrupt the data, run the denoiser, add the losses."""

import atexit
import contextlib
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dic_repa.alignment.cache import WithTokens
from dic_repa.errors import UserError
from dic_repa.files.hub import use_pins
from dic_repa.files.lock import locked
from dic_repa.files.outputs import MARKER, check_parents
from dic_repa.recipe import Recipe, TrainSection, load_training_recipe
from dic_repa.recipe.folders import note_current_folder
from dic_repa.runs.folder import RUNS, RunFolder
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.runtime.processes import Votes, on_main_process, start_processes
from dic_repa.runtime.progress import say
from dic_repa.runtime.watchdog import watched
from dic_repa.training.after_step import AfterStep
from dic_repa.training.checkpoint import CheckpointWriter, load_checkpoint, load_log
from dic_repa.training.evaluator import Evaluator
from dic_repa.training.inputs import Batches, check_batch
from dic_repa.training.log import MetricLog, run_header
from dic_repa.training.noise_scale import NoiseScale
from dic_repa.training.parts import build_parts, check_judge_of, check_sampling_and_evaluation
from dic_repa.training.preemption import Preempted, stop_request
from dic_repa.training.schedules import LearningRate
from dic_repa.training.shard_writer import ShardWriter
from dic_repa.training.sharding import wants_sharding
from dic_repa.training.step import StepGuard, TrainingStep
from dic_repa.training.trackers import Trackers, check_trackers


def train(
    recipe: Recipe | str | Path, path: str | Path | None = None, resume: bool = False, overwrite: bool = False,
    allow_change: bool = False, trackers: Trackers | None = None,
) -> RunFolder:  # fmt: skip
    """Train what `recipe` says into the run folder `path`, and return the run.

        run = dic_repa.train("digits-urepa")     # into runs/digits-urepa
        run.metrics["denoising"]                 # its curves: `pandas.DataFrame(run.metrics)` is a table of them
        model = dic_repa.load(run)

    Args:
        recipe: a `Recipe`, or the name or file of one.
        path: a new folder, by default runs/ and the recipe's name, unless one of the next two is set.
        resume: go on from the newest whole checkpoint (with `allow_change`, also with a recipe that changes the run).
        overwrite: remove the run at `path` first, and no other file.
        trackers: stay open for what is logged after the training.

    Raises:
        Preempted: when SIGTERM or SIGUSR1 has ended the run, with its state saved.
        UserError: when the run cannot begin, or stops because losses or gradients are not finite.
    """
    recipe, path = _named(recipe, path)
    recipe = note_current_folder(recipe)
    settings, run = recipe.train, RunFolder(path)
    for line in run.check_resume(recipe, allow_change) if resume else ():
        say(f"note: changed since the run began: {line}")
    check_parents(run.path / MARKER)
    with ExitStack() as stack:
        stack.enter_context(gpu_arithmetic(settings.tf32, benchmark=True))
        setup = stack.enter_context(ExitStack())
        what = "all that the recipe names, and the other processes, to be ready"
        setup.enter_context(watched("setup", what, recipe.timeouts.setup))
        trackers = trackers or stack.enter_context(Trackers())
        check_trackers(settings.trackers)
        accelerator = start_accelerator(settings)
        use_pins(run.downloads() if resume else {})
        if not resume:  # before `claim` marks the folder as a run's
            on_main_process(accelerator, lambda: run.check_new(overwrite))
        check_batch(settings, accelerator.num_processes)
        begins = not resume
        if resume and settings.init_from:  # it may have been stopped before its first checkpoint
            begins = on_main_process(accelerator, run.newest_checkpoint) is None
        parts = build_parts(recipe, accelerator, begins)
        train_step, learning_rate = TrainingStep(parts, settings, accelerator), LearningRate(recipe)
        check_sampling_and_evaluation(recipe, parts.objective)
        on_main_process(accelerator, lambda: check_judge_of(recipe))
        with watched("", "the reference of the scores", None):
            evaluator = Evaluator(recipe, run, parts, accelerator, trackers)

        opening = (stack, run, recipe, resume, overwrite, allow_change)
        checkpoint = on_main_process(accelerator, lambda: open_run(*opening))
        on_main_process(accelerator, lambda: trackers.start(run, recipe, resume))
        signals = stack.enter_context(stop_request())
        start = load_checkpoint(checkpoint, accelerator, parts) if checkpoint else 0
        if resume:
            on_main_process(accelerator, lambda: run.save_recipe(recipe))
        if accelerator.is_main_process:
            say(run_header(recipe, run, parts, accelerator, train_step.passes, start))
        data = WithTokens(parts.data, parts.caches) if parts.caches else parts.data
        guard, votes = StepGuard(accelerator, *parts.optimizers), Votes(accelerator)
        shards = ShardWriter(run.checkpoints, accelerator) if parts.sharded else None
        writer = stack.enter_context(CheckpointWriter(run, shards))
        noise = NoiseScale(parts.model, accelerator, settings.batch_size, train_step.passes, parts.sharded)
        log = stack.enter_context(MetricLog(run, accelerator, settings, start, trackers, noise, parts))
        log.watchers += [parts.joint.watch] if parts.joint else []
        if checkpoint:
            load_log(checkpoint, log, guard, noise)
        after = AfterStep(
            recipe, run, parts, accelerator, evaluator, writer, trackers, log, guard, votes, signals, start
        )
        with watched("", f"scores and samples of step {start}", None):
            after.make_up()
        incoming = stack.enter_context(contextlib.closing(Batches(data, recipe, accelerator, start, signals)))

        setup.close()
        for step in range(start, settings.steps):
            with log.waiting():
                batch = after.next_batch(incoming)
            with watched("step", f"step {step + 1}", recipe.timeouts.step):
                with log.gradients(step + 1):
                    norm, losses = train_step.gradients(batch, step)
                guard.judge(step + 1, losses, norm)
                rate = learning_rate.apply(parts.optimizers, step)
                train_step.update(step)
                verdict = guard.verdict()
                log.step(step + 1, losses, norm, rate, verdict.skipped)
            if verdict.in_a_row >= settings.max_skipped:
                after.stop_not_finite(verdict)
            with log.paused():
                after(step + 1)
        if votes.any(bool(signals)):
            after.stop(Preempted())
        after.finish()
    accelerator.wait_for_everyone()
    return run


def _named(recipe: Recipe | str | Path, path: str | Path | None) -> tuple[Recipe, str | Path]:
    """The recipe of a name or file, and the run's folder, as the command line chooses it."""
    if not isinstance(recipe, Recipe):
        recipe = load_training_recipe(recipe)
    if path is None and not recipe._name:
        raise UserError(
            "a recipe that was made in Python has no name: name the run's folder, train(recipe, 'runs/mine')"
        )
    return recipe, RUNS / recipe._name if path is None else path


def start_accelerator(settings: TrainSection) -> Accelerator:
    """The processes, devices and precision of a run; a UserError for a precision that this machine does not have."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != settings.precision:
        AcceleratorState._reset_state()  # a run before this one has made it, for the whole process
    # The others wait while the main process fills a feature cache or scores samples.
    accelerator = start_processes(patience=timedelta(hours=3), mixed_precision=settings.precision)
    if settings.precision == "fp16":
        on_cpu, sharded = accelerator.device.type == "cpu", wants_sharding(settings.sharding, accelerator)
        if why := "needs a GPU" if on_cpu else "does not go with sharding" if sharded else "":
            raise UserError(f"train.precision fp16 {why}; take bf16, or no for float32")
    atexit.unregister(accelerator.state.destroy_process_group)
    atexit.register(accelerator.state.destroy_process_group)  # not at the run's end: another run may follow
    return accelerator


def open_run(
    stack: ExitStack, run: RunFolder, recipe: Recipe, resume: bool, overwrite: bool, allow_change: bool
) -> Path | None:
    """Lock the folder until `stack` ends, prepare it, and return the checkpoint to continue from."""
    stack.enter_context(locked(run.path))
    run.claim()
    if resume:
        return run.resume(recipe, allow_change)
    run.create(recipe, overwrite)
    return None
