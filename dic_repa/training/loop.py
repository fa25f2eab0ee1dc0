"""The training loop: corrupt the data, run the denoiser, add the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dic_repa.alignment import AlignedDenoiser, Alignment
from dic_repa.alignment.cache import FeatureCache, WithTokens, feature_cache
from dic_repa.build import (
    build_alignment,
    build_dataset,
    build_denoiser,
    build_encoder,
    build_objective,
    import_plugins,
)
from dic_repa.data.latents import data_shape, denoiser_data
from dic_repa.errors import UserError, first_line
from dic_repa.models import forward_on_meta
from dic_repa.recipe import Recipe, TrainSection
from dic_repa.training.checkpoint import load_checkpoint, save_checkpoint
from dic_repa.training.ema import EMA
from dic_repa.training.metrics import MetricLog
from dic_repa.training.randomness import data_order, process_rows, step_generator
from dic_repa.training.run_folder import RunFolder

PREFETCH = 4  # batches that each loader process has ready: they bridge a slow read from a disk or a network


@dataclass
class Parts:
    """All that a recipe names, built; `model` is the denoiser with its heads, wrapped for the processes."""

    data: Dataset
    objective: object
    encoders: list  # None where the tokens come from a cache
    caches: dict[str, FeatureCache]  # under "tokens.N", for the alignment N
    denoiser: nn.Module
    alignments: list[Alignment]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    sampler: Callable[[Tensor], Iterator[Tensor]] | None  # of the averaged weights; None where no grids are asked for


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


def build_parts(recipe: Recipe, accelerator: Accelerator) -> Parts:
    """Everything on the device, with initial weights that depend on the seed alone."""
    settings, device = recipe.train, accelerator.device
    import_plugins(recipe)
    torch.manual_seed(settings.seed)
    data = build_dataset(recipe.data)
    denoiser = build_denoiser(recipe.model, data.channels, data.num_classes)
    denoiser.set_gradient_checkpointing(settings.gradient_checkpointing)
    forward_on_meta(denoiser, *data_shape(data)[-2:])  # finds a size that does not fit before the run's folder is made
    encoders = [build_encoder(section, device) for section in recipe.alignments]
    alignments = [
        build_alignment(section, encoder, denoiser, data, device)
        for section, encoder in zip(recipe.alignments, encoders)
    ]
    caches = build_caches(recipe, encoders, data, accelerator)
    ema = EMA(denoiser.to(device), settings.ema_decay)
    model = AlignedDenoiser(denoiser, alignments).to(device)
    decay = settings.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, settings.betas, weight_decay=decay)
    if settings.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    objective, sampler = build_objective(recipe.objective), None
    if settings.sample_every:
        from dic_repa.generation import Checkpoint, build_sampler

        # Built now, not at the first grid: an autoencoder that is missing shall stop the run before it starts.
        sampler = build_sampler(Checkpoint(ema.model, recipe, Path("this run")), recipe.sample)
    return Parts(data, objective, encoders, caches, denoiser, alignments, model, optimizer, ema, sampler)


def check_ending(recipe: Recipe, objective) -> None:
    """A UserError now for what would otherwise fail after days of training: the recipe's sampling and its judge."""
    from dic_repa.evaluation import metrics
    from dic_repa.generation import check_sampling

    check_sampling(recipe.sample, objective)
    if recipe.evaluate:
        metrics.get(recipe.evaluate.metric)


def build_caches(recipe: Recipe, encoders: list, data: Dataset, accelerator: Accelerator) -> dict[str, FeatureCache]:
    """The feature caches that the recipe asks for; the encoders that they stand in for are let go of."""
    caches = {}
    with accelerator.local_main_process_first():  # who fills what the others then open
        for i, section in enumerate(recipe.alignments):
            if section.cache:
                caches[f"tokens.{i}"] = feature_cache(
                    section.encoder,
                    section.encoder_options,
                    encoders[i],
                    data,
                    accelerator.device,
                    recipe.data.workers,
                )
                encoders[i] = None
    return caches


@dataclass
class Inputs:
    """What one pass takes: data, labels with some dropped, times, noise, and the encoders' tokens."""

    x: Tensor
    y: Tensor
    t: Tensor
    noise: Tensor
    tokens: list[Tensor | None]  # None where the alignment's schedule is at 0


def step_inputs(
    parts: Parts,
    batch: dict[str, Tensor],
    settings: TrainSection,
    step: int,
    accelerator: Accelerator,
    passes: int,
    scales: list[float],
) -> Iterator[Inputs]:
    """The step's inputs of this process, split into its passes; an encoder is run where its schedule's scale is not 0.

    Times, noise and dropped labels are drawn for the global batch and then sliced: the same numbers whatever the number
    of processes and passes.
    """
    generator = step_generator(settings.seed, step, accelerator.device)
    t, noise = parts.objective.draw((settings.batch_size, *data_shape(parts.data)), generator)
    uniform = torch.rand(settings.batch_size, generator=generator, device=accelerator.device)
    rows = process_rows(settings.batch_size, accelerator.process_index, accelerator.num_processes)
    y = batch["label"].masked_fill(uniform[rows] < settings.label_dropout, parts.data.num_classes)
    x = denoiser_data(parts.data, batch, settings.batch_size, rows, generator)
    images = batch.get("image", x)  # latents without images have no encoder to show them to
    split = [tensor.chunk(passes) for tensor in (x, y, t[rows], noise[rows], images)]
    cached = {name: batch[name].chunk(passes) for name in parts.caches}
    for k, (x, y, t, noise, image) in enumerate(zip(*split)):
        tokens: list[Tensor | None] = [None] * len(scales)
        for i, encoder in enumerate(parts.encoders):
            if scales[i]:
                with torch.no_grad():
                    tokens[i] = cached[f"tokens.{i}"][k] if encoder is None else encoder(image)
        yield Inputs(x, y, t, noise, tokens)


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
        prefetch_factor=PREFETCH if recipe.data.workers else None,
    )
    for batch in loader:
        if not recipe.alignments and ("x" in batch or "moments" in batch):
            batch.pop("image", None)  # nobody looks at it: neither an encoder nor the autoencoder
        yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}


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
