"""An autoencoder, its spec and its card, found by the name that a recipe or a record has."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import torch

from dic_repa.data.autoencoders.base import AutoencoderCard, autoencoders
from dic_repa.data.autoencoders.diffusers_models import FAMILY, open_diffusers, read_diffusers_spec
from dic_repa.data.autoencoders.ldm import is_ldm_file, open_ldm
from dic_repa.data.autoencoders.published import PUBLISHED
from dic_repa.data.autoencoders.spec import AutoencoderSpec
from dic_repa.errors import UserError
from dic_repa.files.hub import is_hub_id
from dic_repa.protocols import Autoencoder

# What the papers use, by its hub id as recipes have it: known without its config, so that existing latents train on a
# machine with no network.
_KNOWN = {row.source: row.spec(row.source) for row in (PUBLISHED["sd-vae-ft-ema"], PUBLISHED["sd-vae-ft-mse"])}


def load_autoencoder(name: str, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder `name`: a registered one, one of your own, a folder or hub id of diffusers' files (':SUBFOLDER'
    behind it for a pipeline), or a file of LDM's layout. No weights are unpickled.

    Raises:
        UserError: says what is missing and where to put it.
    """
    return _loaded(name).to(device)


@functools.lru_cache(maxsize=2)
def _loaded(name: str) -> Autoencoder:  # once, though both training data and sampling ask for it
    if is_ldm_file(name):
        return open_ldm(name)
    if not _is_part(name):
        return open_diffusers(name)
    autoencoder = autoencoders.create(name)
    autoencoders.check_has(name, autoencoder, ("spec", "encode", "decode", "device", "to"))
    autoencoder.spec = replace(autoencoder.spec, name=name)  # data and checkpoints find it by this name
    return autoencoder


def _is_part(name: str) -> bool:
    """Whether `name` is registered, of a family, or `package.module:factory`, not a place of diffusers' files. A folder
    that is named as a published autoencoder is such a place."""
    family = name.partition(":")[0]
    if family + ":" == FAMILY or (name in PUBLISHED and Path(name).is_dir()):
        return False
    is_factory = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) and not Path(family).is_dir()
    return bool(name in autoencoders or f"{family}:" in autoencoders or is_factory)


def is_from_hub(name: str) -> bool:
    """Whether `name` is one whose weights are taken from the hub."""
    if name in PUBLISHED:
        return not Path(name).is_dir()
    place = name.removeprefix(FAMILY).partition(":")[2] if name.startswith(FAMILY) else name
    return is_hub_id(place.partition(":")[0])


def load_spec(name: str) -> AutoencoderSpec:
    """The spec of an autoencoder, without loading diffusers' weights; of one in the table of published ones, what is
    known without its files where these are not here."""
    if name in _KNOWN:
        return _KNOWN[name]
    if is_ldm_file(name):
        return _loaded(name).spec
    if not _is_part(name):
        return read_diffusers_spec(name)
    row = PUBLISHED.get(name)
    if row and row.scaling_factor is not None:
        return row.spec(name)
    try:
        return _loaded(name).spec
    except UserError:
        if row:
            return row.spec(name)
        raise


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
