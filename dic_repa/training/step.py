"""One training step: what the loop, the dry run and `bench train` have in common.

step = TrainingStep(parts, recipe.train, accelerator)
norm, losses = step.gradients(batch, number)  # draw, run the objective, add the alignments' losses, go backward
step.update(number)                           # the optimizer and the averages
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dic_repa.alignment import averaged_tokens
from dic_repa.data.latents import denoiser_data, global_noise
from dic_repa.files.pictures import unit_images
from dic_repa.objectives import Batch
from dic_repa.protocols import Teacher
from dic_repa.recipe import TrainSection
from dic_repa.training.inputs import check_batch, process_rows, step_generator
from dic_repa.training.optimizers import clip_gradients, skips_on_device
from dic_repa.training.parts import Parts

Clock = Callable[[str], None]  # is called with a phase's name at its end
LAG = 2  # steps after which a GPU has surely computed what `StepGuard` reads


def no_clock(phase: str) -> None:
    """Takes no time."""


class TrainingStep:
    """A step in one process of several: its share of the global batch, in one or several passes.

    A UserError where the batch does not divide among processes and passes.
    """

    def __init__(self, parts: Parts, settings: TrainSection, accelerator: Accelerator):
        self.parts, self.settings, self.accelerator = parts, settings, accelerator
        self.passes = check_batch(settings, accelerator.num_processes)

    def gradients(
        self, batch: dict[str, Tensor], step: int, clock: Clock = no_clock
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Leave the gradients of step number `step` (from 0) with the parameters, for `update`, which may clip them.

        Args:
            batch: this process's rows of the global batch, as the data set gives them.

        Returns:
            The norm of the gradient before clipping, a scalar, and the losses of each pass: "loss", the sum that is
            trained for, "denoising", the objective's part of it, its other losses and what it tells by their names,
            and each alignment's terms as "alignment.N.TERM".
        """
        parts, accelerator, losses = self.parts, self.accelerator, []
        scales = parts.aligner.scales(step)
        for k, (example, tokens) in enumerate(self.inputs(batch, step, scales)):
            with nullcontext() if k == self.passes - 1 else accelerator.no_sync(parts.model):
                clock("encoder")
                out = parts.objective(parts.model, example)
                denoising = out.loss.mean()
                clock("forward")
                join(tokens)
                aligned, terms = parts.aligner.compare(out.projections, tokens, out.time, scales)
                if parts.joint:
                    parts.joint.pull(aligned, example.x)
                others = {name: values.mean() for name, values in out.others.items()}
                loss = sum(others.values(), denoising + aligned)
                clock("alignment")
                accelerator.backward(loss / self.passes)
                clock("backward")
            losses.append({"loss": loss.detach(), "denoising": denoising.detach()} | terms)
            losses[-1] |= {name: value.detach() for name, value in others.items()}
            losses[-1] |= {name: values.detach().mean() for name, values in out.told.items()}
        norm = clip_gradients(parts.model, self.settings.gradient_clip, parts.optimizer, accelerator)
        if parts.joint:
            autoencoders, more = parts.joint.gradients(batch["image"])
            losses = [{**mine, **theirs} for mine, theirs in zip(losses, more)]
            norm = norm.where(autoencoders.isfinite(), autoencoders)  # a step that one of both cannot take is skipped
            clock("autoencoder")
        return norm, losses

    def inputs(
        self, batch: dict[str, Tensor], step: int, scales: list[float]
    ) -> Iterator[tuple[Batch, list[Tensor | None]]]:
        """What each pass takes, with each encoder's tokens (B, N, D), or None if its schedule's scale is 0.

        Random numbers are drawn for the global batch and then sliced: they are the same for any number of processes and
        passes.
        """
        parts, settings, accelerator = self.parts, self.settings, self.accelerator
        generator = step_generator(settings.seed, step, accelerator.device)
        draws = parts.objective.draw((settings.batch_size, *parts.shape), generator)
        uniform = torch.rand(settings.batch_size, generator=generator, device=accelerator.device)
        rows = process_rows(settings.batch_size, accelerator.process_index, accelerator.num_processes)
        y = parts.condition.drop(batch[parts.condition.key], uniform[rows] < settings.label_dropout)
        noise_like = global_noise(settings.batch_size, rows, generator)
        if parts.joint:
            x = parts.joint.encode(batch["image"], noise_like)
        else:
            x = denoiser_data(parts.data, batch, noise_like)
        whole = None
        if getattr(parts.objective, "whole_batch", False):  # the processes' rows, in the order of the global batch
            whole = Batch(accelerator.gather(x), accelerator.gather(y), draws)
        images = batch.get("image", x)  # latents without images have no encoder to show them to
        split = [tensor.chunk(self.passes) for tensor in (x, y, images)]
        drawn = {name: values[rows].chunk(self.passes) for name, values in draws.items()}
        cached = {name: batch[name].chunk(self.passes) for name in parts.caches}
        intervals = self.intervals(generator, rows)
        for k, (x, y, image) in enumerate(zip(*split)):
            x.requires_grad_(parts.joint is not None)
            example = Batch(x, y, {name: passes[k] for name, passes in drawn.items()}, parts.ema.model, whole)
            tokens: list[Tensor | None] = [None] * len(scales)
            for i, encoder in enumerate(parts.encoders):
                if not scales[i]:
                    continue
                if encoder is not None:
                    tokens[i] = encode(encoder, image, accelerator)
                elif f"tokens.{i}" in cached:
                    tokens[i] = cached[f"tokens.{i}"][k]
                elif i in intervals and (teacher := parts.aligner.alignments[i].teacher):
                    tokens[i] = self.by_averaged(teacher, example, intervals[i][k])
            yield example, tokens

    def intervals(self, generator: torch.Generator, rows: slice) -> dict[int, tuple[Tensor, ...]]:
        """For each alignment to the averaged weights, by how much less noise these see (B,), in passes."""
        intervals = {}
        for i, alignment in enumerate(self.parts.aligner.alignments):
            if alignment.teacher and alignment.by_averaged:
                uniform = torch.rand(self.settings.batch_size, generator=generator, device=generator.device)
                intervals[i] = alignment.teacher.earlier(uniform)[rows].chunk(self.passes)
        return intervals

    def by_averaged(self, teacher: Teacher, example: Batch, interval: Tensor) -> Tensor:
        """The targets (B, N, D) of a pass that the averaged weights give."""
        objective: Any = self.parts.objective
        noisy = objective.with_less_noise(example, interval)
        with self.accelerator.autocast():
            return averaged_tokens(self.parts.ema.model, teacher.tap, noisy.x_t, noisy.t, example.y)

    def update(self, step: int, clock: Clock = no_clock) -> None:
        """Change the weights by the gradients, and the averages by the weights."""
        self.parts.optimizer.step()
        self.parts.optimizer.zero_grad()
        if self.parts.joint:
            self.parts.joint.update(step + 1)
        clock("optimizer")
        for average in self.parts.averages.values():
            average.update(self.parts.denoiser, step + 1)
        clock("ema")

    def __call__(self, batch: dict[str, Tensor], step: int, clock: Clock = no_clock) -> Tensor:
        """A whole step; the loss of its last pass."""
        _, losses = self.gradients(batch, step, clock)
        self.update(step, clock)
        return losses[-1]["loss"]


def encode(encoder, images: Tensor, accelerator: Accelerator) -> Tensor:
    """The frozen encoder's tokens, in the run's mixed precision; on a GPU on a second stream, see `join`."""
    stream = side_stream(images.device)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(images.device))
        images.record_stream(stream)
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        with torch.inference_mode(), accelerator.autocast():
            tokens = encoder(unit_images(images))
        return tokens.clone()  # the loss keeps it for its backward pass, which takes no inference tensor


def join(tokens: list[Tensor | None]) -> None:
    """Wait for the tokens before they are used: on a GPU a second stream computes them."""
    for each in tokens:
        if each is not None and (stream := side_stream(each.device)):
            current = torch.cuda.current_stream(each.device)
            current.wait_stream(stream)
            each.record_stream(current)


@functools.lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A second stream of a GPU, always the same."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Verdict:
    """What was known at the end of step `step` (counted from 1): the same in every process."""

    step: int
    in_a_row: int = 0  # skipped steps up to and with this one
    skipped: int = 0  # skipped steps since the run began


class StepGuard:
    """After each step, all processes decide together whether it counts, without waiting.

    A step whose loss or gradient is not finite is skipped by the optimizer on the device, by the flag `found_inf` that
    gradient scalers use. For an optimizer that does not take it, the host waits for the device in each step, and drops
    the gradients. With fp16 the gradient scaler skips the step; here it is only counted. The `optimizers` are torch's
    own.
    """

    def __init__(self, accelerator: Accelerator, *optimizers: torch.optim.Optimizer):
        self.accelerator, self.optimizers = accelerator, optimizers
        device = accelerator.device
        self.counts = torch.zeros(2, device=device)  # in a row, in all
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self.last = Verdict(0)

    def judge(self, step: int, losses: list[dict[str, Tensor]], norm: Tensor) -> None:
        """Skip the optimizers' coming step if a loss of it, in any process, or `norm` is not finite."""
        bad = (~torch.stack([each["loss"] for each in losses]).isfinite().all()).float()
        if self.accelerator.num_processes > 1:
            bad = self.accelerator.reduce(bad, "sum")
        skip = ((bad > 0) | ~norm.isfinite()).float()
        for optimizer in self.optimizers if self.accelerator.scaler is None else ():
            if skips_on_device(optimizer):
                optimizer.found_inf = skip  # type: ignore[attr-defined]  # what torch's gradient scaler sets, too
            elif skip:
                optimizer.zero_grad(set_to_none=True)
        in_a_row, skipped = self.counts.unbind()
        self.counts = torch.stack([(in_a_row + 1) * skip, skipped + skip])
        known, event = self.counts, None
        if known.is_cuda:
            known, event = known.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.pending.append((step, known, event))

    def verdict(self) -> Verdict:
        """The newest verdict; on a GPU one that is at least `LAG` steps old, so that it need not be waited for."""
        while len(self.pending) > (LAG if self.accelerator.device.type == "cuda" else 0):
            step, known, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            in_a_row, skipped = known.tolist()
            self.last = Verdict(step, round(in_a_row), round(skipped))
        return self.last

    def state(self) -> list[float]:
        """What `restore` takes in a resumed run."""
        return self.counts.tolist()

    def restore(self, counts: list[float]) -> None:
        self.counts = torch.tensor(counts, device=self.counts.device).reshape(2)
