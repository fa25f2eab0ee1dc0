"""The training loop: corrupt the data, run the denoiser, add the losses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dic_repa.alignment.cache import WithTokens
from dic_repa.errors import UserError, first_line
from dic_repa.recipe import Recipe, TrainSection
from dic_repa.training.checkpoint import load_checkpoint, save_checkpoint
from dic_repa.training.inputs import batches, check_batch, step_inputs
from dic_repa.training.metrics import MetricLog
from dic_repa.training.parts import Parts, build_parts, check_ending
from dic_repa.training.run_folder import RunFolder


def train(recipe: Recipe, path: str | Path, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Train what `recipe` says into the run folder `path`, and return it.

    The folder must be new, unless `resume` goes on from its newest checkpoint or `overwrite` removes it. Runs in as
    many processes as it was launched in (`accelerate launch`, `torchrun`), with the same result.
    """
    settings, run = recipe.train, RunFolder(path)
    try:
        accelerator = Accelerator(mixed_precision=settings.precision)
    except ValueError as error:  # its state is one for the whole process
        raise UserError(f"train.precision {settings.precision}: {first_line(error)}") from None
    if settings.precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("train.precision fp16 needs a GPU; take bf16, or no for float32")
    passes = check_batch(settings, accelerator.num_processes)
    parts = build_parts(recipe, accelerator)
    model, optimizer, ema = parts.model, parts.optimizer, parts.ema
    check_ending(recipe, parts.objective)
    on_main_process(accelerator, lambda: run.resume(recipe) if resume else run.create(recipe, overwrite))
    checkpoint = run.newest_checkpoint()
    start = load_checkpoint(checkpoint, accelerator, model, ema, optimizer) if checkpoint else 0

    data = WithTokens(parts.data, parts.caches) if parts.caches else parts.data
    incoming = batches(data, recipe, accelerator, start)
    with MetricLog(run, accelerator, settings, start) as log:
        for step, batch in zip(range(start, settings.steps), log.waiting(incoming)):
            scales = [alignment.schedule(step) for alignment in parts.alignments]
            for k, inputs in enumerate(step_inputs(parts, batch, settings, step, accelerator, passes, scales)):
                with nullcontext() if k == passes - 1 else accelerator.no_sync(model):
                    noisy = parts.objective.corrupt(inputs.x, inputs.t, inputs.noise)
                    out = model(noisy.x_t, noisy.t, inputs.y, noisy.unit_time)
                    denoising = parts.objective.loss(out.prediction, noisy)
                    aligned = [
                        alignment.loss(projection, tokens, noisy.unit_time, scale)
                        for alignment, projection, tokens, scale in zip(
                            parts.alignments, out.projections, inputs.tokens, scales
                        )
                    ]
                    loss = denoising + sum(aligned_loss for aligned_loss, _ in aligned)
                    accelerator.backward(loss / passes)
                for alignment, (_, terms) in zip(parts.alignments, aligned):
                    alignment.observe(terms, accelerator.reduce)
                log.add(loss, denoising, [terms for _, terms in aligned], share=1 / passes)

            norm = accelerator.clip_grad_norm_(model.parameters(), settings.gradient_clip or float("inf"))
            learning_rate = set_learning_rate(optimizer, settings, step)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(parts.denoiser)
            log.step(step + 1, norm, learning_rate, images=settings.batch_size)

            if accelerator.is_main_process:
                with log.paused():
                    if due(step + 1, settings.checkpoint_every, settings.steps):
                        folder = run.checkpoint_path(step + 1)
                        save_checkpoint(folder, step + 1, accelerator, model, ema, optimizer, recipe)
                        run.drop_old_checkpoints(settings.keep_checkpoints)
                    if settings.sample_every and due(step + 1, settings.sample_every, settings.steps):
                        save_progress_grid(run, step + 1, parts, recipe)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run


def on_main_process(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Do `action` in the main process while the others wait; a UserError there is raised in all of them."""
    failure = [None]
    if accelerator.is_main_process:
        try:
            action()
        except UserError as error:
            failure = [str(error)]
    if accelerator.num_processes > 1:
        broadcast_object_list(failure)
    if failure[0] is not None:
        raise UserError(failure[0])


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: TrainSection, step: int) -> float:
    """Constant, after a linear rise over `warmup_steps`."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def save_progress_grid(run: RunFolder, step: int, parts: Parts, recipe: Recipe) -> None:
    """A grid of samples of the averaged weights: a few of each of the first ten classes, the same noise every time."""
    from dic_repa.generation import balanced_labels, save_grid

    shown, columns = min(10, parts.data.num_classes), 6
    labels = balanced_labels(recipe, parts.data.num_classes, shown * columns)
    if recipe.train.label_dropout < 1:
        labels = labels % shown
    images = torch.cat(list(parts.sampler(labels)))
    save_grid(images, run.samples / f"step_{step:08d}.png", labels, parts.data.class_names, columns=10)
