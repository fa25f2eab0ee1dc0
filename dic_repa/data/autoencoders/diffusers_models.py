"""Autoencoders of diffusers, from a local folder or a hub id: config.json and safetensors."""

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dic_repa.data.autoencoders.spec import AutoencoderSpec
from dic_repa.errors import UserError, first_line
from dic_repa.files.hashing import fingerprint
from dic_repa.files.hub import pin
from dic_repa.limits import check_limit


def open_diffusers(name: str) -> "KLAutoencoder":
    """The autoencoder in the folder or of the hub id `name`."""
    return KLAutoencoder(name)


def read_diffusers_spec(name: str) -> AutoencoderSpec:
    """Its spec, without its weights."""
    from diffusers import AutoencoderKL

    with _diffusers_place(name) as (place, options):
        return _read_spec(name, AutoencoderKL.load_config(place, **options))


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
