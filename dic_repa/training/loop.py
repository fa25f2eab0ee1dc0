"""The training loop: corrupt the data, run the denoiser, add the losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from dic_repa.alignment import AlignedDenoiser
from dic_repa.build import (
    build_alignment,
    build_dataset,
    build_denoiser,
    build_encoder,
    build_objective,
    import_plugins,
)
from dic_repa.errors import UserError
from dic_repa.recipe import Recipe, TrainSection
from dic_repa.training.checkpoint import load_checkpoint, save_checkpoint
from dic_repa.training.ema import EMA
from dic_repa.training.metrics import MetricLog
from dic_repa.training.randomness import data_order, process_rows, step_generator
from dic_repa.training.run_folder import RunFolder, describe_environment


def train(recipe: Recipe, path: str | Path, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Train what `recipe` says into the run folder `path`, and return it.

    The folder must be new, unless `resume` goes on from its newest checkpoint or `overwrite` removes it. Runs in as many
    processes as it was launched in (`accelerate launch`, `torchrun`), with the same result.
    """
    settings = recipe.train
    accelerator = Accelerator(mixed_precision=settings.precision)
    micro_batches = check_batch(settings, accelerator.num_processes)
    import_plugins(recipe)

    set_seed(settings.seed)  # of the initial weights
    data = build_dataset(recipe.data)
    objective = build_objective(recipe.objective)
    denoiser = build_denoiser(recipe.model, data.channels, data.num_classes)
    denoiser.set_gradient_checkpointing(settings.gradient_checkpointing)
    encoders = [build_encoder(section, accelerator.device) for section in recipe.alignments]
    sections = zip(recipe.alignments, encoders)
    alignments = [build_alignment(section, encoder, denoiser, data) for section, encoder in sections]
    ema = EMA(denoiser.to(accelerator.device), settings.ema_decay)
    model = AlignedDenoiser(denoiser, alignments).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, settings.betas, weight_decay=settings.weight_decay
    )
    if settings.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, optimizer)

    run = RunFolder(path)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            run.resume(recipe) if resume else run.create(recipe, overwrite)
        checkpoint = run.newest_checkpoint()
    start = load_checkpoint(checkpoint, accelerator, model, ema, optimizer) if checkpoint else 0
    environment = describe_environment(str(accelerator.device), accelerator.num_processes)
    log = MetricLog(run, accelerator, settings, start, environment)

    with log:
        for step, batch in zip(range(start, settings.steps), batches(data, recipe, accelerator, start)):
            # Drawn for the global batch, then sliced: the same numbers whatever the number of processes.
            generator = step_generator(settings.seed, step, accelerator.device)
            rows = process_rows(settings.batch_size, accelerator.process_index, accelerator.num_processes)
            t, noise = objective.draw((settings.batch_size, *batch["x"].shape[1:]), generator)
            dropped = torch.rand(settings.batch_size, generator=generator, device=accelerator.device)
            t, noise, dropped = t[rows], noise[rows], dropped[rows] < settings.label_dropout
            y = batch["label"].masked_fill(dropped, data.num_classes)
            with torch.no_grad():
                targets = [encoder(batch["image"]) for encoder in encoders]

            for micro in torch.arange(len(y)).chunk(micro_batches):
                part = slice(int(micro[0]), int(micro[-1]) + 1)
                last = part.stop == len(y)
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    noisy = objective.corrupt(batch["x"][part], t[part], noise[part])
                    out = model(noisy.x_t, noisy.t, y[part])
                    denoising = objective.loss(out.prediction, noisy)
                    terms = [
                        alignment.loss(projection, target[part], noisy.t)
                        for alignment, projection, target in zip(alignments, out.projections, targets)
                    ]
                    loss = denoising + sum(aligned for aligned, _ in terms)
                    accelerator.backward(loss / micro_batches)
                log.add(loss, denoising, terms, weight=1 / micro_batches)

            norm = accelerator.clip_grad_norm_(model.parameters(), settings.gradient_clip or float("inf"))
            learning_rate = set_learning_rate(optimizer, settings, step)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(denoiser)
            log.step(step + 1, norm, learning_rate, images=settings.batch_size)

            if accelerator.is_main_process:
                if due(step + 1, settings.checkpoint_every, settings.steps):
                    with log.paused():
                        folder = run.checkpoint_path(step + 1)
                        save_checkpoint(folder, step + 1, accelerator, model, ema, optimizer, recipe)
                        run.drop_old_checkpoints(settings.keep_checkpoints)
                if settings.sample_every and due(step + 1, settings.sample_every, settings.steps):
                    with log.paused():
                        save_progress_grid(run, step + 1, ema, objective, recipe, data)
    accelerator.wait_for_everyone()
    return run


def check_batch(settings: TrainSection, processes: int) -> int:
    """How many passes make one step of one process; a UserError where the global batch does not divide evenly."""
    if settings.batch_size % processes:
        raise UserError(f"train.batch_size {settings.batch_size} does not divide among {processes} processes")
    share = settings.batch_size // processes
    if share % (settings.micro_batch or share):
        raise UserError(
            f"train.micro_batch {settings.micro_batch} does not divide the {share} images that each of {processes} "
            f"processes has of train.batch_size {settings.batch_size}"
        )
    return share // (settings.micro_batch or share)


def batches(data, recipe: Recipe, accelerator: Accelerator, start: int) -> Iterator[dict[str, Tensor]]:
    """This process's rows of the global batches from step `start` on, on the device."""
    settings = recipe.train
    rows = process_rows(settings.batch_size, accelerator.process_index, accelerator.num_processes)
    order = data_order(settings.seed, len(data), settings.batch_size, start)
    loader = DataLoader(
        data,
        batch_sampler=(batch[rows] for batch in order),
        num_workers=recipe.data.workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=recipe.data.workers > 0,
    )
    for batch in loader:
        yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: TrainSection, step: int) -> float:
    """Constant, after a linear rise over `warmup_steps`."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def save_progress_grid(run: RunFolder, step: int, ema: EMA, objective, recipe: Recipe, data) -> None:
    """A grid of samples of the averaged weights: a few of each of the first ten classes, the same noise every time."""
    from dic_repa.generation import generate, save_grid

    classes = range(min(10, data.num_classes))
    labels = torch.tensor([c for c in classes for _ in range(6)])
    settings = recipe.sample.model_copy(update={"num": len(labels)})
    images = torch.cat(list(generate(ema.model, objective, settings, tuple(data[0]["x"].shape), labels)))
    save_grid(images, run.samples / f"step_{step:08d}.png", labels, data.class_names, columns=6)
