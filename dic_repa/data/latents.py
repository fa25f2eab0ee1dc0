"""From what a data set stores to what the denoiser is trained on.

A sample has `x`; or `moments`, the mean and standard deviation of the autoencoder's posterior in one tensor (or the
latents alone, of an autoencoder without one); or only an `image`, which the training step encodes, or whose pixels are
the data.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dic_repa.data.autoencoders import AutoencoderSpec, LatentStatistics, load_autoencoder
from dic_repa.data.autoencoders.spec import PER_CHANNEL, SCALING_FACTOR
from dic_repa.errors import UserError
from dic_repa.files.pictures import unit_images
from dic_repa.protocols import Autoencoder, Samples

ENCODE_BATCH = 32  # images encoded at once in a training step, also if its batch is larger
MEAN_OF = 4096  # samples that the data's mean is taken of: its error is a 64th of the data's spread


class LatentDataset(Dataset):
    """Base of the data sets behind an autoencoder; its weights are loaded when they are first used.

    Attributes: `spec`, `channels` of x, `size` of x, `num_classes`, `class_names`, `autoencoder`. Without classes,
    `num_classes` is 0 and every label 0: the null class.
    """

    spec: AutoencoderSpec
    size: int
    class_names: tuple[str, ...]
    default_autoencoder: str = "none"
    stored: bool = True  # False: take the latents of the images, though moments are stored
    with_images: bool = True  # False: if there are moments, leave out the images, which no encoder needs

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def channels(self) -> int:
        return self.spec.channels

    @property
    def statistics(self) -> LatentStatistics:
        """Of the latents, for `latent.normalise: per-channel`; a UserError says what to do where there are none."""
        raise UserError(
            "latent.normalise=per-channel takes the statistics of a data set that `dic-repa prepare` has made; prepare "
            "the data, or set latent.normalise=scaling-factor"
        )

    def normalise(self, how: str) -> None:
        """Make latents the denoiser's data as `how` says (`AutoencoderSpec.normalised`); a UserError for pixels."""
        if how != SCALING_FACTOR and self.spec.name == "none":
            raise UserError(f"latent.normalise={how} is for latents, and the data are pixels; leave it out")
        self.spec = self.spec.normalised(how, self.statistics if how == PER_CHANNEL else None)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @classmethod
    def autoencoder_of(cls, path: str) -> str:
        """The name of the autoencoder behind the data at `path`, for a recipe that names none."""
        return cls.default_autoencoder

    @cached_property
    def autoencoder(self) -> Autoencoder:
        loaded = load_autoencoder(self.spec.name)
        if self.spec.fingerprint and loaded.spec.fingerprint != self.spec.fingerprint:
            raise UserError(
                f"the weights of {self.spec.name} are not those that the data was prepared with; "
                "name the right ones as data.autoencoder"
            )
        return loaded

    def encode_by(self, spec: AutoencoderSpec) -> None:
        """Take the latents that another autoencoder makes of the images, in place of those that are stored."""
        self.spec, self.stored = spec, False
        vars(self).pop("autoencoder", None)

    def check_size(self, size: int, found: int, what: str) -> None:
        if size != found:
            kind = "pixels" if self.spec.name == "none" else f"latents of {self.spec.name}"
            raise UserError(
                f"data.size is {size}, but {what} holds {found}x{found} {kind}; set data.size={found}, "
                "or prepare the data again"
            )


def data_shape(data: Samples) -> tuple[int, int, int]:
    """(C, H, W) of the denoiser's data."""
    if isinstance(data, LatentDataset):
        return data.channels, data.size, data.size
    channels, height, width = data[0]["x"].shape
    return channels, height, width


def denoiser_data(data: Any, batch: dict[str, Tensor], noise_like: Callable[[Tensor], Tensor]) -> Tensor:
    """The denoiser's data (B, C, H, W) of a batch: z = mean + std * noise, x = (z - shift) * scale; without an
    autoencoder, the pixels in [-1, 1]. `noise_like(mean)` draws the noise of the posterior, if there is one.
    """
    if "x" in batch:
        return batch["x"]
    if "moments" in batch and getattr(data, "stored", True):
        moments = batch["moments"].float()
    elif data.spec.name == "none":
        return unit_images(batch["image"]) * 2 - 1
    else:
        autoencoder = data.autoencoder.to(batch["image"].device)
        moments = torch.cat([autoencoder.encode(unit_images(part)) for part in batch["image"].split(ENCODE_BATCH)])
    return data.spec.normalise(data.spec.draw(moments, noise_like))


def data_mean(data: Any, device: torch.device | str = "cpu", count: int = MEAN_OF) -> Tensor:
    """The mean (C, H, W) of the denoiser's data over `count` samples, evenly spread (all, if they are fewer); of
    latents, that of the posterior's means."""
    chosen = torch.linspace(0, len(data) - 1, min(count, len(data))).round().long().tolist()
    total = torch.zeros(data_shape(data), dtype=torch.float64)
    for batch in DataLoader(Subset(data, chosen), batch_size=ENCODE_BATCH):
        x = denoiser_data(data, {name: value.to(device) for name, value in batch.items()}, torch.zeros_like)
        total += x.cpu().double().sum(dim=0)
    return (total / len(chosen)).float()


def global_noise(batch_size: int, rows: slice, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Draws noise for the global `batch_size`, like one process's share of it, and cuts it to that process's `rows`."""
    return lambda like: torch.randn((batch_size, *like.shape[1:]), generator=generator, device=like.device)[rows]
