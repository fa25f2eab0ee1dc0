"""Autoencoders between images and the denoiser's data: `dic_repa.protocols.Autoencoder` says what they have.

A name is 'none' (pixels), a registered one, an entry point, `package.module:factory`, or the local folder or hub id of
a `diffusers.AutoencoderKL`. The denoiser's data is x = (z - shift) * scale, with z drawn from the posterior.
"""

import contextlib
import functools
import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dic_repa.errors import UserError, first_line
from dic_repa.files.hashing import fingerprint
from dic_repa.files.hub import pin
from dic_repa.limits import check_limit
from dic_repa.protocols import Autoencoder
from dic_repa.registry import Registry

autoencoders = Registry("autoencoder", key="data.autoencoder")


@dataclass(frozen=True)
class AutoencoderSpec:
    """What the denoiser's data looks like: channels, image pixels per latent pixel, shift and scale of each channel."""

    name: str
    channels: int
    downsample: int
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    fingerprint: str = ""  # of the weights, if they are loaded

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

    def same_weights(self, other: "AutoencoderSpec") -> bool:
        """Whether both are the same autoencoder, by fingerprint if both have one, else by all but the name."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint == other.fingerprint
        return replace(self, name="", fingerprint="") == replace(other, name="", fingerprint="")

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


_SD_VAE: dict[str, Any] = {"channels": 4, "downsample": 8, "shift": (0.0,) * 4, "scale": (0.18215,) * 4}
# What the papers use: known without their config, so that existing latents train on a machine with no network.
_KNOWN = {name: AutoencoderSpec(name, **_SD_VAE) for name in ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse")}


def load_autoencoder(name: str, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder `name`; diffusers' weights must be safetensors, with ':SUBFOLDER' after the name for a pipeline.

    Raises:
        UserError: says what is missing and where to put it.
    """
    return _loaded(name).to(device)


@functools.lru_cache(maxsize=2)
def _loaded(name: str) -> Autoencoder:  # once, though both training data and sampling ask for it
    if not _is_part(name):
        return KLAutoencoder(name)
    autoencoder = autoencoders.create(name)
    autoencoders.check_has(name, autoencoder, ("spec", "encode", "decode", "device", "to"))
    autoencoder.spec = replace(autoencoder.spec, name=name)  # data and checkpoints find it by this name
    return autoencoder


def _is_part(name: str) -> bool:
    """Whether `name` is registered or `package.module:factory`, not a place of diffusers' files."""
    is_factory = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) and not Path(name.partition(":")[0]).is_dir()
    return bool(name in autoencoders or is_factory)


def load_spec(name: str) -> AutoencoderSpec:
    """The spec of an autoencoder, without loading diffusers' weights."""
    if name in _KNOWN:
        return _KNOWN[name]
    if _is_part(name):
        return _loaded(name).spec
    from diffusers import AutoencoderKL

    with _diffusers_place(name) as (place, options):
        return _read_spec(name, AutoencoderKL.load_config(place, **options))


@autoencoders.register("none")
class Pixels:
    """No autoencoder: the denoiser's data is the image in [-1, 1]."""

    spec = AutoencoderSpec("none", 3, 1, (0.5,) * 3, (2.0,) * 3)
    device = torch.device("cpu")

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([images, torch.zeros_like(images)], dim=1)

    def decode(self, x: Tensor) -> Tensor:
        return self.spec.denormalise(x.float()).clamp(0, 1)

    def to(self, device: torch.device | str) -> "Pixels":
        return self


class KLAutoencoder:
    """`diffusers.AutoencoderKL`, frozen, in float32: its float16 decoder overflows for some weights."""

    def __init__(self, name: str):
        from diffusers import AutoencoderKL

        with _diffusers_place(name) as (place, options):
            spec = _read_spec(name, AutoencoderKL.load_config(place, **options))  # before it is built
            self.model = AutoencoderKL.from_pretrained(place, use_safetensors=True, **options)
        self.model.eval().requires_grad_(False)
        state = self.model.state_dict()
        weights = (part for key in sorted(state) for part in (key, state[key].float()))
        self.spec = replace(spec, fingerprint=fingerprint(json.dumps([spec.shift, spec.scale]), *weights))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: torch.device | str) -> "KLAutoencoder":
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        posterior = self.model.encode(images.float() * 2 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        z = self.spec.denormalise(x.float()).to(self.device)
        return (self.model.decode(z).sample / 2 + 0.5).clamp(0, 1)


def _read_spec(name: str, config: dict) -> AutoencoderSpec:
    if Path(name).is_dir():
        name = str(Path(name).resolve())  # a prepared data set is read from other folders than it was made in
    channels, widths, layers = (
        config["latent_channels"],
        config["block_out_channels"],
        config.get("layers_per_block", 1),
    )
    check_limit("blocks", len(widths) * layers, f"the number of blocks of the autoencoder {name}")
    largest = 4 * 9 * max(widths) * max(*widths, 2 * channels)  # bytes of a convolution
    check_limit("memory", largest, f"the size of a layer of the autoencoder {name} in bytes")
    scale, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
    shifts, scales = (shift,) * channels, (scale,) * channels
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shifts = tuple(float(mean) for mean in config["latents_mean"])
        scales = tuple(scale / float(std) for std in config["latents_std"])
    spec = AutoencoderSpec(name, channels, 2 ** (len(widths) - 1), shifts, scales)
    AutoencoderSpec.from_dict(spec.to_dict())
    return spec


@contextlib.contextmanager
def _diffusers_place(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The folder or hub id in `name`, and the subfolder and revision as diffusers' options; in the block, diffusers'
    errors, many lines long, become one line that says what to get and where to put it.
    """
    from diffusers.utils import logging

    place, _, subfolder = (name, "", "") if Path(name).is_dir() else name.partition(":")
    options: dict[str, Any] = {"subfolder": subfolder or None}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # About an argument that diffusers itself passes to the hub's client.
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
            if not Path(place).is_dir() and place.count("/") == 1:
                place, options["revision"] = pin(place)
            yield place, options
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ArithmeticError) as error:
        files = "config.json and diffusion_pytorch_model.safetensors"
        if Path(place).is_dir():
            found = first_line(error)
            message = f"{place} holds no autoencoder: it takes {files} of diffusers.AutoencoderKL ({found})"
        elif place.startswith((".", "/", "~")) or place.count("/") != 1:
            message = f"there is no autoencoder '{place}': name a local folder or a hub id"
        else:
            where = f"https://huggingface.co/{place}/tree/main/{subfolder}".rstrip("/")
            message = (
                f"the autoencoder {name} cannot be fetched from the hub; download {files} from {where} into a folder "
                "and name that folder in its place"
            )
        raise UserError(message) from None
    finally:
        logging.set_verbosity(verbosity)


@autoencoders.register("lite-vae")
def lite_vae() -> KLAutoencoder:
    """The small autoencoder in the package (4 channels, 4x4 pixels a latent pixel), which `train_autoencoder` made."""
    return KLAutoencoder(str(resources.files("dic_repa.data").joinpath("assets/lite-vae")))
