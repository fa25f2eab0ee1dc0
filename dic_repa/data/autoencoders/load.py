"""An autoencoder, its spec and its card, found by the name that a recipe or a record has."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dic_repa.data.autoencoders.base import AutoencoderCard, autoencoders
from dic_repa.data.autoencoders.diffusers_models import open_diffusers, read_diffusers_spec
from dic_repa.data.autoencoders.spec import AutoencoderSpec
from dic_repa.protocols import Autoencoder

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
        return open_diffusers(name)
    autoencoder = autoencoders.create(name)
    autoencoders.check_has(name, autoencoder, ("spec", "encode", "decode", "device", "to"))
    autoencoder.spec = replace(autoencoder.spec, name=name)  # data and checkpoints find it by this name
    return autoencoder


def _is_part(name: str) -> bool:
    """Whether `name` is registered, of a family, or `package.module:factory`, not a place of diffusers' files."""
    family = name.partition(":")[0]
    is_factory = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) and not Path(family).is_dir()
    return bool(name in autoencoders or f"{family}:" in autoencoders or is_factory)


def load_spec(name: str) -> AutoencoderSpec:
    """The spec of an autoencoder, without loading diffusers' weights."""
    if name in _KNOWN:
        return _KNOWN[name]
    return _loaded(name).spec if _is_part(name) else read_diffusers_spec(name)


def autoencoder_card(name: str) -> AutoencoderCard:
    """The card of a registered autoencoder; one that has none is built, without options, and measured."""
    card = autoencoders.fact(name, "card")
    if card is None:
        autoencoder = load_autoencoder(name)
        spec, model = autoencoder.spec, getattr(autoencoder, "model", autoencoder)
        count = sum(p.numel() for p in model.parameters()) if isinstance(model, torch.nn.Module) else 0
        licence = getattr(autoencoder, "licence", "-")
        card = AutoencoderCard(spec.channels, spec.downsample, count / 1e6, licence, type(autoencoder).__module__)
    return card
