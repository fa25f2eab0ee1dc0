"""Everything that a recipe names for training, built once before the first step."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from dic_repa.alignment import AlignedDenoiser, Aligner
from dic_repa.alignment.cache import FeatureCache, feature_cache
from dic_repa.alignment.self_teachers import check_objective
from dic_repa.conditions import Condition, condition_of_data
from dic_repa.data.latents import LatentDataset, data_mean, data_shape
from dic_repa.data.saved import SavedData
from dic_repa.errors import UserError, did_you_mean
from dic_repa.evaluation.judge import by_encoder, check_judge, own_encoder, real_images
from dic_repa.evaluation.measuring import check_metrics
from dic_repa.evaluation.similarity import LPIPS, vgg16_file, where_to_get_vgg16
from dic_repa.models import forward_on_meta
from dic_repa.models.compiled import BY_BLOCK, compile_blocks, training_mode
from dic_repa.models.pretrained import Pretrained
from dic_repa.objectives import Denoising, check_middle_head
from dic_repa.protocols import DataSet, Objective, Samples
from dic_repa.recipe import GuidanceSection, Recipe, TrainSection
from dic_repa.recipe.build import (
    build_alignment,
    build_dataset,
    build_denoiser,
    build_encoder,
    build_objective,
    import_plugins,
)
from dic_repa.runs.checkpoints import RAW
from dic_repa.runtime.processes import in_all_processes
from dic_repa.runtime.progress import warn
from dic_repa.runtime.watchdog import watched
from dic_repa.sampling.labels import draw_labels
from dic_repa.sampling.load import Checkpoint
from dic_repa.sampling.sampler import Sampler, check_sampling
from dic_repa.sampling.weights import in_same_run
from dic_repa.training.ema import EMA, PowerEMA
from dic_repa.training.end_to_end import EndToEnd
from dic_repa.training.inputs import check_batch
from dic_repa.training.memory_estimate import check_memory
from dic_repa.training.optimizers import build_optimizer
from dic_repa.training.sharding import shard, wants_sharding
from dic_repa.training.start import Start, start_from
from dic_repa.training.trainable import adapt, check_fresh, freeze


@dataclass
class Parts:
    """All that a recipe names, built; `model` is the denoiser with its heads, wrapped for the processes."""

    condition: Condition
    data: DataSet
    shape: tuple[int, int, int]  # (C, H, W) of the denoiser's data
    objective: Objective
    encoders: list  # None where the tokens come from a cache, or from a pass of the denoiser
    caches: dict[str, FeatureCache]  # under "tokens.N", for the alignment N
    denoiser: Pretrained
    aligner: Aligner
    model: nn.Module
    optimizer: AcceleratedOptimizer
    ema: EMA  # what is sampled from
    averages: dict[str, EMA]  # it and all others, by their folder in a checkpoint
    sampler: Sampler | None  # of the averaged weights; None where no grids are asked for
    sharded: bool  # then all processes must take part in whatever runs or reads the denoiser or its averages
    start: Start | None = None  # from other weights; None also of a run that goes on from a checkpoint
    data_mean: Tensor | None = None  # (C, H, W), if sampling needs it
    joint: EndToEnd | None = None  # the autoencoder, if it is trained, too
    compiled: bool | str = False  # as `train.compile`, but never 'auto'

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The denoiser's, and the autoencoder's if it is trained: torch's own."""
        return [self.optimizer.optimizer, *([self.joint.optimizer.optimizer] if self.joint else [])]


def build_parts(recipe: Recipe, accelerator: Accelerator, begins: bool = True) -> Parts:
    """Everything on the device. The initial weights depend on the seed alone, and on `train.init_from` if the run
    `begins`: one that goes on has a checkpoint to load.
    """
    settings, device = recipe.train, accelerator.device
    import_plugins(recipe)
    torch.manual_seed(settings.seed)

    data, shape = in_all_processes(accelerator, lambda: (data := build_dataset(recipe.data), data_shape(data)))
    if len(data) < accelerator.num_processes:
        raise UserError(f"{accelerator.num_processes} processes are more than the {len(data)} samples of the data")
    condition = condition_of_data(data)
    draw_labels(recipe, condition, recipe.sample.model_copy(update={"num": 1}))  # shows now what the data cannot give
    denoiser, objective = build_denoiser(recipe.model, data.channels, condition), build_objective(recipe.objective)
    check_denoiser(objective, denoiser, settings)
    check_end_to_end(recipe, objective, accelerator)
    start = in_all_processes(accelerator, lambda: start_from(denoiser, condition, recipe)) if begins else None
    if begins and settings.lora and not start and accelerator.is_main_process:
        warn("train.lora without train.init_from trains adapters of random weights, which stay random")
    freeze(denoiser, settings)
    check_memory(recipe, denoiser, device, settings.batch_size // accelerator.num_processes, shape)
    denoiser.set_gradient_checkpointing(settings.gradient_checkpointing)
    forward_on_meta(denoiser, *shape[-2:])  # finds a size that does not fit before the run's folder is made
    encoders = in_all_processes(accelerator, lambda: [build_encoder(section, device) for section in recipe.alignments])
    alignments = [
        build_alignment(section, encoder, denoiser, data, device)
        for section, encoder in zip(recipe.alignments, encoders)
    ]
    with watched("", "the feature cache", None):
        caches = build_caches(recipe, encoders, data, accelerator)
    if isinstance(data, LatentDataset):
        data.with_images = any(encoder is not None for encoder in encoders) or recipe.latent.end_to_end is not None
    for encoder in encoders:
        cast_weights(encoder, settings.precision)
    denoiser.to(device)
    decays = {"ema": settings.sampled_decay, **{f"ema-{decay:g}": decay for decay in settings.more_ema_decays}}
    averages = {name: EMA(denoiser, decay, settings.ema_warmup) for name, decay in decays.items()}
    averages |= {f"ema-sigma_rel-{width:g}": PowerEMA(denoiser, width) for width in settings.power_ema}
    weights = recipe.sample.weights
    if weights not in (known := [RAW, *averages]):
        raise UserError(f"sample.weights: this recipe has no '{weights}'{did_you_mean(weights, known)}")
    ema = averages["ema" if weights == RAW else weights]
    check_objective(objective, any(each.by_averaged for each in alignments))
    adapt(denoiser, settings)
    if start:
        check_fresh(denoiser, start.fresh)
    with watched("", "the mean of the data", None):
        wanted = hasattr(objective, "data_mean")
        mean = in_all_processes(accelerator, lambda: data_mean(data, device) if wanted else None)
    aligned = AlignedDenoiser(denoiser, alignments).to(device)
    model: nn.Module = aligned
    compiled = training_mode(settings.compile, denoiser, device)
    if compiled == BY_BLOCK:
        compile_blocks(denoiser)
    elif compiled:
        model.compile(mode=None if compiled is True else compiled)
    if sharded := wants_sharding(settings.sharding, accelerator):
        for average in averages.values():  # cut up in the same way as the model
            shard(average.model, average.model, accelerator)
        model = accelerator.prepare_model(shard(model, denoiser, accelerator), evaluation_mode=True)  # mixed precision
        optimizer = accelerator.prepare_optimizer(build_optimizer(recipe.optimizer, model))
    else:
        model, optimizer = accelerator.prepare(model, build_optimizer(recipe.optimizer, model))
    joint = build_joint(recipe, data, accelerator)
    sampler = None
    if settings.sample_every or (recipe.evaluate and recipe.evaluate.every):
        # Built now, so that a missing autoencoder stops the run before it starts, not at the first grid.
        # In float32 if it is sharded: a sharded model cannot be copied into another precision.
        sample = recipe.sample.model_copy(update={"precision": "fp32"}) if sharded else recipe.sample
        if (guidance := sample.guidance) and guidance.weak and in_same_run(guidance.weak):
            without = GuidanceSection(internal=guidance.internal, internal_interval=guidance.internal_interval)
            sample = sample.model_copy(update={"guidance": without})
            if accelerator.is_main_process:
                warn(f"samples during training are not guided by '{guidance.weak}', a checkpoint of the run itself")
        saved = SavedData.of(data, condition, mean)
        sampler = Checkpoint(ema.model, recipe, Path("this run"), saved).sampler(sample)
        sampler.decode = joint.decode if joint else sampler.decode
    return Parts(
        condition, data, shape, objective, encoders, caches, denoiser, aligned.aligner, model,
        optimizer, ema, averages, sampler, sharded, start, mean, joint, compiled,
    )  # fmt: skip


def check_end_to_end(recipe: Recipe, objective: Any, accelerator: Accelerator) -> None:
    """A UserError now where the recipe cannot train its autoencoder, if it says so, or LPIPS's weights are missing."""
    section = recipe.latent.end_to_end
    if section is None:
        return
    one_state = isinstance(objective, Denoising) and objective.trains_middle and not hasattr(objective, "data_mean")
    problems = {
        "there is no alignment, whose gradient it would be trained by": not alignment_weight(recipe),
        "latents are normalised by the batch; leave latent.normalise out": recipe.latent.normalise != "scaling-factor",
        f"the objective {recipe.objective.name} needs more than a noisy state of the data; take flow-matching": (
            not one_state
        ),
        "train.precision fp16 is not enough; take bf16, or no for float32": recipe.train.precision == "fp16",
        "the model is sharded; take train.sharding: none": wants_sharding(recipe.train.sharding, accelerator),
    }
    for problem in (text for text, holds in problems.items() if holds):
        raise UserError(f"latent.end_to_end: {problem}")
    if section.lpips and not vgg16_file().is_file():
        raise UserError(f"latent.end_to_end.lpips needs VGG16's weights: {where_to_get_vgg16()}, or set it to 0")


def alignment_weight(recipe: Recipe) -> float:
    """Of all alignments together."""
    return sum(each.weight for each in recipe.alignments)


def build_joint(recipe: Recipe, data: Any, accelerator: Accelerator) -> EndToEnd | None:
    """What trains the autoencoder, if the recipe says so; a UserError for data without one, or without images."""
    section, settings = recipe.latent.end_to_end, recipe.train
    if section is None:
        return None
    if not isinstance(data, LatentDataset) or data.spec.name == "none" or "image" not in data[0]:
        raise UserError("latent.end_to_end: the data are pixels, or have no images")
    passes = check_batch(settings, accelerator.num_processes)
    lpips = LPIPS().to(accelerator.device) if section.lpips else None
    average = partial(EMA, decay=settings.sampled_decay, warmup=settings.ema_warmup)
    return EndToEnd(data.autoencoder, section, alignment_weight(recipe), passes, average, accelerator, lpips)


def cast_weights(encoder, precision: str) -> None:
    """Cast those weights of a frozen encoder once that mixed precision would cast at each call, to the same result."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype is None or not isinstance(encoder, nn.Module):
        return
    for module in encoder.modules():
        if type(module) in (nn.Linear, nn.Conv2d):  # a class of its own may compute with its weights first
            module.to(dtype)


def check_denoiser(objective: Any, denoiser: Pretrained, settings: TrainSection) -> None:
    """Raise a UserError for a denoiser or a label dropout with which the objective cannot be trained."""
    check_middle_head(denoiser, objective)
    if hasattr(objective, "check_denoiser"):
        objective.check_denoiser(denoiser)
    learns_guidance = getattr(objective, "guided", False) and denoiser.conditioned_on.kind != "none"
    if learns_guidance and settings.label_dropout == 0:
        raise UserError(
            "the objective learns guidance away from the null class, so train.label_dropout must be above 0; or set "
            "objective.options.omega to 1 and kappa to 0"
        )


def check_sampling_and_evaluation(recipe: Recipe, objective) -> None:
    """Raise a UserError now if the recipe's sampling or evaluation would fail after days of training."""
    check_sampling(recipe.sample, objective)
    if recipe.evaluate:
        names = check_metrics(recipe.evaluate.names, recipe.evaluate.reference)
        if recipe.evaluate.bound and not names:
            raise UserError(
                "evaluate.bound is scored by metrics that compare with evaluate.reference, and "
                f"{recipe.evaluate.metric} has real images of its own; leave it out, or add a metric to evaluate.also"
            )
        if not own_encoder(recipe) and (named := by_encoder(names)):
            raise UserError(
                f"evaluate: {', '.join(named)} needs the encoder of an alignment, and the recipe has none; "
                "align the run, or name another metric"
            )


def check_judge_of(recipe: Recipe) -> None:
    """A UserError now if the samples at the end could not be scored for want of weights or a reference."""
    section = recipe.evaluate
    if section and not section.every:  # else the judge is kept
        try:
            reference, bound = (real_images(recipe, source) for source in (section.reference, section.bound))
            check_judge(section.names, reference, own_encoder(recipe), bound)
        except UserError as error:
            raise UserError(f"evaluate: {error}; or train with --set evaluate=null, and judge the run later") from None


def build_caches(recipe: Recipe, encoders: list, data: Samples, accelerator: Accelerator) -> dict[str, FeatureCache]:
    """The feature caches that the recipe asks for; `encoders` has None in place of those that they replace."""
    caches = {}
    with accelerator.local_main_process_first():  # it fills the cache that the others then open
        for i, section in enumerate(recipe.alignments):
            if section.cache and section.encoder:
                named = (section.encoder, section.encoder_options, encoders[i])
                caches[f"tokens.{i}"] = feature_cache(*named, data, accelerator.device, recipe.data.workers)
                encoders[i] = None
    return caches
