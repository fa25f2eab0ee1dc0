"""The typed schema of a recipe: a section is a class, a key is a field with its meaning."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from dic_repa.recipe.schema_sampling import SampleSection
from dic_repa.recipe.section import Section
from dic_repa.recipe.values import (
    OFF,
    REAL,
    Batch,
    BelowOne,
    Count,
    Flag,
    Images,
    Name,
    Natural,
    NotNegative,
    Part,
    Positive,
    Precision,
    Probability,
    Real,
    Seed,
    Size,
    Stages,
    at_most,
)


class ModelSection(Section):
    name: str = Field(
        "DiC", description="a preset (`dic-repa info`), a family such as DiC or SiT with sizes, or diffusers:CLASS"
    )
    width: Annotated[Count, Field(ge=2)] | None = Field(None, description="channels of the first level, or of a token")
    depths: Stages | None = Field(
        None, description="blocks of the stages: encoder, ..., middle, ..., decoder; five of three levels, three of two"
    )
    learn_sigma: Flag = Field(False, description="twice the output channels; the second half is a variance")
    time_scale: Positive = Field(1.0, description="multiplies t before it is embedded")
    zero_gates: Flag = Field(False, description="start each block as the identity")
    kernels: Annotated[Literal["auto", "off"], OFF] = Field(
        "auto", description="Triton's kernels for DiC's blocks, where a GPU has them; off: never"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="other arguments of the denoiser's constructor")


class EndToEndSection(Section):
    alignment_weight: NotNegative = Field(1.5, description="lambda of the alignments in the autoencoder's loss")
    l1: NotNegative = Field(1.0, description="weight of the decoded images' mean absolute error, in [-1, 1]")
    lpips: NotNegative = Field(1.0, description="weight of their LPIPS, whose weights must be fetched; 0: none")
    kl: NotNegative = Field(
        1e-6, description="weight of the posterior's KL divergence to N(0, 1), summed over an image"
    )
    learning_rate: Positive = Field(1e-4, description="of the autoencoder, before the schedule lowers it")
    gradient_clip: Positive | None = Field(1.0, description="largest norm of its gradient; null: no clipping")
    momentum: Probability = Field(0.1, description="share of a batch in the running mean and variance of the latents")


class LatentSection(Section):
    normalise: Literal["scaling-factor", "per-channel", "none"] = Field(
        "scaling-factor",
        description="how latents become the denoiser's data: by the autoencoder's own shift and scale; per-channel, to "
        "mean 0 and deviation 1 over the prepared data; or none",
    )
    end_to_end: EndToEndSection | None = Field(
        None, description="train the autoencoder with the denoiser (REPA-E), from images; null: it is frozen"
    )


class DataSection(Section):
    name: str = Field("digits", description="digits, emoji, prepared, webdataset, ...: `dic-repa parts data-set`")
    path: str | None = Field(None, description="where the data is, for some also an address; null: it needs none")
    size: Size = Field(16, description="height and width of the denoiser's data (256 px behind an sd-vae: 32)")
    autoencoder: str | None = Field(
        None, description="none (pixels), a name, a hub id, a folder or a file; null: the data set's own"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="its other arguments: flip, shift, labels, ...")
    workers: Annotated[Natural, at_most("workers")] = Field(0, description="loader processes of each training process")
    _folders: tuple[str, ...] = PrivateAttr(())  # the recipe's
    _latent: LatentSection = PrivateAttr(default_factory=LatentSection)  # the recipe's

    @property
    def place(self) -> str | None:
        """Where `path` is: in the current folder, or else in the first of the recipe's `folders` that has it."""
        places = [self.path] + [str(Path(folder, self.path)) for folder in self._folders if self.path]
        return next((place for place in places if place and Path(place).exists()), self.path)


class ObjectiveSection(Section):
    name: str = Field("flow-matching", description="flow-matching, ddpm, ...: `dic-repa parts objective`")
    options: dict[str, Any] = Field(default_factory=dict, description="its arguments: path, time, prediction, ...")


class AlignmentSection(Section):
    encoder: str | None = Field(None, description="the frozen encoder whose tokens are the targets; null: a teacher")
    encoder_options: dict[str, Any] = Field(default_factory=dict, description="arguments of the encoder")
    teacher: Part | None = Field(
        None, description="targets from the denoiser itself: layer-sync, self-alignment: `dic-repa parts teacher`"
    )
    tap: str = Field("mid.0", description="the submodule of the denoiser whose output is aligned")
    head: str = Field("mlp", description="projects what the tap gives to the encoder's tokens: `dic-repa parts head`")
    head_options: dict[str, Any] = Field(default_factory=dict, description="arguments of the head")
    loss: Part = Field("u-repa", description="compares projection and target: `dic-repa parts alignment-loss`")
    weight: NotNegative = Field(0.5, description="lambda, of the whole alignment loss")
    manifold_weight: NotNegative = Field(3.0, description="w, of the manifold term against the token term")
    target: Part = Field(
        "tokens", description="what is compared with: tokens, spatial-norm, ...: `dic-repa parts target`"
    )
    time_weight: Part = Field(
        "constant", description="weight over t: constant, v-shape, ...: `dic-repa parts time-weight`"
    )
    schedule: Part = Field(
        "constant", description="weight over steps: constant, cosine, stop, ...: `dic-repa parts alignment-schedule`"
    )
    cache: Flag = Field(False, description="compute the data's tokens once, into the feature cache")

    @property
    def taught_by(self) -> str:
        """The name of its encoder or teacher; else of its loss, which compares with nothing."""
        named = self.teacher or self.loss
        return self.encoder or (named if isinstance(named, str) else str(named.get("name")))


class OptimizerSection(Section):
    name: str = Field("adamw", description="adamw, ...: `dic-repa parts optimizer`; or torch's: torch.optim:NAdam")
    learning_rate: Positive = Field(1e-4, description="after the warm-up, before the schedule lowers it")
    weight_decay: NotNegative = Field(0.0, description="share of a weight that a step at learning rate 1 would remove")
    decay_on: Literal["all", "matrices"] = Field(
        "all", description="what decays: all; or matrices: no biases, norms, embeddings and single vectors"
    )
    betas: tuple[BelowOne, BelowOne] = Field((0.9, 0.999), description="Adam's decays of the gradient's two moments")
    options: dict[str, Any] = Field(default_factory=dict, description="its other arguments: eps; momentum of sgd; ...")


class ScheduleSection(Section):
    name: str = Field("constant", description="constant, cosine, wsd, ...: `dic-repa parts learning-rate-schedule`")
    warmup_steps: Natural = Field(0, description="steps over which the learning rate rises to its value")
    options: dict[str, Any] = Field(
        default_factory=dict, description="its arguments: final, the share of the rate at the end; decay of wsd"
    )


class LoraSection(Section):
    rank: Count = Field(16, description="columns of an adapter's two matrices")
    alpha: Positive = Field(16.0, description="an adapter's output counts alpha / rank times")
    targets: Annotated[list[Name], Field(min_length=1)] = Field(
        default=["*"], description="patterns of the convolutions and linear layers that get one, such as 'mid.*.conv1'"
    )
    also: list[Name] = Field(
        default_factory=list, description="patterns of parameters that train besides, such as '*.label.weight'"
    )


class TrainSection(Section):
    init_from: Name | None = Field(
        None, description="begin with these weights: a run, checkpoint, authors' file or hub id; null: with new ones"
    )
    freeze: list[Name] = Field(
        default_factory=list, description="patterns of the denoiser's parameters that stay as they are, such as 'enc.*'"
    )
    lora: LoraSection | None = Field(
        None, description="train small matrices beside the denoiser's frozen layers (LoRA, by peft); null: its own"
    )
    steps: Count = Field(400_000, description="optimizer steps")
    batch_size: Batch = Field(256, description="images of one step, over all processes")
    micro_batch: Batch | None = Field(None, description="most images in one pass of one process; null: all")
    gradient_clip: Positive | None = Field(1.0, description="largest norm of the gradient; null: no clipping")
    ema_decay: Probability = Field(0.9999, description="decay of the averaged weights that are sampled from")
    ema_half_life: Positive | None = Field(
        None, description="images in which the average forgets half, for any batch; null: ema_decay a step"
    )
    ema_warmup: Flag = Field(True, description="an average's decay after n steps is at most (1 + n) / (10 + n)")
    more_ema_decays: list[Probability] = Field(
        default_factory=list, description="decays of further averages, in ema-DECAY/"
    )
    power_ema: list[Annotated[float, Field(gt=0, le=0.2886, strict=True), REAL]] = Field(
        default_factory=list,
        description="sigma_rel of power-function averages; two give any average after the run",
    )
    snapshot_every: Count | None = Field(None, description="steps between stored snapshots of power_ema; null: none")
    label_dropout: Probability = Field(0.1, description="share of labels replaced by the null class")
    precision: Precision = Field("no", description="mixed precision of the denoiser; no: float32")
    gradient_checkpointing: Flag = Field(False, description="recompute blocks in the backward pass, to save memory")
    tf32: Flag = Field(False, description="TF32 on the GPU where float32 is computed: faster, 10 bits of mantissa")
    compile: Literal["auto", "blocks", "reduce-overhead", True, False] = Field(
        "auto",
        description="torch.compile the denoiser with its heads; blocks: each block by itself, in less time; "
        "reduce-overhead: with CUDA graphs; auto: blocks on a GPU, else false",
    )
    seed: Seed = Field(0, description="all randomness of a step comes from it and the step's number")
    log_every: Count = Field(100, description="steps between lines of metrics.jsonl")
    sample_every: Natural = Field(10_000, description="steps between grids of samples; 0: none")
    checkpoint_every: Count = Field(10_000, description="steps between checkpoints; the last step has one too")
    keep_checkpoints: Count = Field(2, description="how many of the newest are kept")
    keep_every: Count | None = Field(None, description="checkpoints at multiples of this step are kept too; null: none")
    max_skipped: Count = Field(10, description="steps in a row with a loss or gradient not finite that end the run")
    loader_timeout: Positive = Field(60.0, description="seconds without a batch before a warning")
    trackers: list[Part] = Field(
        default_factory=list,
        description="where metrics are also logged: tensorboard, wandb, ...: `dic-repa parts tracker`",
    )
    sharding: Literal["none", "fsdp2"] = Field("none", description="fsdp2: cut the model up among the processes")

    @property
    def sampled_decay(self) -> float:
        """Of the average that is sampled from, in a step: 0.5^(batch_size / ema_half_life), or ema_decay."""
        return 0.5 ** (self.batch_size / self.ema_half_life) if self.ema_half_life else self.ema_decay

    @model_validator(mode="after")
    def _micro_batch_divides(self):
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}")
        return self


class TimeoutsSection(Section):
    """After how many seconds something is taken to hang; null: never."""

    setup: Positive | None = Field(3600.0, description="building all parts; a feature cache takes its time besides")
    data: Positive | None = Field(1800.0, description="waiting for a batch; then the state is saved, exit code 75")
    step: Positive | None = Field(3600.0, description="a step, the first with its compilation; then exit code 124")
    checkpoint: Positive | None = Field(3600.0, description="copying and writing the state; then exit code 124")


class EvaluateSection(Section):
    metric: str = Field("digits", description="what scores the samples: digits, or a metric such as fid")
    also: list[Name] = Field(default_factory=list, description="further metrics: sfid, is, ...")
    reference: str | None = Field(
        None, description="real images that fid and its like compare with: a path, or emoji:train"
    )
    bound: str | None = Field(
        None, description="real images that are not trained on, scored as samples are: a path, or emoji:held-out"
    )
    every: Natural = Field(0, description="steps between evaluations in training; 0: at the end alone")
    num: Images | None = Field(None, description="samples of an evaluation in training; null: sample.num")
    best: str | None = Field(None, description="the score whose best checkpoint is kept; null: the metric's")

    @property
    def names(self) -> list[str]:
        """All that the samples are scored by."""
        return [self.metric, *self.also]


class PaperSection(Section):
    """The row of a paper that a recipe stands for: for the reader, and for comparing results with."""

    row: str = Field(description="paper, model, steps and guidance: unique among the recipes")
    results: dict[str, Real] = Field(default_factory=dict, description="published: FID, IS, GMACs, parameters_M, ...")
    elsewhere: dict[str, dict[str, Real]] = Field(
        default_factory=dict, description="what the row reports of another network than this one: its name to results"
    )
    source: str = Field("", description="where the results, and values that the paper does not state, are from")
    differs: str = Field("", description="what differs from the paper, and which values have no source")


class Recipe(Section):
    """All that determines a training run, the samples at its end and how they are judged."""

    description: str = Field("", description="a line for the reader, shown by `dic-repa recipes`")
    paper: PaperSection | None = Field(None, description="the row of a paper that this stands for; null: none")
    plugins: list[Name] = Field(
        default_factory=list, description="modules to import first: they register your own parts"
    )
    folders: list[Name] = Field(
        default_factory=list, description="where plugins and data.path are looked for after the current folder"
    )
    model: ModelSection = Field(default_factory=ModelSection, description="the denoiser")
    data: DataSection = Field(default_factory=DataSection, description="what it is trained on")
    latent: LatentSection = Field(default_factory=LatentSection, description="what becomes of an autoencoder's latents")
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection, description="what it is trained for")
    alignments: Annotated[list[AlignmentSection], at_most("alignments")] = Field(
        default_factory=list, description="what its hidden states are aligned to; empty: the plain baseline"
    )
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="what changes the weights")
    schedule: ScheduleSection = Field(default_factory=ScheduleSection, description="the learning rate over the steps")
    train: TrainSection = Field(default_factory=TrainSection, description="how it is trained")
    timeouts: TimeoutsSection = Field(
        default_factory=TimeoutsSection, description="seconds after which a run that hangs is ended"
    )
    sample: SampleSection = Field(default_factory=SampleSection, description="how it is sampled from")
    evaluate: EvaluateSection | None = Field(
        None, description="how samples are judged, at the end of the run too; null: not at all"
    )

    _name: str = PrivateAttr("")  # of its file, or in the package

    @model_validator(mode="after")
    def _tell_the_data(self):
        self.data._folders, self.data._latent = tuple(self.folders), self.latent
        return self


class SamplingRecipe(Section):
    """How to sample from a finished run: a recipe with a `sample` section and no model."""

    description: str = Field("", description="a line for the reader, shown by `dic-repa recipes`")
    paper: PaperSection | None = Field(None, description="the row of a paper that this stands for; null: none")
    sample: SampleSection = Field(description="how it is sampled from")
