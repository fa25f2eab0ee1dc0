"""The training loop: corrupt the data, run the denoiser, add the losses."""

import atexit
import json
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dic_repa.alignment.cache import WithTokens
from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_whole
from dic_repa.files.lock import locked
from dic_repa.files.pictures import draw_grid, save_picture, save_side_by_side
from dic_repa.recipe import Recipe, TrainSection
from dic_repa.recipe.folders import note_current_folder
from dic_repa.runs.folder import RunFolder
from dic_repa.runtime.precision import tf32
from dic_repa.runtime.processes import on_main_process, start_processes
from dic_repa.runtime.progress import say, warn
from dic_repa.sampling.labels import balanced_labels
from dic_repa.training.checkpoint import (
    CheckpointWriter,
    copy_state,
    load_checkpoint,
    write_checkpoint,
    write_snapshots,
)
from dic_repa.training.evaluator import Evaluator
from dic_repa.training.inputs import batches, check_batch, data_order
from dic_repa.training.log import MetricLog, run_header
from dic_repa.training.parts import Parts, build_parts, check_sampling_and_evaluation
from dic_repa.training.preemption import Preempted, stop_request
from dic_repa.training.schedules import LearningRate
from dic_repa.training.sharding import wants_sharding
from dic_repa.training.step import StepGuard, TrainingStep, Verdict
from dic_repa.training.trackers import Trackers, check_trackers

FAR_BEHIND = 0.1  # share of the steps so far; an average is so far behind during its warm-up


def train(
    recipe: Recipe, path: str | Path, resume: bool = False, overwrite: bool = False, allow_change: bool = False,
    trackers: Trackers | None = None,
) -> RunFolder:  # fmt: skip
    """Train what `recipe` says into the run folder `path`, and return it.

    Args:
        path: a new folder, unless one of the next two is set.
        resume: go on from the newest whole checkpoint (with `allow_change`, also with a recipe that changes the run).
        overwrite: remove the run at `path` first, and no other file.
        trackers: stay open for what is logged after the training.

    Raises:
        Preempted: when SIGTERM or SIGUSR1 has ended the run, with its state saved.
        UserError: when the run cannot begin, or stops because losses or gradients are not finite.
    """
    recipe = note_current_folder(recipe)
    settings, run = recipe.train, RunFolder(path)
    for line in run.check_resume(recipe, allow_change) if resume else ():
        say(f"note: changed since the run began: {line}")
    with ExitStack() as stack:
        stack.enter_context(tf32(settings.tf32))
        trackers = trackers or stack.enter_context(Trackers())
        check_trackers(settings.trackers)
        accelerator = start_accelerator(settings)
        if not resume:  # before `claim` marks the folder as a run's
            on_main_process(accelerator, lambda: run.check_new(overwrite))
        check_batch(settings, accelerator.num_processes)
        parts = build_parts(recipe, accelerator)
        train_step, learning_rate = TrainingStep(parts, settings, accelerator), LearningRate(recipe)
        check_sampling_and_evaluation(recipe, parts.objective)
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
        incoming = batches(data, recipe, accelerator, start)
        guard = StepGuard(accelerator, parts.optimizer.optimizer)
        writer = stack.enter_context(CheckpointWriter(run))
        after = AfterStep(recipe, run, parts, accelerator, evaluator, writer, trackers)
        log = stack.enter_context(MetricLog(run, accelerator, settings, start, trackers))
        stack.callback(incoming.close)

        for step, batch in zip(range(start, settings.steps), log.waiting(incoming)):
            norm, losses = train_step.gradients(batch, step)
            guard.judge(step + 1, losses, norm, bool(signals))
            rate = learning_rate.apply(parts.optimizer, step)
            train_step.update(step)
            verdict = guard.verdict()
            log.step(step + 1, losses, norm, rate, verdict.skipped)
            if verdict.in_a_row >= settings.max_skipped:
                after.stop_not_finite(verdict)
            with log.paused():
                after(step + 1, verdict.stop)
            if verdict.stop and step + 1 < settings.steps:
                on_main_process(accelerator, writer.finish)
                raise Preempted(f"{run.path} was stopped by a signal, and has saved step {step + 1}")
        on_main_process(accelerator, writer.finish)
    accelerator.wait_for_everyone()
    return run


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


@dataclass
class AfterStep:
    """Writes what is due after a step: scores, a checkpoint, snapshots of the averages, a grid of samples."""

    recipe: Recipe
    run: RunFolder
    parts: Parts
    accelerator: Accelerator
    evaluator: Evaluator
    writer: CheckpointWriter
    trackers: Trackers

    def __call__(self, step: int, stop: bool) -> None:
        """After `step` steps. A checkpoint is due with `stop`, and for the best score so far."""
        settings = self.recipe.train
        judged = self.evaluator.every and self.due(step, self.evaluator.every)
        best = self.evaluator(step) if judged and not stop else None
        checkpoint = stop or bool(best) or self.due(step, settings.checkpoint_every)
        snapshot = bool(settings.power_ema) and self.due(step, settings.snapshot_every)
        if checkpoint or snapshot:
            self.save(step, checkpoint, snapshot, best)
        takes_part = self.accelerator.is_main_process or self.parts.sharded
        if takes_part and settings.sample_every and self.due(step, settings.sample_every):
            self.save_grid(step)

    def due(self, step: int, every: int | None) -> bool:
        return step == self.recipe.train.steps or (every is not None and step % every == 0)

    def save(self, step: int, checkpoint: bool, snapshot: bool, best: dict | None) -> None:
        """Copy the state, and let the main process write it while the training goes on."""
        run, settings, state = self.run, self.recipe.train, copy_state(step, self.accelerator, self.parts)

        def write() -> None:
            assert state is not None  # in the main process, which writes
            if snapshot:
                write_snapshots(run, state, self.parts.averages)
            if checkpoint:
                write_checkpoint(run.checkpoint_path(step), state, self.recipe)
                if best:
                    run.mark_best(best)
                run.drop_old_checkpoints(settings.keep_checkpoints, settings.keep_every)

        if self.accelerator.is_main_process:
            self.writer.start(step, write)

    def save_grid(self, step: int) -> None:
        """Save samples of the averaged weights: a few of each of the first ten classes, with the same noise every time.

        While the average is far behind, samples of the weights themselves are shown beside them.
        """
        parts = self.parts
        assert parts.sampler is not None  # there is one wherever train.sample_every is set
        shown = max(1, min(10, parts.condition.count))
        each = 6 if shown > 1 else 30
        labels = balanced_labels(self.recipe, parts.condition, shown * each)
        if self.recipe.train.label_dropout < 1:
            labels = labels % shown
        images = {"averaged weights": torch.cat(list(parts.sampler(labels)))}
        if parts.ema.lag(step) > FAR_BEHIND * step:
            with parts.ema.raw(parts.denoiser):
                images["raw weights"] = torch.cat(list(parts.sampler(labels)))
        if not self.accelerator.is_main_process:
            return
        grids = {title: draw_grid(half, labels, parts.condition.names, columns=10) for title, half in images.items()}
        file = self.run.samples / f"step_{step:08d}.png"
        try:
            save_side_by_side(grids, file) if len(grids) > 1 else save_picture(grids["averaged weights"], file)
        except (OSError, UserError) as error:
            warn(f"the grid of step {step} cannot be written ({getattr(error, 'strerror', error)})")
        self.trackers.log_picture("samples", file, step)

    def stop_not_finite(self, verdict: Verdict) -> None:
        """End a run whose steps change nothing any more, and write the indices of their samples.

        If these cannot be written, the error says that too.
        """
        settings, file = self.recipe.train, self.run.path / "not_finite.json"

        def dump() -> list[str]:
            first = verdict.step - verdict.in_a_row
            order = data_order(settings.seed, len(self.parts.data), settings.batch_size, first)
            skipped = [{"step": first + 1 + i, "indices": next(order)} for i in range(verdict.in_a_row)]
            try:
                write_whole(file, json.dumps(skipped) + "\n")
                said = [f"the indices of their samples are in {file}"]
            except OSError as error:
                said = [f"the indices of their samples could not be written ({first_line(error)})"]
            try:
                self.writer.finish()
            except UserError as error:
                return [*said, str(error)]
            newest = max(self.run.list_checkpoints(), default=None)
            return [*said, f"{newest.name} is the last checkpoint" if newest else "there is no checkpoint yet"]

        said = on_main_process(self.accelerator, dump)
        raise UserError(
            f"the loss or gradient was not finite in the {verdict.in_a_row} steps up to {verdict.step}, so the run "
            f"stops; {'; '.join(said)}"
        )
