"""One training step: what the loop, the dry run and `bench train` have in common.

step = TrainingStep(parts, recipe.train, accelerator)
norm = step.gradients(batch, number)    # draw, run the objective, add the alignments' losses, go backward
step.update(number)                     # the optimizer and the averages
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from dic_repa.recipe import TrainSection
from dic_repa.training.inputs import check_batch, step_inputs
from dic_repa.training.parts import Parts
from dic_repa.training.sharding import whole


@dataclass
class PassLosses:
    """The losses of one pass; `share` is the part of the step that it is."""

    loss: Tensor  # the sum that is trained for
    denoising: Tensor  # the objective's part of it
    terms: list[dict[str, Tensor]]  # of each alignment, by name
    share: float


class TrainingStep:
    """A step in one process of several: its share of the global batch, in one or several passes.

    Args:
        parts: the model with its heads, objective, encoders, optimizer and averages.
        settings: of the recipe's `train` section, the sizes of batch and pass among them.
        accelerator: the processes and the precision.

    Raises:
        UserError: where the batch does not divide among processes and passes.
    """

    def __init__(self, parts: Parts, settings: TrainSection, accelerator: Accelerator):
        self.parts, self.settings, self.accelerator = parts, settings, accelerator
        self.passes = check_batch(settings, accelerator.num_processes)

    def gradients(
        self,
        batch: dict[str, Tensor],
        step: int,
        note: Callable[[PassLosses], None] = lambda losses: None,
        clock: Callable[[str], None] = lambda phase: None,
    ) -> Tensor:
        """Leave the gradients of step number `step` (from 0) with the parameters, clipped.

        Args:
            batch: this process's rows of the global batch, as the data set gives them.
            note: called with the losses of each pass.
            clock: called with a phase's name at its end.

        Returns:
            The norm of the gradient before clipping, a scalar.
        """
        parts, accelerator = self.parts, self.accelerator
        scales = [alignment.schedule(step) for alignment in parts.alignments]
        inputs = step_inputs(parts, batch, self.settings, step, accelerator, self.passes, scales)
        for k, (example, tokens) in enumerate(inputs):
            with nullcontext() if k == self.passes - 1 else accelerator.no_sync(parts.model):
                clock("encoder")
                out = parts.objective(parts.model, example)
                denoising = out.loss.mean()
                clock("forward")
                tokens.join()
                aligned = [
                    alignment.loss(projection, target, out.time, scale)
                    for alignment, projection, target, scale in zip(
                        parts.alignments, out.projections, tokens, scales, strict=True
                    )
                ]
                loss = denoising + sum(part for part, _ in aligned)
                clock("alignment")
                accelerator.backward(loss / self.passes)
                clock("backward")
            terms = [terms for _, terms in aligned]
            for alignment, own in zip(parts.alignments, terms):
                alignment.observe(own, accelerator.reduce)
            note(PassLosses(loss.detach(), denoising.detach(), terms, 1 / self.passes))
        return whole(accelerator.clip_grad_norm_(parts.model.parameters(), self.settings.gradient_clip or float("inf")))

    def update(self, step: int, clock: Callable[[str], None] = lambda phase: None) -> None:
        """Change the weights by the gradients, and the averages by the weights."""
        self.parts.optimizer.step()
        self.parts.optimizer.zero_grad()
        clock("optimizer")
        for average in self.parts.averages.values():
            average.update(self.parts.denoiser, step + 1)
        clock("ema")

    def __call__(
        self, batch: dict[str, Tensor], step: int, clock: Callable[[str], None] = lambda phase: None
    ) -> Tensor:
        """A whole step; the loss of its last pass."""
        losses: list[PassLosses] = []
        self.gradients(batch, step, losses.append, clock)
        self.update(step, clock)
        return losses[-1].loss
