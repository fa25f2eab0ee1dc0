"""What a part must have: one class for each kind that `dic-repa parts` lists.

B is the number of images; C, H, W are channels, height and width of the denoiser's data; N is the number of tokens, D
their width. Times t run from 0 (data) to 1 (noise). A recipe gives a part's options to the class or function that makes
it. Guidance schedules, diffusion forms and last steps are not made: the registered function itself is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# What is trained
class Denoiser(Protocol):
    """An `nn.Module` that derives from `dic_repa.models.Pretrained`, made by `factory(in_channels, num_classes,
    **options)`. One that takes vectors or tokens lists these kinds in its class's `conditions`, and has an option
    `condition`."""

    config: dict[str, Any]  # what it was made with
    in_channels: int
    num_classes: int  # also the index of the null class; 0 if y is no class

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, /) -> Tensor:
        """From x (B, C, H, W), t (B,), y (B, ...) to the prediction (B, C, H, W), or (B, 2C, H, W) with a variance or a
        middle head's prediction."""


class Block(Protocol):
    def __call__(self, x: Tensor, condition: Tensor, /) -> Tensor:
        """From x (B, in_channels, h, w) and this level's condition (B, condition_width) to (B, channels, h, w): a block
        of DiC, made by `factory(in_channels, channels, condition_width)`."""


# What it is trained on
class Samples(Protocol):
    """Samples by index: what is trained on, and what is read once to fill a cache."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        """`x` (C, H, W), the denoiser's data, or `moments` for latents; `image` (1 or 3, H, W), what an encoder sees;
        `label`, an int64 scalar, or float `condition`. docs/extending.md says which may be left out."""


class DataSet(Samples, Protocol):
    """Made by `factory(split, size, **options)`, with `path` and `autoencoder` if the recipe has them. Without
    classes, it has a `dic_repa.conditions.Condition` as `condition` instead of the two last. One that also has
    `labels`, the class number of each picture, can be sampled with `sample.classes: data`; one that has a
    `permutation(generator)` decides the order of an epoch, (len(self),)."""

    channels: int  # of the denoiser's data
    num_classes: int
    class_names: Sequence[str]


class Autoencoder(Protocol):
    """Between images and latents, made by `factory(**options)`; frozen, in float32. It may have `licence`, that of its
    weights, or `card`, what a list says of it (`dic_repa.data.autoencoders.AutoencoderCard`), or `image_size`, the only
    height and width of images that it takes."""

    spec: Any  # a `dic_repa.data.autoencoders.AutoencoderSpec`: channels, pixels of a latent pixel, shift, scale

    @property
    def device(self) -> torch.device: ...

    def encode(self, images: Tensor) -> Tensor:
        """From images (B, 3, H, W) in [0, 1] to the posterior's mean, then standard deviation, (B, 2C, h, w); or to the
        latents alone, (B, C, h, w), if its spec says `stochastic=False`."""

    def decode(self, x: Tensor) -> Tensor:
        """From the denoiser's data (B, C, h, w), which is (latent - shift) * scale, to images in [0, 1]."""

    def to(self, device: torch.device | str) -> Autoencoder: ...


# What it is trained for
class Objective(Protocol):
    """The loss of a step, made by `factory(**options)`; it runs the model itself. With a `check_denoiser(denoiser)` it
    may refuse one before training begins."""

    path: Interpolant  # between noise and data; the samplers follow it

    def draw(
        self, shape: Sequence[int], generator: torch.Generator, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """All that is random, for a whole step's batch of `shape` (B, C, H, W): tensors (B, ...) by name."""

    def __call__(self, model: Any, batch: Any, /) -> Any:
        """A `dic_repa.objectives.Batch` to an `ObjectiveOutput`: each image's loss, and the model's projections."""

    def velocity_model(self, denoiser: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The denoiser as (x, t, y) -> velocity (B, C, H, W), which the samplers take."""


class Interpolant(Protocol):
    """The path x_t = alpha x + sigma noise; derive from `dic_repa.interpolants.Interpolant`."""

    def coefficients(self, t: Tensor) -> Any:
        """alpha, sigma and their derivatives at times of any shape, as `Coefficients`."""

    def time_at_ratio(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is `ratio`."""


class TimeSampling(Protocol):
    def __call__(self, count: int, generator: torch.Generator, path: Any, /) -> Tensor:
        """Training times (count,) in [0, 1], on the generator's device; `path` is the `Interpolant`."""


class LossWeighting(Protocol):
    unit: str | None  # its error is that of 'noise', 'velocity', 'score' or 'data'; None: of the prediction itself

    def __call__(self, path: Any, t: Tensor, prediction: str, /) -> Tensor:
        """The factor (B,) of a `prediction`'s squared error at times t (B,)."""


# What it is aligned with
class Encoder(Protocol):
    """A frozen network (eval mode, no gradients) that turns images into the alignment's targets; it resizes itself."""

    embed_dim: int

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The rows and columns of tokens (h, w) for images of `size` (H, W), in pixels."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """From images (B, 1 or 3, H, W), float in [0, 1], to tokens (B, h * w, embed_dim), row by row."""


class Teacher(Protocol):
    """Targets from the denoiser itself, in place of an encoder's; made by `factory(**options)`.

    They are those of the pass that is trained; or, if it has `earlier(uniform)`, of a pass of the averaged weights with
    less noise: by how much time (B,), from random numbers (B,) in [0, 1).
    """

    tap: str  # the submodule whose feature map is the target


class Head(Protocol):
    def __call__(self, feature: Tensor, t: Tensor, /) -> Tensor:
        """From a tapped feature map (B, channels, h, w) at times t (B,) to the grid's tokens (B, N, embed_dim). It is
        an `nn.Module`, which is trained, made by `factory(channels, embed_dim, grid, **options)`."""


class Target(Protocol):
    def __call__(self, tokens: Tensor, /) -> Tensor:
        """From the encoder's tokens (B, N, D) to those that the head's are compared with, (B, N, D)."""


class AlignmentLoss(Protocol):
    def __call__(self, projection: Tensor, target: Any, /) -> tuple[Tensor, dict[str, Tensor]]:
        """From tokens (B, N, D) of both to each image's loss (B,), and its terms (B,) by their names in the log. One
        that compares with nothing has `needs_target = False`, and its target is None."""


class TimeWeight(Protocol):
    def __call__(self, t: Tensor, /) -> Tensor:
        """The factor (B,) of an alignment at times t (B,)."""


class AlignmentSchedule(Protocol):
    def __call__(self, step: int, /) -> float:
        """The factor of an alignment at a step, from 0 on; at 0.0 the encoder is not run. `observe(similarity)`, if
        there is one, is called with the mean cosine similarity of each pass."""


# How it is optimised
class Optimizer(Protocol):
    """A `torch.optim.Optimizer`, made by `factory(parameters, lr=..., **options)`; it may lack `weight_decay` and
    `betas`, and is given the `model` if it takes that. It should take `found_inf`, as torch's fused ones do: a step
    that must be skipped is then skipped on the device."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def zero_grad(self) -> None: ...


class LearningRateSchedule(Protocol):
    def __call__(self, progress: float, /) -> float:
        """The factor of the learning rate; progress is 0 at the end of the warm-up and 1 at the run's last step."""


# How it is sampled
class ODESolver(Protocol):
    """The function itself, or a class of such functions if it remembers earlier steps: a new object for each run. One
    that chooses its own steps is an object with `integrate(field, x, times, options, rtol, atol, every)`, which returns
    the states at `times[1:]`, and has `adaptive = True`."""

    def __call__(self, field: Any, x: Tensor, t: float, s: float, /) -> Tensor:
        """From x (B, ...) at time t to x at s; `field(x, t)` is the velocity, `field.data(x, t)` the predicted data."""


class SDESolver(Protocol):
    def __call__(self, sde: Any, x: Tensor, t: float, s: float, z: Tensor, /) -> Tensor:
        """From x (B, ...) at time t to x at s < t, with the standard normal noise z (B, ...) of this step; the function
        itself, or a class of such functions. `sde.drift(x, t)` and `sde.noise(x, t, s, z)` are the terms of
        dx = drift dt + sqrt(w) dW, `sde.w(t)` is w."""


class DDPMSolver(Protocol):
    def __call__(
        self, schedule: Any, x: Tensor, data: Tensor, fraction: Tensor | None, i: int, /
    ) -> tuple[Tensor, Tensor | float]:
        """From x (B, C, ...) at step i and its predicted data to the mean at step i - 1 and the standard deviation of
        the noise to add, 0.0 for none. `schedule` is a `BetaSchedule`, `fraction` the learnt variance's place. It is a
        class of such functions, with `process = "ddpm"` if it is not registered."""


class Guidance(Protocol):
    """Made as `dic_repa.samplers.Guidance` is; derive from it."""

    active: bool  # whether it does anything at all

    def bind(self, model: Any, y: Tensor, weak_model: Any = None) -> Any:
        """The guided velocity (x, t) -> (B, C, H, W) of a `model` (x, t, y) for the conditions y (B, ...)."""


class GuidanceSchedule(Protocol):
    def __call__(self, progress: Tensor, /) -> Tensor:
        """Share of the guidance's scale, (B,); both run from 0 at the interval's noisy end to 1 at its other end."""


class TimeGrid(Protocol):
    def __call__(self, steps: int, high: float, low: float, path: Any, /) -> list[float]:
        """`steps` + 1 times that fall from `high` to `low`, both included."""


class DiffusionForm(Protocol):
    def __call__(self, path: Any, t: float, norm: float, /) -> float:
        """w(t) of the reverse SDE dx = (v - w/2 score) dt + sqrt(w) dW; `norm` scales it."""


class LastStep(Protocol):
    def __call__(self, sde: Any, x: Tensor, t: float, /) -> Tensor:
        """The sample at t = 0 from the SDE's state x (B, ...) at a small t."""


# How it is measured and reported
class Metric(Protocol):
    """A number about samples; derive from `dic_repa.evaluation.Metric`."""

    layer: str  # '<extractor>.<layer>': whose features it takes
    title: str  # of a table's column
    better: str  # 'lower' or 'higher'
    needs: str  # of the reference: 'gaussian' or 'features'; or 'labels'; or '' for nothing

    def __call__(self, features: Tensor, reference: Any, /) -> float | None:
        """The score of the samples' features (N, D) against what it needs: a `FeatureSet`, labels (N,), or None."""


class FeatureExtractor(Protocol):
    """What a metric needs of a network; it may have `made_of`, a dict of what it was built with, for records."""

    layers: tuple[str, ...]  # the keys of what a call returns
    fingerprint: str  # of its weights
    resizing: str  # how it resizes, in words
    notes: tuple[str, ...]  # what a reader of its scores should know

    def __call__(self, images: Tensor, /) -> dict[str, Tensor]:
        """From images (B, 3, H, W) in [0, 1] to features (B, D), by layer."""


class Tracker(Protocol):
    """Gets a run's numbers and pictures besides metrics.jsonl."""

    def configure(self, values: Mapping[str, Any]) -> None: ...  # called first, with the recipe as a flat mapping

    def log(self, values: Mapping[str, Any], step: int) -> None: ...

    def log_picture(self, name: str, picture: Any, step: int) -> None: ...  # `picture` is a PIL image

    def finish(self) -> None: ...
