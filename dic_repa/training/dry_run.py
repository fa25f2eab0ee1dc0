"""A training run tried out: all of it built, three steps on random data, and what the whole run will take.

No data set is needed, and nothing is written. Without a GPU the memory is estimated from shapes, and the steps are run
only where a CPU gets through them in about half a minute.
"""

import contextlib
import shutil
from math import ceil
from pathlib import Path

import torch

from dic_repa.alignment import AlignedDenoiser
from dic_repa.conditions import create_condition
from dic_repa.data.autoencoders.spec import SCALING_FACTOR
from dic_repa.encoders import create_encoder
from dic_repa.encoders.families import FAMILIES
from dic_repa.errors import UserError, first_line
from dic_repa.models import measure_cost
from dic_repa.models.compiled import GRAPH_MODES
from dic_repa.recipe import AlignmentSection, LatentSection, Recipe, TrainSection, load_recipe
from dic_repa.recipe.build import (
    build_dataset,
    build_decoder,
    build_denoiser,
    build_objective,
    data_traits,
    import_plugins,
    join_encoder,
    join_teacher,
)
from dic_repa.recipe.files import paper_recipe
from dic_repa.recipe.keys import differences
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.training.dry_run_steps import STEPS, measure
from dic_repa.training.inputs import check_batch
from dic_repa.training.log import device_name
from dic_repa.training.loop import start_accelerator
from dic_repa.training.memory_estimate import count_parameters, estimate_memory
from dic_repa.training.optimizers import state_bytes
from dic_repa.training.parts import check_end_to_end, check_judge_of, check_sampling_and_evaluation
from dic_repa.training.schedules import LearningRate
from dic_repa.training.start import start_from
from dic_repa.training.trackers import check_trackers
from dic_repa.training.trainable import adapt, freeze, trained_parameters

FEASIBLE_MACS = 5e11  # of all the steps together: about half a minute of a slow CPU


def dry_run(recipe: Recipe, path: str | Path, processes: int = 1) -> dict:
    """What training `recipe` into `path` takes, as a plain dict; see `dic-repa train --dry-run`.

    Launched in one process, it stands for one of `processes`, with its share of the batch. A UserError where the run
    could not begin, or does not fit into the GPU's memory.
    """
    import_plugins(recipe)
    accelerator = start_accelerator(recipe.train)
    launched = accelerator.num_processes
    processes = launched if launched > 1 else processes
    passes = check_batch(recipe.train, processes)
    objective = build_objective(recipe.objective)
    check_sampling_and_evaluation(recipe, objective)
    check_trackers(recipe.train.trackers)
    LearningRate(recipe)
    notes: list[str] = []
    trial = with_random_data(recipe, notes)
    samples = recipe.train.sample_every or (recipe.evaluate and recipe.evaluate.every)
    # An autoencoder that is not named is named by the data, if that is here.
    if samples and (recipe.data.autoencoder or Path(recipe.data.place or ".").exists()):
        try:
            build_decoder(recipe.data)
        except UserError as error:
            notes.append(f"as it is here, training would not begin: {error}")
    try:
        check_judge_of(recipe)
        check_end_to_end(recipe, objective, accelerator)
    except UserError as error:
        notes.append(f"as it is here, training would not begin: {error}")
    if launched == 1:
        trial.train.batch_size //= processes
    shapes = build_shapes(trial, notes)
    trial.train.init_from = None  # they have been looked at
    share, kept = recipe.train.batch_size // processes, state_bytes(recipe.optimizer)
    report = {
        "device": device_name(accelerator.device),
        "processes": processes,
        "launched": launched,
        "batch": {"global": recipe.train.batch_size, "of a process": share, "of a pass": share // passes},
        "data": {"shape": list(shapes["data"]), "autoencoder": recipe.data.autoencoder},
        "parameters": shapes["parameters"],
        "gmacs": shapes["macs"] / 1e9,
        "memory_estimate": estimate_memory(shapes, objective, recipe.train, processes, share // passes, kept),
        "disk": disk(recipe.train, kept, shapes["parameters"], Path(path)),
        "paper": paper(recipe),
    }
    macs = 3 * shapes["macs"] * share * STEPS  # the backward pass costs two forward passes
    if accelerator.device.type == "cpu" and macs > FEASIBLE_MACS:
        notes.append(f"no steps were run: {macs / 1e12:.0f} TMACs are too many for a CPU, so the speed is not known")
    else:
        with gpu_arithmetic(recipe.train.tf32, benchmark=True):
            choose_weights(trial, notes)
            search = launched == 1 and accelerator.device.type == "cuda" and measurable(recipe, processes)
            report |= measure(trial, accelerator, recipe.train, processes, search)
    return report | {"notes": notes}


def measurable(recipe: Recipe, processes: int) -> bool:
    """Whether steps with other passes, tried in one process, take the memory that they take in the run: not if the
    model is cut up there or an autoencoder trains too, and not if CUDA graphs of all that was tried stay."""
    whole = processes == 1 or recipe.train.sharding == "none"
    return whole and not recipe.latent.end_to_end and recipe.train.compile not in GRAPH_MODES


def with_random_data(recipe: Recipe, notes: list[str]) -> Recipe:
    """The recipe with random data of the right shapes, no progress grids and no feature cache; `notes` says what was
    assumed."""
    trial = recipe.model_copy(deep=True)
    traits, missing = data_traits(recipe.data)
    if missing:
        notes.append(
            f"the data is not here ({missing}): {traits.channels} channels, {traits.condition.describe()} and images "
            f"of {traits.image_size} px are assumed"
        )
    if any(section.encoder for section in recipe.alignments) and not traits.image_size:
        raise UserError("the data has latents but no images, which an encoder needs: train it with `alignments: []`")
    options = {
        "channels": traits.channels,
        "image_channels": traits.image_channels or 3,
        "image_size": traits.image_size or 1,
        **traits.condition.options(),
    }
    if not missing and recipe.latent.normalise != SCALING_FACTOR:
        build_dataset(recipe.data)  # says what it lacks for that
    data = {"name": "random", "path": None, "autoencoder": None, "options": options, "workers": 0}
    trial.data = trial.data.model_copy(update=data)
    trial.train.sample_every, trial.evaluate = 0, None
    if trial.latent.end_to_end:
        notes.append("the autoencoder is not trained in these steps: the run takes more time and memory")
    trial.latent = LatentSection()
    trial.sample.classes = "balanced"  # random data does not say how often each class is in the real data
    for section in trial.alignments:
        if section.cache and section.encoder:
            section.cache = False
            notes.append(f"{section.encoder} runs in these steps; in the run its tokens come from the cache")
    return trial


def build_shapes(trial: Recipe, notes: list[str]) -> dict:
    """The denoiser with its heads on the meta device, and what else can be known from it; `notes` says if the
    weights of `train.init_from` do not fit."""
    size, data = trial.data.size, trial.data.options
    condition = create_condition(data["num_classes"], data.get("condition"))
    with torch.device("meta"):
        denoiser = build_denoiser(trial.model, data["channels"], condition)
    denoiser.set_gradient_checkpointing(trial.train.gradient_checkpointing)
    alignments, encoders = [], {}
    image_size = (data["image_size"],) * 2
    for section in trial.alignments:
        if section.encoder is None:
            with torch.device("meta"):
                alignments.append(join_teacher(section, denoiser, (size, size)))
            continue
        options = random_weights(section)
        with torch.device("meta") if options else contextlib.nullcontext():
            encoder = create_encoder(section.encoder, **(options or section.encoder_options))
        encoders[section.encoder] = count_parameters(encoder) if isinstance(encoder, torch.nn.Module) else 0
        with torch.device("meta"):
            alignments.append(join_encoder(section, encoder, denoiser, image_size, (size, size)))
    plain, heads = count_parameters(denoiser), count_parameters(*alignments)
    macs = measure_cost(denoiser, size).macs  # before the taps have their hooks
    try:
        start_from(denoiser, condition, trial)
    except UserError as error:
        notes.append(f"as it is here, training would not begin: {error}")
    freeze(denoiser, trial.train)
    with torch.device("meta"):
        adapt(denoiser, trial.train)
    model = AlignedDenoiser(denoiser, alignments)
    counts = {
        "denoiser": plain,
        "adapters": count_parameters(denoiser) - plain,
        "heads": heads,
        "trained": sum(parameter.numel() for parameter in trained_parameters(model)),
    }
    return {
        "macs": macs,
        "model": model,
        "parameters": counts | {"encoders": encoders},
        "tokens": [each.target_shape if each.takes_tokens else None for each in alignments],
        "data": (data["channels"], size, size),
    }


def random_weights(section: AlignmentSection) -> dict | None:
    """The options that give the encoder random weights; None if it is not one of timm's, which have them."""
    if section.encoder is None or (section.encoder not in FAMILIES and not section.encoder.startswith("timm:")):
        return None
    return {key: value for key, value in section.encoder_options.items() if key != "weights"} | {"pretrained": False}


def choose_weights(trial: Recipe, notes: list[str]) -> None:
    """Random weights for encoders whose own are not here and cannot be fetched, which `notes` says: they are as
    fast."""
    for section in trial.alignments:
        options = random_weights(section)
        if options is None or section.encoder is None or section.encoder_options.get("pretrained") is False:
            continue
        try:
            create_encoder(section.encoder, **section.encoder_options)
        except UserError as error:
            section.encoder_options = options
            notes.append(f"{section.encoder} has random weights here ({first_line(error)})")


def disk(settings: TrainSection, optimizer_bytes: float, parameters: dict, path: Path) -> dict:
    """Bytes of one checkpoint (weights, optimizer, averages), of all that the run keeps, and of free disk space."""
    weights = parameters["denoiser"] + parameters["heads"] + parameters["adapters"]
    denoiser = 4 * parameters["denoiser"]  # an average
    averages = 1 + len(settings.more_ema_decays) + len(settings.power_ema)
    checkpoint = int(4 * weights + optimizer_bytes * parameters["trained"]) + averages * denoiser
    written = ceil(settings.steps / settings.checkpoint_every)
    forever = settings.steps // settings.keep_every if settings.keep_every else 0
    kept = min(written, settings.keep_checkpoints + 1 + forever)  # one more while a new one is written
    snapshots = ceil(settings.steps / settings.snapshot_every) if settings.power_ema and settings.snapshot_every else 0
    existing = next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists())
    return {
        "checkpoint": checkpoint,
        "kept": kept,
        "snapshots": snapshots,
        "total": kept * checkpoint + snapshots * len(settings.power_ema) * denoiser,
        "free": shutil.disk_usage(existing).free,
    }


def paper(recipe: Recipe) -> dict | None:
    """The row of a paper that the recipe stands for, and the keys in which it differs from that row's recipe."""
    if recipe.paper is None:
        return None
    name = paper_recipe(recipe)
    differing = differences(load_recipe(name), recipe) if name else {}
    return {**recipe.paper.model_dump(), "recipe": name, "changed": {k: list(pair) for k, pair in differing.items()}}
