"""The papers' denoisers by name: of which class, with which options, and what their source counts.

A preset is a row of a table below, and imports nothing but its row: timm alone takes seconds. `create_denoiser` builds
it, `dic-repa info` prints its counts, and the tests hold them against what we count.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dic_repa.models.dic import PRESETS as DIC_PRESETS

if TYPE_CHECKING:
    from dic_repa.models.pretrained import Pretrained


@dataclass(frozen=True)
class Counts:
    """What the `source` counts: parameters in millions, and GMACs by height and width of the latent.

    `options` are those that it counts the preset with, beside its own; `beside` has the parameters in millions and the
    GMACs that it counts and we don't, such as a head's: negative for what we count alone.
    """

    source: str
    parameters: float | None = None
    gmacs: Mapping[int, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Preset:
    """Options of a class that is imported when it is built."""

    kind: str  # the class; what config.json calls it
    options: Mapping[str, Any] = field(default_factory=dict)
    latent: tuple[int, int] | None = None  # channels and size of 256 px's latents, if it is for others than 4x32x32
    module: str = ""  # of dic_repa.models; '' if it is named as the class is
    counts: Counts | None = None

    def load(self) -> type[Pretrained]:
        return getattr(importlib.import_module(f"dic_repa.models.{self.module or self.kind.lower()}"), self.kind)


# Families, whose sizes are options.
FAMILIES = {
    "DiC": Preset("DiC"),
    "SiT": Preset("SiT"),
    "DiT": Preset("SiT", {"learn_sigma": True}),
    "U-ViT": Preset("UViT"),
    "DiT-LLaMA": Preset("SiT", {"block": "llama"}),
    "DiffiT": Preset("SiT", {"block": "diffit", "size": 32}),
    "SiT-down": Preset("SiTDown", module="sit_down"),
    "DiCo": Preset("DiCo", {"mlp_ratio": 2}),
    "FCDM": Preset("FCDM", {"mlp_ratio": 3}),
}

_DIC, POSTER = "DiC, arXiv 2501.00603", "DiC's poster, CVPR 2025"
_VARIANCE = {"learn_sigma": True}
_DIC_COUNTS = {
    "DiC-S": Counts(_DIC, 32.84, {32: 5.87}, _VARIANCE),
    "DiC-B": Counts(_DIC, 129.53, {32: 23.44}, _VARIANCE),
    "DiC-XL": Counts(f"{_DIC}, and its poster", 702.27, {32: 116.1, 64: 464.3}, _VARIANCE),
    "DiC-H": Counts(f"{_DIC}, and its poster", 1034.52, {32: 204.4, 64: 817.2}, _VARIANCE),
}
_DIC_LATENTS = {"DiC-XL/f16": (32, 16), "DiC-XL/f16-wide": (768, 16), "DiC-XL/f32": (32, 8)}
_DIC_PRESETS = {
    name: Preset("DiC", options, _DIC_LATENTS.get(name), counts=_DIC_COUNTS.get(name))
    for name, options in DIC_PRESETS.items()
}

_SIT_SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 384, "depth": 12, "num_heads": 6},
    "B": {"width": 768, "depth": 12, "num_heads": 12},
    "L": {"width": 1024, "depth": 24, "num_heads": 16},
    "XL": {"width": 1152, "depth": 28, "num_heads": 16},
}
_DIT = "DiT, arXiv 2212.09748, table 4"
_SIT_COUNTS = {
    "S/2": Counts(_DIT, 33, {32: 6.06}),
    "B/2": Counts(_DIT, 130, {32: 23.01}),
    "L/2": Counts(_DIT, 458, {32: 80.71}),
    "XL/2": Counts(_DIT, 675, {32: 118.64, 64: 524.60}),
}
_SIT_PRESETS = {
    f"{family}-{size}/{patch}": Preset(
        "SiT",
        {**options, "patch_size": patch, "learn_sigma": family == "DiT"},
        counts=_SIT_COUNTS.get(f"{size}/{patch}"),
    )
    for family in ("SiT", "DiT")
    for size, options in _SIT_SIZES.items()
    for patch in (2, 4, 8)
}

_UVIT_SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 512, "depth": 13, "num_heads": 8},
    "M": {"width": 768, "depth": 17, "num_heads": 12},
    "L": {"width": 1024, "depth": 21, "num_heads": 16},
    "H": {"width": 1152, "depth": 29, "num_heads": 16, "final_conv": False},
}
_UVIT = "U-ViT, arXiv 2209.12152, table 1"
_UVIT_COUNTS = {
    "M": Counts(_UVIT, 131),
    "L": Counts(_UVIT, 287),
    "H": Counts(_UVIT, 501, {32: 133}),
}
# The poster gives U-ViT-XL no width or depth. It lies between L and H; L's width and heads with 31 blocks have its
# GMACs.
_UVIT_XL = {"width": 1024, "depth": 31, "num_heads": 16}
_UVIT_PRESETS = {
    **{f"U-ViT-{size}/2": Preset("UViT", sizes, counts=_UVIT_COUNTS.get(size)) for size, sizes in _UVIT_SIZES.items()},
    **{f"U-ViT-{size}/4": Preset("UViT", {**_UVIT_SIZES[size], "patch_size": 4, "size": 64}) for size in "LH"},
    "U-ViT-XL/2": Preset("UViT", _UVIT_XL, counts=Counts(POSTER, gmacs={32: 113.0})),
}

# DiT's sizes with other blocks; the variance is an option, since flow matching has none.
_LLAMA_COUNTS = Counts(f"{POSTER}; parameters, VisionLLaMA's DiTLLaMA.md", 675, {32: 118.6}, _VARIANCE)
_DIFFIT_COUNTS = Counts(f"{POSTER}; parameters, DiffiT, arXiv 2312.02139", 561, {32: 118.5}, _VARIANCE)
_BLOCK_PRESETS = {
    f"{name}-XL/2": Preset("SiT", {**_SIT_SIZES["XL"], "patch_size": 2, **FAMILIES[name].options}, counts=counts)
    for name, counts in (("DiT-LLaMA", _LLAMA_COUNTS), ("DiffiT", _DIFFIT_COUNTS))
}

_SIT_DOWN_SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 384, "depths": (5, 5, 5), "num_heads": 6},  # our choice, B's depths: the paper has no S
    "B": {"width": 768, "depths": (5, 5, 5), "num_heads": 12},
    "L": {"width": 1024, "depths": (9, 14, 9), "num_heads": 16},
    "XL": {"width": 1152, "depths": (10, 16, 10), "num_heads": 16},
}
# `beside`: REPA's projector on the middle's tokens and the fixed positions, less attention's products.
_SIT_DOWN = "U-REPA, arXiv 2503.18414, table 2: with REPA's projector and fixed positions, without attention's products"
_SIT_DOWN_COUNTS = {
    "B": Counts(_SIT_DOWN, 199.7, {32: 24.1}, beside=(7.54, -0.57)),
    "L": Counts(_SIT_DOWN, 686.6, {32: 79.3}, beside=(8.13, -2.03)),
    "XL": Counts(_SIT_DOWN, 954.4, {32: 109.3}, beside=(8.43, -2.65)),
}
_SIT_DOWN_PRESETS = {
    f"SiT-down-{size}/2": Preset("SiTDown", sizes, module="sit_down", counts=_SIT_DOWN_COUNTS.get(size))
    for size, sizes in _SIT_DOWN_SIZES.items()
}

_DICO_SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 128, "depths": (5, 4, 4, 4, 4), "mlp_ratio": 2},
    "B": {"width": 256, "depths": (5, 4, 4, 4, 4), "mlp_ratio": 2},
    "L": {"width": 352, "depths": (9, 8, 9, 8, 9), "mlp_ratio": 2},
    "XL": {"width": 416, "depths": (9, 9, 10, 9, 9), "mlp_ratio": 2},
    "H": {"width": 416, "depths": (14, 12, 10, 12, 14), "mlp_ratio": 4},
}
_DICO = "DiCo, arXiv 2505.11196, and its README"
_DICO_COUNTS = {
    "S": Counts(_DICO, 33.1, {32: 4.25}),
    "B": Counts(_DICO, 130.0, {32: 16.88}),
    "L": Counts(_DICO, 463.9, {32: 60.24}),
    "XL": Counts(_DICO, 701.2, {32: 87.30}),
    "H": Counts("DiCo's code, counted", 1037.41, {32: 194.03}),
}
_FCDM_SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 128, "depths": (2, 4, 8, 4, 2), "mlp_ratio": 3},
    "B": {"width": 256, "depths": (2, 4, 8, 4, 2), "mlp_ratio": 3},
    "L": {"width": 512, "depths": (2, 4, 8, 4, 2), "mlp_ratio": 3},
    "XL": {"width": 512, "depths": (3, 6, 12, 6, 3), "mlp_ratio": 3},
}
_FCDM = "FCDM's code, counted"
_FCDM_COUNTS = {
    "S": Counts(_FCDM, 32.70, {32: 3.07}),
    "B": Counts(_FCDM, 127.68, {32: 12.14}),
    "L": Counts(_FCDM, 504.45, {32: 48.23}),
    "XL": Counts(_FCDM, 698.75, {32: 64.53}),
}
_CONV_PRESETS = {
    f"{family}-{size}": Preset(family, {**options, "learn_sigma": True}, counts=counts.get(size))
    for family, sizes, counts in (("DiCo", _DICO_SIZES, _DICO_COUNTS), ("FCDM", _FCDM_SIZES, _FCDM_COUNTS))
    for size, options in sizes.items()
}

# Classes of diffusers with the options nearest to a paper's network.
#
# The poster's PixArt has no source but its GMACs. DiT-XL/2's 28 layers and cross-attention would take 137.5, 24 layers
# 117.9. The class is a caption of one token, as wide as the network, behind PixArt's projection of captions.
_PIXART = {
    "kind": "PixArtTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 24,
    "cross_attention_dim": 1152,
    "caption_channels": 1152,
    "sample_size": 32,
}
# EDM's SongUNet for 32x32 differs in detail: its first convolution has 128 channels, not 256, and so has the time's
# embedding; at 16x16 only the last block of the decoder attends, not each of them; what is resampled has a convolution
# in its shortcut; both terms of a sum are divided by sqrt(2); a label enters the time's embedding by a linear layer of
# 128 channels, not a table of 512; dropout is 0.13 there. In all it has 55.73 M parameters for CIFAR-10, and this one
# 55.74.
_SONG = {
    "kind": "UNet2DModel",
    "block_out_channels": [256, 256, 256],
    "layers_per_block": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 256,
    "time_embedding_dim": 512,
    "norm_eps": 1e-6,
}
_EDM = "EDM's code, arXiv 2206.00364, for CIFAR-10 with classes"
_DIFFUSERS_PRESETS = {
    "PixArt-alpha-XL/2": Preset(
        "DiffusersNetwork", _PIXART, module="diffusers_network", counts=Counts(POSTER, None, {32: 118.4}, _VARIANCE)
    ),
    "SongUNet": Preset(
        "DiffusersNetwork",
        _SONG,
        module="diffusers_network",
        counts=Counts(_EDM, 55.73, options={"in_channels": 3, "num_classes": 10}),
    ),
}

# In the order in which `dic-repa info` lists them.
PRESETS: dict[str, Preset] = {
    **_DIC_PRESETS,
    **_CONV_PRESETS,
    **_SIT_PRESETS,
    **_SIT_DOWN_PRESETS,
    **_BLOCK_PRESETS,
    **_UVIT_PRESETS,
    **_DIFFUSERS_PRESETS,
}
