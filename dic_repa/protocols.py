"""What a part must have, whoever wrote it: one class for each kind that `dic-repa parts` lists.

B is the number of images; C, H, W are channels, height and width of the denoiser's data; N is the number of tokens, D
their width. Times t run from 0 (data) to 1 (noise). A recipe gives a part's options to what makes it: its class, or a
function. Kinds that say "the function itself" are not made: what is registered is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# What is trained


@runtime_checkable
class Denoiser(Protocol):
    """Made by `factory(in_channels, num_classes, **options)`. It is an `nn.Module` that derives from
    `dic_repa.models.Pretrained`, which saves and loads it. One that takes vectors or tokens has their kinds in its
    class's `conditions`, and an option `condition`."""

    config: dict[str, Any]  # what it was made with
    in_channels: int
    num_classes: int  # also the index of the null class; 0 where y is no class

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, /) -> Tensor:
        """x (B, C, H, W), t (B,), y (B, ...) to what the objective predicts: (B, C, H, W), or (B, 2C, H, W) with a
        variance."""
        ...


@runtime_checkable
class Block(Protocol):
    """A block of DiC, made by `factory(channels, condition_width, **options)`."""

    def __call__(self, x: Tensor, condition: Tensor, /) -> Tensor:
        """x (B, C, h, w) and the condition of this level (B, width) to (B, C, h, w)."""
        ...


# What it is trained on


@runtime_checkable
class Samples(Protocol):
    """Samples by index: what is trained on, and what is read once to fill a cache."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        """`x` (C, H, W), the denoiser's data; `image` (1 or 3, H, W), what an encoder sees; `label`, an int64 scalar.

        In place of the label `condition`, float, for a data set whose condition is a vector or tokens.

        Of latents `moments` instead of `x`; docs/extending.md says which may be left out.
        """
        ...


@runtime_checkable
class DataSet(Samples, Protocol):
    """Made by `factory(split, size, **options)`, with `path` and `autoencoder` where a recipe gives them.

    One whose samples are conditioned on something else than classes has a `dic_repa.conditions.Condition` as
    `condition`; it then needs no `num_classes` and `class_names`.
    """

    @property
    def channels(self) -> int:
        """Of the denoiser's data."""
        ...

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> Sequence[str]: ...


@runtime_checkable
class Autoencoder(Protocol):
    """Between images and latents, made by `factory(**options)`; frozen, in float32."""

    spec: Any  # a `dic_repa.data.autoencoders.AutoencoderSpec`: channels, pixels of a latent pixel, shift, scale

    @property
    def device(self) -> torch.device: ...

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to the posterior's mean and standard deviation, one behind the other,
        (B, 2C, h, w)."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """The denoiser's data (B, C, h, w), which is (latent - shift) * scale, to images in [0, 1]."""
        ...

    def to(self, device: torch.device | str) -> Autoencoder: ...


# What it is trained for


@runtime_checkable
class Objective(Protocol):
    """The loss of a step, made by `factory(**options)`; it runs the model itself."""

    path: Interpolant  # between noise and data, as the samplers go it

    def draw(
        self, shape: Sequence[int], generator: torch.Generator, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """All that is random, for a whole step's batch of `shape` (B, C, H, W): tensors (B, ...) by name."""
        ...

    def __call__(self, model: Any, batch: Any, /) -> Any:
        """A `dic_repa.objectives.Batch` to an `ObjectiveOutput`: each image's loss, and the model's projections."""
        ...

    def velocity_model(self, denoiser: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The denoiser as (x, t, y) -> velocity (B, C, H, W), which the samplers take."""
        ...


@runtime_checkable
class Interpolant(Protocol):
    """The path x_t = alpha x + sigma noise; derive from `dic_repa.interpolants.Interpolant`."""

    def coefficients(self, t: Tensor) -> Any:
        """alpha, sigma and their derivatives at times of any shape, as `Coefficients`."""
        ...

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is `ratio`."""
        ...


@runtime_checkable
class TimeSampling(Protocol):
    def __call__(self, count: int, generator: torch.Generator, path: Any, /) -> Tensor:
        """Training times (count,) in [0, 1], drawn where the generator lives; `path` is the `Interpolant`."""
        ...


@runtime_checkable
class LossWeighting(Protocol):
    unit: str | None  # 'noise', 'velocity', 'score' or 'data': whose error it is defined on; None: the prediction's

    def __call__(self, path: Any, t: Tensor, prediction: str, /) -> Tensor:
        """What the squared error of a `prediction` at times t (B,) counts, (B,)."""
        ...


# What it is aligned with


@runtime_checkable
class Encoder(Protocol):
    """A frozen network that turns images into a grid of tokens, the targets of the alignment.

    Frozen: always in eval mode, no parameter asks for a gradient, and the tokens carry none. Resizing and
    normalisation are inside, so that whoever calls it knows nothing of either.
    """

    embed_dim: int

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The rows and columns of tokens (h, w) for images of `size` (H, W), in pixels."""
        ...

    def __call__(self, images: Tensor, /) -> Tensor:
        """Images (B, 1 or 3, H, W), float in [0, 1], to tokens (B, h * w, embed_dim), row by row."""
        ...


@runtime_checkable
class Head(Protocol):
    """Made by `factory(channels, embed_dim, grid, **options)`; an `nn.Module`, which is trained."""

    def __call__(self, feature: Tensor, t: Tensor, /) -> Tensor:
        """A tapped feature map (B, channels, h, w) at times t (B,) to tokens (B, N, embed_dim); N counts the grid's."""
        ...


@runtime_checkable
class Target(Protocol):
    def __call__(self, tokens: Tensor, /) -> Tensor:
        """The encoder's tokens (B, N, D) to what the head's are compared with, (B, N, D)."""
        ...


@runtime_checkable
class AlignmentLoss(Protocol):
    def __call__(self, projection: Tensor, target: Tensor, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens (B, N, D) of both to the loss of each image (B,), and its terms (B,) by the log's names for them."""
        ...


@runtime_checkable
class TimeWeight(Protocol):
    def __call__(self, t: Tensor, /) -> Tensor:
        """What an alignment counts at times t (B,), (B,)."""
        ...


@runtime_checkable
class AlignmentSchedule(Protocol):
    """It may have `observe(similarity)`, which is told each pass's mean cosine similarity."""

    def __call__(self, step: int, /) -> float:
        """What an alignment counts at a step, from 0 on; at 0.0 the encoder is not run."""
        ...


# How it is optimised


@runtime_checkable
class Optimizer(Protocol):
    """What gives a `torch.optim.Optimizer`, such as its class; it may leave out `weight_decay` and `betas`.

    It should take `found_inf`, as torch's fused ones do: a step that must be skipped is then skipped on the device.
    """

    def __call__(self, parameters: Iterable[torch.nn.Parameter], /, lr: float, **options: Any) -> Any: ...


@runtime_checkable
class LearningRateSchedule(Protocol):
    def __call__(self, progress: float, /) -> float:
        """The factor of the learning rate, at 0 when the warm-up has ended to 1 at the run's last step."""
        ...


# How it is sampled


@runtime_checkable
class ODESolver(Protocol):
    """The function itself, or a class of such functions where it remembers earlier steps: a new object for each run.

    One that chooses its own steps is an object with `integrate(field, x, times, options, rtol, atol, every)`, which
    returns the states at `times[1:]`, and has `adaptive = True`.
    """

    def __call__(self, field: Any, x: Tensor, t: float, s: float, /) -> Tensor:
        """x (B, ...) taken from time t to time s; `field(x, t)` is the velocity, `field.data(x, t)` the prediction of
        the data."""
        ...


@runtime_checkable
class SDESolver(Protocol):
    """The function itself, or a class of such functions."""

    def __call__(self, sde: Any, x: Tensor, t: float, s: float, z: Tensor, /) -> Tensor:
        """x (B, ...) taken from time t to s < t with the standard normal noise z (B, ...) of this step.

        `sde.drift(x, t)` and `sde.noise(x, t, s, z)` are the terms of dx = drift dt + sqrt(w) dW, `sde.w(t)` is w.
        """
        ...


@runtime_checkable
class DDPMSolver(Protocol):
    """A class of such functions, with `process = "ddpm"` where it is not registered."""

    def __call__(
        self, schedule: Any, x: Tensor, data: Tensor, fraction: Tensor | None, i: int, /
    ) -> tuple[Tensor, Tensor | float]:
        """The mean at step i - 1 and the standard deviation of the noise that is added to it, from x (B, C, ...) at
        step i and its prediction of the data; 0.0 for none. `schedule` is a `BetaSchedule`, `fraction` the learnt
        variance's place."""
        ...


@runtime_checkable
class Guidance(Protocol):
    """Made by `factory(scale, interval, channels, schedule, rescale, doubled)`; derive from
    `dic_repa.samplers.Guidance`."""

    @property
    def active(self) -> bool:
        """Whether it does anything at all."""
        ...

    def bind(self, model: Any, y: Tensor, weak_model: Any = None) -> Any:
        """The guided velocity (x, t) -> (B, C, H, W) of a `model` (x, t, y) for the conditions y (B, ...)."""
        ...


@runtime_checkable
class GuidanceSchedule(Protocol):
    """The function itself."""

    def __call__(self, progress: Tensor, /) -> Tensor:
        """Share of the guidance's scale, both (B,) from 0 at the interval's noisy end to 1 at its other end."""
        ...


@runtime_checkable
class TimeGrid(Protocol):
    def __call__(self, steps: int, high: float, low: float, path: Any, /) -> list[float]:
        """`steps` + 1 times that fall from `high` to `low`, both of them included."""
        ...


@runtime_checkable
class DiffusionForm(Protocol):
    """The function itself."""

    def __call__(self, path: Any, t: float, norm: float, /) -> float:
        """w(t) of the reverse SDE dx = (v - w/2 score) dt + sqrt(w) dW; `norm` scales it."""
        ...


@runtime_checkable
class LastStep(Protocol):
    """The function itself."""

    def __call__(self, sde: Any, x: Tensor, t: float, /) -> Tensor:
        """The sample at t = 0 from the SDE's state x (B, ...) at a small t."""
        ...


# How it is measured and told of


@runtime_checkable
class Metric(Protocol):
    """A number about samples; derive from `dic_repa.evaluation.Metric`."""

    layer: str  # '<extractor>.<layer>': whose features it takes
    title: str  # of a table's column
    better: str  # 'lower' or 'higher'
    needs: str  # of the reference: 'gaussian' or 'features'; or 'labels'; or '' for nothing

    def __call__(self, features: Tensor, reference: Any, /) -> float | None:
        """The score of the samples' features (N, D) against what it needs: a `FeatureSet`, labels (N,), or None."""
        ...


@runtime_checkable
class FeatureExtractor(Protocol):
    """What a metric needs of a network; `layers` are the keys of what a call returns."""

    layers: tuple[str, ...]
    fingerprint: str  # of its weights
    resizing: str  # how it resizes, in words
    notes: tuple[str, ...]  # what a reader of its scores should know
    # And optionally `made_of`, a dict of what it was built with, for records.

    def __call__(self, images: Tensor, /) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1] to features (B, D), by layer."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """Who is told of a run besides metrics.jsonl."""

    def configure(self, values: Mapping[str, Any]) -> None:
        """Called first, with the recipe as a flat mapping."""
        ...

    def log(self, values: Mapping[str, Any], step: int) -> None: ...

    def log_picture(self, name: str, picture: Any, step: int) -> None:
        """`picture` is a PIL image."""
        ...

    def finish(self) -> None: ...
