"""`evaluate.every`: samples are scored in training, and the best checkpoint is kept.

The training's randomness is untouched: a sample's noise belongs to (sample.seed, its index), so a run with evaluations
ends with the same weights as one without.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.evaluation.judge import judge_of, notes_on_scores
from dic_repa.evaluation.metrics import title
from dic_repa.evaluation.runs import Judgement
from dic_repa.recipe import EvaluateSection, Recipe
from dic_repa.runs.checkpoints import RAW
from dic_repa.runs.folder import RunFolder
from dic_repa.runtime.processes import on_main_process
from dic_repa.runtime.progress import say, warn
from dic_repa.sampling.labels import draw_labels
from dic_repa.training.parts import Parts
from dic_repa.training.trackers import Trackers


class Evaluator:
    """`evaluator(step)` samples, scores and records; in every process it returns whether this step is the best so far.

    The records are those of `dic-repa evaluate`, in RUN/evaluation. Processes share the sampling; the main one judges.
    `stopping` is asked in all of them after each batch; then nothing is scored.
    """

    stopping: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, recipe: Recipe, run: RunFolder, parts: Parts, accelerator: Accelerator, trackers: Trackers):
        self.recipe, self.run, self.parts, self.accelerator = recipe, run, parts, accelerator
        self.trackers, section = trackers, recipe.evaluate
        self.every = section.every if section else 0
        self.best: dict | None = None  # kept here too: the newest best may not be on the disk yet
        if section and self.every:
            guidance = parts.sampler.settings.guidance if parts.sampler else None
            changed = {"num": section.num or recipe.sample.num, "guidance": guidance}
            self.sample = recipe.sample.model_copy(update=changed)
            on_main_process(accelerator, lambda: self._prepare(section))

    def _prepare(self, section: EvaluateSection) -> None:
        """Load judges and reference; a UserError where something is missing or misspelt."""
        self.judge = judge_of(self.recipe, self.accelerator.device)
        if self.judge.measure and self.parts.sampler:
            self.judge.measure.check_size(self.parts.sampler.size())
        for note in notes_on_scores(self.judge.better, self.recipe):
            say(f"note: {note}")
        wanted = section.best or self.judge.main
        self.score = self.judge.check(wanted) if wanted else None

    def __call__(self, step: int) -> dict | None:
        """The record of the best checkpoint, for `RunFolder.mark_best`, if this step is it; else None."""
        labels = draw_labels(self.recipe, self.parts.condition, self.sample)
        with self.parts.ema.raw(self.parts.denoiser) if self.sample.weights == RAW else nullcontext():
            levels = self._sample(labels)
        if levels is None:
            return None
        return on_main_process(self.accelerator, lambda: self._judge(step, levels.float() / 255, labels))

    def is_missing(self, step: int) -> bool:
        """Whether there is no record of that step's scores."""
        return not Judgement(self.run.path, step, self.recipe, self.sample).record.is_file()

    def _sample(self, labels: Tensor) -> Tensor | None:
        """The images of all labels as a PNG would keep them, uint8, in every process; None if it is to stop."""
        sampler, processes = self.parts.sampler, self.accelerator.num_processes
        assert sampler is not None  # there is one wherever evaluate.every is set
        if processes == 1 or self.parts.sharded:  # sharded weights can be run by all processes together alone
            return self._levels(sampler(labels))
        share = -(-len(labels) // processes)  # rounded up: as many in each process, for they are gathered
        mine = [(i * processes + self.accelerator.process_index) % len(labels) for i in range(share)]
        levels = self._levels(sampler(labels[mine], mine))
        if levels is None:
            return None
        gathered = self.accelerator.gather(levels.to(self.accelerator.device)).cpu()
        in_order = gathered.unflatten(0, (processes, share)).transpose(0, 1).flatten(0, 1)
        return in_order[: len(labels)]

    def _levels(self, batches: Iterable[Tensor]) -> Tensor | None:
        levels = []
        for batch in batches:
            levels.append((batch * 255).round().byte())
            if self.stopping():
                return None
        return torch.cat(levels)

    def _judge(self, step: int, images: Tensor, labels: Tensor) -> dict | None:
        judged = Judgement(self.run.path, step, self.recipe, self.sample)
        try:
            judged.scores = self.judge(images, labels)
            judged.evaluations = self.parts.sampler.evaluations if self.parts.sampler else 0
        except UserError as error:  # such as images of a single colour; a later step may be better
            warn(f"the samples of step {step} cannot be scored ({error})")
            return None
        shown = {name: judged.scores.get(name) for name in self.judge.better}
        numbers = {name: value for name, value in shown.items() if isinstance(value, int | float)}
        self.trackers.log({f"evaluate/{name}": value for name, value in numbers.items()}, step, "evaluate")
        best = None
        if self.score in numbers:
            before = self.best or self.run.best() or {}
            other = before.get("value") if before.get("score") == self.score else None
            if self.judge.is_better(self.score, numbers[self.score], other):
                self.best = best = {"step": step, "score": self.score, "value": numbers[self.score]}
        words = ", ".join(f"{title(name)} {value:.4g}" for name, value in numbers.items())
        say(f"step {step}: {words}{', the best so far' if best else ''}")
        try:
            judged.save(images, labels, self.parts.condition.names)
        except (OSError, UserError) as error:
            warn(f"{judged.record} cannot be written ({getattr(error, 'strerror', error)})")
        return best
