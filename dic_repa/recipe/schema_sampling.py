"""The sections of a recipe that say how a model is sampled from."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.config import JsonDict

from dic_repa.recipe.section import Section
from dic_repa.recipe.values import (
    OFF,
    Batch,
    Count,
    Flag,
    Images,
    Name,
    NotNegative,
    Positive,
    Probability,
    Seed,
    Time,
    WeakModel,
    at_most,
)


class GuidanceSection(Section):
    kind: str = Field("cfg", description="cfg, cfg++ (scale in [0, 1]), ...: `dic-repa parts guidance`")
    scale: NotNegative = Field(1.65, description="1: none; above: towards the class")
    interval: tuple[Time, Time] = Field((0.0, 0.7), description="when guidance acts: 0 is data, 1 is noise")
    channels: Count | None = Field(None, description="guide only this many first channels (DiT: 3); null: all")
    schedule: str = Field("constant", description="of the scale over the interval: constant, linear, cosine, ...")
    rescale: Probability = Field(0.0, description="how much the guided prediction keeps the class's contrast")
    doubled: Flag | None = Field(
        None, description="both predictions in one batch, faster, or one by one in half the memory; null: as it fits"
    )
    weak: WeakModel | None = Field(
        None,
        description="autoguidance, away from a weaker model: earlier (this run's earliest checkpoint), 0.25 (the one "
        "nearest to that share of the steps), step_00000250, ema-0.99 (another average), or a run or checkpoint; "
        "null: none",
    )
    internal: NotNegative = Field(
        1.0, description="scale of internal guidance, away from the denoiser's middle head; 1: none"
    )
    internal_interval: tuple[Time, Time] = Field((0.0, 1.0), description="when internal guidance acts")

    @model_validator(mode="before")
    @classmethod
    def _internal_alone(cls, given: Any):
        if isinstance(given, dict) and given.get("internal") is not None and "scale" not in given:
            return {"scale": 1.0, **given}  # the paper's own setting: the default of another guidance does not join it
        return given

    @model_validator(mode="after")
    def _interval_is_upright(self):
        for key in ("interval", "internal_interval"):
            low, high = getattr(self, key)
            if low >= high:
                raise ValueError(f"{key} must rise, not {[low, high]}")
        return self


class GridSection(Section):
    name: str = Field("uniform", description="uniform, shifted, karras, ...: `dic-repa parts time-grid`")
    options: dict[str, Any] = Field(default_factory=dict, description="its arguments: shift; rho, ratio_min, ratio_max")
    times: list[Time] | None = Field(None, description="the times themselves, falling; null: made by the grid")


_FOR_SOLVER: JsonDict = {"for": "solver"}


def for_solver(description: str) -> Any:
    """A key of `sample` that is an argument of the solver."""
    return Field(None, description=description, json_schema_extra=_FOR_SOLVER)


class SampleSection(Section):
    solver: str = Field("heun", description="a name from `dic-repa solvers`")
    steps: Annotated[Count, at_most("solver-steps")] | None = for_solver(
        "of a fixed-step solver; null: 50 for an ODE, 250 for an SDE or DDPM"
    )
    rtol: Positive | None = for_solver("relative tolerance of an adaptive solver; null: 1e-5")
    atol: Positive | None = for_solver("absolute tolerance of an adaptive solver; null: 1e-5")
    grid: GridSection | None = for_solver("where the steps are; null: uniform")
    diffusion: str | None = for_solver("how much noise an SDE adds, w(t); null: linear")
    diffusion_norm: Positive | None = for_solver("multiplies an SDE's w(t); null: 1")
    last_step: str | None = for_solver("how an SDE ends: mean, tweedie, euler, ...; null: mean")
    last_step_size: Time | None = for_solver("the time that an SDE's last step covers; null: 0.04")
    eta: Probability | None = for_solver("noise of ddim: 0 adds none, 1 as much as ddpm; null: 0")
    clip: Flag | None = for_solver("keep the data prediction of ddpm and ddim in [-1, 1]; null: false")
    options: dict[str, Any] | None = for_solver("arguments of a torchdiffeq method")
    guidance: GuidanceSection | None = Field(None, description="towards the class; null: none")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "fp32",
        description="of the denoiser, its weights cast once; the solver's state is float32 always. tf32: float32 with "
        "products that a GPU rounds, the decoder's too",
    )
    compile: Annotated[Literal["auto", "off", "blocks", "default", "reduce-overhead", "max-autotune"], OFF] = Field(
        "auto",
        description="mode of torch.compile; blocks: each block by itself, in less time; reduce-overhead: with CUDA "
        "graphs, on a GPU; auto: blocks for many images on a GPU, else off",
    )
    weights: Name = Field("ema", description="ema; raw: the model itself; or a further average, such as ema-0.999")
    num: Images = Field(50_000, description="how many images")
    classes: Literal["balanced", "random", "data"] = Field(
        "balanced",
        description="balanced: each as often as the others; random: drawn for each image (REPA, SiT, DiC); data: as "
        "often as in the training data",
    )
    pixels: Literal["round", "truncate"] = Field(
        "round", description="round: to the nearest of 256 levels (DiT, DiC); truncate: to the one below (REPA)"
    )
    batch_size: Batch = Field(64, description="images at once, in each process")
    decode_batch: Batch = Field(16, description="images that the autoencoder decodes at once")
    autoencoder: str | None = Field(
        None, description="where the autoencoder is now, a folder or a hub id; null: where it was in training"
    )
    seed: Seed = Field(0, description="all noise of an image comes from it and the image's index")

    @classmethod
    def solver_keys(cls) -> tuple[str, ...]:
        """The keys that are for the solver alone; null leaves a key to it."""
        return tuple(key for key, field in cls.model_fields.items() if field.json_schema_extra == _FOR_SOLVER)
