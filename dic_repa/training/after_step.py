"""What is due after a training step, and what ends a run before its last one."""

import contextlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_whole
from dic_repa.files.pictures import draw_grid, save_picture, save_side_by_side
from dic_repa.recipe import Recipe
from dic_repa.runs.folder import RunFolder
from dic_repa.runtime.processes import Votes, on_main_process
from dic_repa.runtime.progress import warn
from dic_repa.runtime.watchdog import watched
from dic_repa.sampling.labels import balanced_labels
from dic_repa.training.checkpoint import CheckpointWriter, copy_state, write_checkpoint, write_snapshots
from dic_repa.training.evaluator import Evaluator
from dic_repa.training.inputs import order_of
from dic_repa.training.log import MetricLog
from dic_repa.training.parts import Parts
from dic_repa.training.preemption import Preempted
from dic_repa.training.shard_writer import Shards, ShardWriter
from dic_repa.training.step import StepGuard, Verdict
from dic_repa.training.trackers import Trackers

GRACE = 20.0  # seconds that a process whose loader is stalled has to tell the others
FAR_BEHIND = 0.1  # share of the steps so far; an average is so far behind during its warm-up


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
    log: MetricLog
    guard: StepGuard
    votes: Votes
    signals: list[int]
    step: int  # that has been done
    saved: int = -1  # the step of the newest checkpoint of this session

    def __post_init__(self) -> None:
        self.begun = self.step
        self.evaluator.stopping = lambda: self.votes.any(bool(self.signals))

    def __call__(self, step: int) -> None:
        """After `step` steps. A checkpoint is due for the best score so far, too."""
        self.step, settings = step, self.recipe.train
        judged = self.evaluator.every and self.due(self.evaluator.every)
        best = self.evaluator(step) if judged else None
        if best or self.due(settings.checkpoint_every):
            self.save(best)
        elif settings.power_ema and self.due(settings.snapshot_every):
            self.save(best, checkpoint=False)
        if settings.sample_every and self.due(settings.sample_every):
            self.save_grid()

    def due(self, every: int | None) -> bool:
        return self.step == self.recipe.train.steps or (every is not None and self.step % every == 0)

    def make_up(self) -> None:
        """Score and draw what the interruption at this step has cut off."""
        grid, settings = self.run.grid_file(self.step), self.recipe.train
        judged = self.step and self.evaluator.every and self.due(self.evaluator.every)
        if judged and on_main_process(self.accelerator, lambda: self.evaluator.is_missing(self.step)):
            best = self.evaluator(self.step)
            on_main_process(self.accelerator, lambda: self.run.mark_best(best) if best else None)
        drawn = self.step and settings.sample_every and self.due(settings.sample_every)
        if drawn and on_main_process(self.accelerator, lambda: not grid.is_file()):
            self.save_grid()

    def next_batch(self, incoming: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The next batch, once all processes have one; where one has none, all save what they have done, and stop."""
        batch: dict[str, Tensor] = {}
        fault: BaseException | None = None
        try:
            batch = next(incoming)
        except (Preempted, UserError, OSError) as error:
            fault = error
        longest = self.recipe.timeouts.data
        what = f"the other processes to have their batches of step {self.step + 1}"
        with watched("data", what, longest and longest + GRACE):
            fault = self.votes.first(fault)
        if fault:
            self.stop(fault)
        return batch

    def stop(self, fault: BaseException) -> None:
        """Save this step, unless there is nothing new, and raise `fault`; Preempted tells why and what is saved."""
        if new := self.saved < self.step and self.step > self.begun:
            self.save(None)
        if not isinstance(fault, Preempted):
            with contextlib.suppress(UserError):  # a warning has said it
                self.finish()
            raise fault
        self.finish()
        saved = f"has saved step {self.step}" if new or self.step else "has done no step yet"
        did = f"stops, since {fault}, and" if str(fault) else "was stopped by a signal, and"
        raise Preempted(f"{self.run.path} {did} {saved}")

    def save(self, best: dict | None, checkpoint: bool = True) -> None:
        """Copy the state, and write it while the training goes on, with snapshots that are due.

        The main process writes; if the model is sharded, all write together.
        """
        run, settings, step = self.run, self.recipe.train, self.step
        averages, together = self.parts.averages, self.writer.shards
        snapshot = bool(settings.power_ema) and self.due(settings.snapshot_every)
        with self.writing():
            log = {"log": self.log.state(), "skipped": self.guard.state(), "noise": self.log.noise.state()}
            state = copy_state(step, self.accelerator, self.parts)
        if checkpoint:
            self.saved = step
        if state is None:
            return
        state.log = log

        def write(shards: Shards | None = None) -> None:
            if snapshot:
                write_snapshots(run, state, averages, shards)
            if checkpoint:
                write_checkpoint(run.checkpoint_path(step), state, self.recipe, shards)
                if best:
                    run.mark_best(best)
                run.drop_old_checkpoints(settings.keep_checkpoints, settings.keep_every)

        def write_together(writer: ShardWriter) -> None:
            with writer.write(f"step_{step}", state.sets(averages, checkpoint)) as shards:
                if self.accelerator.is_main_process:
                    write(shards)

        with self.writing():
            self.writer.start(step, partial(write_together, together) if together else write)

    def finish(self) -> None:
        """Wait until all is written; a UserError where the last checkpoint could not be."""
        with self.writing():
            on_main_process(self.accelerator, self.writer.finish)

    def writing(self) -> AbstractContextManager[None]:
        what = f"the checkpoint of step {self.step}, or the one before it"
        return watched("checkpoint", what, self.recipe.timeouts.checkpoint)

    def save_grid(self) -> None:
        """Save samples of the averaged weights: a few of each of the first ten classes, with the same noise every time.

        While the average is far behind, samples of the weights themselves are shown beside them. A signal ends it; the
        resumed run makes up for it. All processes must call it.
        """
        parts, main = self.parts, self.accelerator.is_main_process
        shown = max(1, min(10, parts.condition.count))
        each = 6 if shown > 1 else 30
        labels = balanced_labels(self.recipe, parts.condition, shown * each)
        if self.recipe.train.label_dropout < 1:
            labels = labels % shown
        images: dict[str, Tensor | None] = {}
        if main or parts.sharded:
            images["averaged weights"] = self.draw(labels)
            if parts.ema.lag(self.step) > FAR_BEHIND * self.step:
                with parts.ema.raw(parts.denoiser):
                    images["raw weights"] = self.draw(labels)
        halves = {title: half for title, half in images.items() if half is not None}
        if self.votes.any(len(halves) < len(images)) or not main:
            return
        grids = {title: draw_grid(half, labels, parts.condition.names, columns=10) for title, half in halves.items()}
        file = self.run.grid_file(self.step)
        try:
            save_side_by_side(grids, file) if len(grids) > 1 else save_picture(grids["averaged weights"], file)
        except (OSError, UserError) as error:
            warn(f"{file} cannot be written ({getattr(error, 'strerror', error)})")
        self.trackers.log_picture("samples", file, self.step)

    def draw(self, labels: Tensor) -> Tensor | None:
        """Samples of `labels`; None if a signal has come meanwhile."""
        assert self.parts.sampler is not None  # there is one wherever train.sample_every is set
        drawn = []
        for batch in self.parts.sampler(labels):
            drawn.append(batch)
            if self.votes.any(bool(self.signals)) if self.parts.sharded else self.signals:
                return None
        return torch.cat(drawn)

    def stop_not_finite(self, verdict: Verdict) -> None:
        """End a run whose steps change nothing any more, and write the indices of their samples.

        If these cannot be written, the error says that too.
        """
        settings, file = self.recipe.train, self.run.path / "not_finite.json"

        def dump() -> list[str]:
            first = verdict.step - verdict.in_a_row
            order = order_of(self.parts.data, settings, first)
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
