"""The denoisers by name, and a saved one whatever its class.

    create_denoiser("SiT-XL/2", in_channels=4, num_classes=1000)
    load_denoiser("runs/mine/checkpoints/step_00400000/ema")

A name is one of the papers' presets; a family (such as DiC, SiT or DiCo), whose sizes are options; `diffusers:` and one
of its classes, such as diffusers:UNet2DModel; or any that a `Registry` takes. `dic_repa.protocols.Denoiser` says what
your own must have. If its hidden states are tokens, its `feature_map(tokens, size)` makes maps of them, so that they
can be tapped.
"""

import fnmatch
from pathlib import Path

import torch

from dic_repa.conditions import create_condition
from dic_repa.errors import MISTAKES, UserError, first_line
from dic_repa.files.weights import check_memory
from dic_repa.models.diffusers_network import from_diffusers
from dic_repa.models.diffusers_source import FAMILY
from dic_repa.models.presets import FAMILIES, PRESETS, Counts, Preset
from dic_repa.models.pretrained import Pretrained, saved_kind
from dic_repa.registry import Registry

denoisers = Registry("denoiser", modules=["dic_repa.models.*"], key="model.name")
register_denoiser = denoisers.register
"""Decorator that registers its class as the denoiser of this name."""


for _name, _preset in {**FAMILIES, **PRESETS}.items():
    _sizes = ", ".join(f"{key}={value}" for key, value in _preset.options.items())
    register_denoiser(_name, description=f"{_preset.kind}: {_sizes or 'of sizes that its options give'}")(_preset)
register_denoiser(FAMILY)(from_diffusers)


def list_denoisers(pattern: str = "*") -> list[str]:
    """The names that need no further options and match a shell `pattern`: presets in the papers' order, then others."""
    ours = {*FAMILIES, *PRESETS, FAMILY}
    return fnmatch.filter(PRESETS, pattern) + sorted(set(denoisers.names(pattern)) - ours)


def preset_latent(name: str) -> tuple[int, int] | None:
    """Channels and size (height and width) of the latents of 256 px that a preset is for; None for the papers' own."""
    return PRESETS[name].latent if name in PRESETS else None


def preset_counts(name: str) -> Counts | None:
    """What the source of a preset counts; None for what is no preset, or has no such number."""
    return PRESETS[name].counts if name in PRESETS else None


def presets_of(family: str) -> list[str]:
    """The presets of a family, but not those of another family whose name begins alike, as SiT-down's does."""
    others = tuple(f"{other}-" for other in FAMILIES if other.startswith(f"{family}-"))
    return [name for name in fnmatch.filter(PRESETS, f"{family}-*") if not name.startswith(others)]


def preset_heads(family: str, width: int, depth: int) -> int:
    """The attention heads of the papers' preset of that width and depth; if there is none, one for 64 channels."""
    presets = [PRESETS[name].options for name in presets_of(family)]
    heads = [preset["num_heads"] for preset in presets if (preset["width"], preset["depth"]) == (width, depth)]
    return heads[0] if heads else max(1, width // 64)


def create_denoiser(name: str, in_channels: int = 4, num_classes: int = 1000, **options) -> Pretrained:
    """The denoiser `name`, with new weights, for data of that many channels and classes.

    Args:
        options: of its class; `condition`, a `Condition.to_dict`, for data without classes.

    Raises:
        UserError: for an unknown name or option, with the near ones, and for what a denoiser of your own lacks.
    """
    factory = denoisers.find(name)
    if isinstance(factory, Preset):
        options = {**factory.options, **options}
        factory = factory.load()
    options = {"in_channels": in_channels, "num_classes": num_classes, **options}
    condition = create_condition(num_classes, options.get("condition"))
    taken = getattr(factory, "conditions", Pretrained.conditions)
    if condition.kind not in taken:
        raise UserError(
            f"model '{name}' cannot be conditioned on {condition.describe()}: it takes {' or '.join(taken)}; name "
            "another model, or write one (docs/extending.md)"
        )
    presets = ", ".join(presets_of(name))
    denoisers.check_options(name, factory, (), options, hint=f"; or name a preset: {presets}" if presets else "")
    try:
        if torch.get_default_device().type != "meta":
            check_memory(lambda: factory(**options), f"model '{name}'")
        denoiser = factory(**options)
    except (UserError, torch.OutOfMemoryError):
        raise
    except MISTAKES as error:
        raise UserError(f"model '{name}' does not take these options: {first_line(error)}") from error
    parts = ("in_channels", "num_classes", "config", "save_pretrained", "set_gradient_checkpointing")
    denoisers.check_has(name, denoiser, parts)
    return denoiser


def load_denoiser(path_or_hub_id: str | Path, **overrides) -> Pretrained:
    """The denoiser of a folder or hub id that `save_pretrained` wrote, of the class that its config.json names.

    The module of your own class must have been imported before: a file cannot name what to import. Otherwise as
    `Pretrained.from_pretrained`.
    """
    return denoiser_class(saved_kind(path_or_hub_id), path_or_hub_id).from_pretrained(path_or_hub_id, **overrides)


def denoiser_class(kind: str | None, source: str | Path) -> type[Pretrained]:
    """The class that config.json calls `kind`; a UserError, which names the `source`, if it is not known."""
    ours = {preset.kind: preset for preset in (*FAMILIES.values(), *PRESETS.values())}
    if kind in Pretrained.kinds or kind in ours:
        return Pretrained.kinds.get(kind) or ours[kind].load()
    raise UserError(
        f"{source} holds a {kind or 'model of unknown kind'}; import its module first, in the "
        f"recipe by `plugins`; known: {', '.join(sorted({*ours, *Pretrained.kinds}))}"
    )
