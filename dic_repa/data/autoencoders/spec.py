"""What is known of an autoencoder without its weights: its latents' shape, and how they become the denoiser's data."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from dic_repa.errors import UserError

SCALING_FACTOR, PER_CHANNEL, NO_NORMALISATION = "scaling-factor", "per-channel", "none"


@dataclass(frozen=True)
class LatentStatistics:
    """The mean and standard deviation of each channel of a data set's latents z, over all images and places."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class AutoencoderSpec:
    """What the denoiser's data looks like: channels, image pixels per latent pixel, shift and scale of each channel."""

    name: str
    channels: int
    downsample: int
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    fingerprint: str = ""  # of the weights, if they are loaded
    stochastic: bool = True  # whether an image's latents are drawn from a posterior; else they are its mean
    normalisation: str = SCALING_FACTOR  # where shift and scale are from: the autoencoder, the data, or neither

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict) -> "AutoencoderSpec":
        """From a record. A ValueError, which may be pydantic's, if it is damaged."""
        from pydantic import TypeAdapter

        spec = TypeAdapter(cls).validate_python(content)
        per_channel = all(len(values) in (1, spec.channels) for values in (spec.shift, spec.scale))
        finite = all(map(math.isfinite, spec.shift + spec.scale)) and all(spec.scale)
        if spec.channels < 1 or spec.downsample < 1 or not per_channel or not finite:
            raise ValueError("its autoencoder has impossible channels, downsample, shift or scale")
        return spec

    @property
    def moments(self) -> int:
        """Channels of what `encode` gives: the posterior's mean and standard deviation, or the latents alone."""
        return self.channels * (2 if self.stochastic else 1)

    def same_weights(self, other: "AutoencoderSpec") -> bool:
        """Whether both are the same autoencoder, by fingerprint if both have one, else by all that the autoencoder
        itself decides."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint == other.fingerprint
        shapes = [(spec.channels, spec.downsample, spec.stochastic) for spec in (self, other)]
        if {self.normalisation, other.normalisation} != {SCALING_FACTOR}:  # shift and scale are not its own
            return shapes[0] == shapes[1]
        return shapes[0] == shapes[1] and (self.shift, self.scale) == (other.shift, other.scale)

    def normalised(self, how: str, statistics: LatentStatistics | None = None) -> "AutoencoderSpec":
        """The same, with the shift and scale that `how` names: 'scaling-factor', this autoencoder's own;
        'per-channel', by the data's `statistics` to mean 0 and standard deviation 1; 'none': 0 and 1."""
        if how == SCALING_FACTOR:
            return self
        if how == NO_NORMALISATION:
            shift, scale = (0.0,) * self.channels, (1.0,) * self.channels
        else:
            assert statistics is not None
            shift = statistics.mean
            scale = tuple(1 / std if std else 1.0 for std in statistics.std)  # of a channel that never changes
        if len(shift) != self.channels:
            raise UserError(f"the statistics are of {len(shift)} channels, and {self.name} has {self.channels}")
        return replace(self, shift=shift, scale=scale, normalisation=how)

    def mean(self, moments: Tensor) -> Tensor:
        """The latents' mean (B, C, h, w) of what `encode` gives."""
        return moments.chunk(2, dim=1)[0] if self.stochastic else moments

    def draw(self, moments: Tensor, noise_like: Callable[[Tensor], Tensor]) -> Tensor:
        """Latents (B, C, h, w) of what `encode` gives: mean + std * noise, with `noise_like(mean)`."""
        if not self.stochastic:
            return moments
        mean, std = moments.chunk(2, dim=1)
        return mean + std * noise_like(mean)

    def normalise(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) to the denoiser's data: (z - shift) * scale."""
        return (z - self._per_channel(self.shift, z)) * self._per_channel(self.scale, z)

    def denormalise(self, x: Tensor) -> Tensor:
        """The denoiser's data to latents: x / scale + shift."""
        return x / self._per_channel(self.scale, x) + self._per_channel(self.shift, x)

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor | float:
        if len(set(values)) == 1:  # a number, since a copy to a GPU would wait for all that is under way there
            return values[0]
        return torch.tensor(values, dtype=like.dtype).view(-1, 1, 1).to(like.device, non_blocking=True)
