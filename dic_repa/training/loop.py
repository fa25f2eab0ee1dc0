"""The training loop: corrupt the data, run the denoiser, add the losses."""

from __future__ import annotations

import atexit
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from dic_repa.alignment.cache import WithTokens
from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_whole
from dic_repa.recipe import Recipe, TrainSection
from dic_repa.recipe.folders import note_current_folder
from dic_repa.runs.folder import RunFolder
from dic_repa.runs.lock import locked
from dic_repa.runtime.precision import tf32
from dic_repa.runtime.processes import start_processes
from dic_repa.runtime.progress import say
from dic_repa.training.checkpoint import (
    CheckpointWriter,
    copy_state,
    load_checkpoint,
    write_checkpoint,
    write_snapshots,
)
from dic_repa.training.evaluator import Evaluator
from dic_repa.training.header import run_header
from dic_repa.training.inputs import batches, check_batch, data_order
from dic_repa.training.log import MetricLog
from dic_repa.training.parts import Parts, build_parts, check_sampling_and_evaluation
from dic_repa.training.preemption import Preempted, StopRequest
from dic_repa.training.schedules import LearningRate
from dic_repa.training.sharding import wants_sharding
from dic_repa.training.step import PassLosses, TrainingStep
from dic_repa.training.step_guard import StepGuard, Verdict
from dic_repa.training.trackers import Trackers, check_trackers

FAR_BEHIND = 0.1  # of the steps so far: an average with warm-up is, until its warm-up is over


def train(
    recipe: Recipe, path: str | Path, resume: bool = False, overwrite: bool = False, allow_change: bool = False,
    trackers: Trackers | None = None,
) -> RunFolder:  # fmt: skip
    """Train what `recipe` says into the run folder `path`, and return it.

    The folder must be new, unless `resume` goes on from its newest whole checkpoint (with `allow_change`, also with
    another recipe) or `overwrite` removes it, and no other file. `trackers` are left open, for what comes after the
    training. Runs in as many processes as it was launched in (`accelerate launch`, `torchrun`), with the same result.
    Raises Preempted when a SIGTERM or SIGUSR1 has ended it, with its state saved; UserError where the run cannot begin,
    or stops for losses or gradients that are not finite.
    """
    recipe = note_current_folder(recipe)
    settings, run = recipe.train, RunFolder(path)
    for line in run.check_resume(recipe, allow_change) if resume else ():
        say(f"note: other than before, {line}")
    with ExitStack() as stack:
        stack.enter_context(tf32(settings.tf32))
        trackers = trackers or stack.enter_context(Trackers())
        check_trackers(settings.trackers)
        accelerator = start_accelerator(settings)
        if not resume:  # told before the work
            on_main_process(accelerator, lambda: run.check_new(overwrite))
        check_batch(settings, accelerator.num_processes)  # told before the work
        parts = build_parts(recipe, accelerator)
        optimizer, train_step = parts.optimizer, TrainingStep(parts, settings, accelerator)
        learning_rate = LearningRate(recipe)
        check_sampling_and_evaluation(recipe, parts.objective)
        evaluator = Evaluator(recipe, run, parts, accelerator, trackers)
        on_main_process(accelerator, evaluator.prepare)
        checkpoint = open_run(stack, accelerator, run, recipe, resume, overwrite, allow_change)
        on_main_process(accelerator, lambda: trackers.start(accelerator, run, recipe, resume))
        request = stack.enter_context(StopRequest())
        start = load_checkpoint(checkpoint, accelerator, parts) if checkpoint else 0
        if resume:
            on_main_process(accelerator, lambda: run.save_recipe(recipe))
        if accelerator.is_main_process:
            say(run_header(recipe, run, parts, accelerator, train_step.passes, start))
        data = WithTokens(parts.data, parts.caches) if parts.caches else parts.data
        incoming = batches(data, recipe, accelerator, start)
        guard = StepGuard(accelerator, optimizer.optimizer)
        writer = stack.enter_context(CheckpointWriter(run))
        log = stack.enter_context(MetricLog(run, accelerator, settings, start, trackers))
        stack.callback(incoming.close)

        def note(losses: PassLosses) -> None:
            log.add(losses)
            guard.add(losses.loss)

        for step, batch in zip(range(start, settings.steps), log.waiting(incoming)):
            norm = train_step.gradients(batch, step, note)
            guard.judge(step + 1, norm, request.received)
            rate = set_learning_rate(optimizer, learning_rate(step))
            train_step.update(step)

            verdict = guard.verdict()
            log.step(step + 1, norm, rate, settings.batch_size, verdict.skipped)
            if verdict.in_a_row >= settings.max_skipped:
                stop_not_finite(accelerator, run, writer, verdict, recipe, len(data))
            with log.paused():
                save_due(step + 1, verdict.stop, run, writer, accelerator, parts, recipe, evaluator, trackers)
            if verdict.stop and step + 1 < settings.steps:
                on_main_process(accelerator, writer.finish)
                raise Preempted(f"{run.path} was told to stop, and has saved step {step + 1}")
        on_main_process(accelerator, writer.finish)
    accelerator.wait_for_everyone()
    return run


def start_accelerator(settings: TrainSection) -> Accelerator:
    """The processes, devices and precision of a run; a UserError for what is not to be had here."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != settings.precision:
        AcceleratorState._reset_state()  # one for the whole process, made by a run before this one
    # The main process may fill a feature cache or judge samples while the others wait, longer than NCCL's ten minutes.
    accelerator = start_processes(patience=timedelta(hours=3), mixed_precision=settings.precision)
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("train.precision fp16 needs a GPU; take bf16, or no for float32")
    if settings.precision == "fp16" and wants_sharding(settings.sharding, accelerator):
        raise UserError("train.precision fp16 does not go with sharding; take bf16, or no for float32")
    atexit.unregister(accelerator.state.destroy_process_group)
    atexit.register(accelerator.state.destroy_process_group)  # not at the run's end: another may follow
    return accelerator


def open_run(
    stack: ExitStack, accelerator: Accelerator, run: RunFolder, recipe: Recipe, resume: bool, overwrite: bool,
    allow_change: bool,
) -> Path | None:  # fmt: skip
    """Lock the folder until `stack` ends, and make it ready; the checkpoint to go on from."""

    def prepare() -> Path | None:
        run.claim()
        stack.enter_context(locked(run.path))
        if resume:
            return run.resume(recipe, allow_change)
        run.create(recipe, overwrite)
        return None

    return on_main_process(accelerator, prepare)


def on_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Do `action` in the main process while the others wait, and return its result in all of them; a UserError there is
    raised in all of them.
    """
    result, failure = None, None
    if accelerator.is_main_process:
        try:
            result = action()
        except (UserError, OSError) as error:
            failure = error
    if accelerator.num_processes > 1:
        result, failure = broadcast_object_list([result, failure])
    if failure is not None:
        raise failure
    return result


def save_due(
    step: int, stop: bool, run: RunFolder, writer: CheckpointWriter, accelerator: Accelerator, parts: Parts,
    recipe: Recipe, evaluator: Evaluator, trackers: Trackers,
) -> None:  # fmt: skip
    """After `step` steps: scores, a checkpoint, snapshots of the averages, a grid of samples. Written by the main
    process; a step that scores best has a checkpoint too."""
    settings = recipe.train
    best = evaluator(step) if evaluator.due(step) and not stop else None
    checkpoint = stop or bool(best) or due(step, settings.checkpoint_every, settings.steps)
    snapshot = bool(settings.power_ema) and due(step, settings.snapshot_every, settings.steps)
    if checkpoint or snapshot:
        state = copy_state(step, accelerator, parts)

        def write() -> None:
            assert state is not None  # in the main process, which writes
            if snapshot:
                write_snapshots(run, state, parts.averages)
            if checkpoint:
                write_checkpoint(run.checkpoint_path(step), state, recipe)
                if best:
                    run.mark_best(best)
                run.drop_old_checkpoints(settings.keep_checkpoints, settings.keep_every)

        if accelerator.is_main_process:
            writer.start(step, write)
    takes_part = accelerator.is_main_process or parts.sharded
    if takes_part and settings.sample_every and due(step, settings.sample_every, settings.steps):
        save_progress_grid(run, step, parts, recipe, accelerator.is_main_process)
        trackers.log_picture("samples", run.samples / f"step_{step:08d}.png", step)


def stop_not_finite(
    accelerator: Accelerator, run: RunFolder, writer: CheckpointWriter, verdict: Verdict, recipe: Recipe, count: int
) -> None:
    """End a run whose steps change nothing any more, with the indices of what it saw. What cannot be written is said
    beside the cause, not in its place.
    """
    settings, file = recipe.train, run.path / "not_finite.json"

    def dump() -> list[str]:
        first = verdict.step - verdict.in_a_row
        order = data_order(settings.seed, count, settings.batch_size, first)
        skipped = [{"step": first + 1 + i, "indices": next(order)} for i in range(verdict.in_a_row)]
        try:
            write_whole(file, json.dumps(skipped) + "\n")
            said = [f"the indices of their samples are in {file}"]
        except OSError as error:
            said = [f"the indices of their samples could not be written ({first_line(error)})"]
        try:
            writer.finish()
        except UserError as error:
            return [*said, str(error)]
        newest = max(run.list_checkpoints(), default=None)
        return [*said, f"{newest.name} is the last checkpoint" if newest else "there is no checkpoint yet"]

    said = on_main_process(accelerator, dump)
    raise UserError(
        f"the loss or gradient was not finite in the {verdict.in_a_row} steps up to {verdict.step}, so the run stops; "
        + "; ".join(said)
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Let the optimizer's next step have the learning rate `rate`, which is returned."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)


def save_progress_grid(run: RunFolder, step: int, parts: Parts, recipe: Recipe, write: bool = True) -> None:
    """A grid of samples of the averaged weights: a few of each of the first ten classes, the same noise every time.

    While the average is far behind, those of the weights as they are now stand beside them.
    """
    from dic_repa.files.pictures import draw_grid, save_picture, save_side_by_side
    from dic_repa.sampling.labels import balanced_labels

    sampler = parts.sampler
    assert sampler is not None  # there is one wherever train.sample_every is set
    shown = max(1, min(10, parts.condition.count))
    each = 6 if shown > 1 else 30
    labels = balanced_labels(recipe, parts.condition, shown * each)
    if recipe.train.label_dropout < 1:
        labels = labels % shown
    images = {"averaged weights": torch.cat(list(sampler(labels)))}
    if parts.ema.lag(step) > FAR_BEHIND * step:
        with parts.ema.raw(parts.denoiser):
            images["raw weights"] = torch.cat(list(sampler(labels)))
    if not write:
        return
    grids = {title: draw_grid(half, labels, parts.condition.names, columns=10) for title, half in images.items()}
    file = run.samples / f"step_{step:08d}.png"
    try:
        save_side_by_side(grids, file) if len(grids) > 1 else save_picture(grids["averaged weights"], file)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", error)
        tqdm.write(f"warning: the grid of step {step} cannot be written ({reason})", file=sys.stderr)
