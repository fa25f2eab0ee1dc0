"""The encoders that are networks of timm: any by `timm:`, and by short names those that the literature aligns with and
those that the package ships, as tables of data.

Preprocessing is REPA's if REPA has the encoder: images are normalised by the mean and std below and resized (bicubic,
no antialiasing) to one token for 16 pixels: 256 px become 224 for a patch of 14. As in REPA, the tokens of CLIP and MAE
are those before the final norm. REPA's names are dinov1, jepa and clip-vit-L.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import constants

from dic_repa.encoders.base import IN_PACKAGE, Card, encoders
from dic_repa.encoders.timm_backbone import TimmBackbone
from dic_repa.encoders.timm_network import FrozenNetwork, sketch, takes
from dic_repa.encoders.timm_vit import TimmViT

IMAGENET = (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD)
CLIP = (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD)
HALF = (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD)  # 0.5: images in [-1, 1]
NON_COMMERCIAL = "CC BY-NC 4.0"


@dataclass(frozen=True)
class Family(Card):
    """A row of the table."""

    model: str = ""  # timm's name of the architecture, and of its weights if timm has them
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    norm: bool = True  # whether the tokens pass the final norm
    in_timm: bool = True  # False: the weights must be fetched by hand, from `source`
    model_args: Mapping[str, Any] = field(default_factory=dict)


def _row(width: int, patch: int, parameters: float, model: str, licence: str, source: str = "", **options) -> Family:
    return Family(width, patch, 256, parameters, source or f"hub:timm/{model}", licence, model, **options)


def _dinov2(size: str, width: int, parameters: float) -> Family:
    return _row(width, 14, parameters, f"vit_{size}_dinov2.lvd142m", "Apache-2.0")


def _clip(width: int, patch: int, parameters: float, size: str) -> Family:
    # OpenAI's own networks have the quick GELU, an approximation, and give other tokens with the exact one.
    model = f"vit_{size}_patch{patch}_clip_quickgelu_224.openai"
    source = f"hub:timm/{model.replace('quickgelu_', '')}"
    return _row(width, patch, parameters, model, "MIT", source, statistics=CLIP, norm=False)


def _siglip2(width: int, parameters: float, size: str) -> Family:
    return _row(width, 16, parameters, f"vit_{size}_patch16_siglip_256.v2_webli", "Apache-2.0", statistics=HALF)


def _pe(width: int, patch: int, parameters: float, name: str) -> Family:
    return _row(width, patch, parameters, f"vit_pe_{name}.fb", "Apache-2.0", statistics=HALF)


_DINOV3 = "DINOv3 licence"
_RCG = "https://github.com/LTH14/rcg"
_MOCO = "https://dl.fbaipublicfiles.com/moco-v3/vit-{0}-300ep/vit-{0}-300ep.pth.tar"
_IJEPA = "https://dl.fbaipublicfiles.com/ijepa/{0}.pth.tar"
_IJEPA_H, _IJEPA_G = "vit_huge_patch14_gap_224.in1k_ijepa", "vit_giant_patch16_gap_224.in22k_ijepa"
# MoCo v3's small ViT has twice the heads of timm's.
_MOCO_SMALL: dict[str, Any] = {"in_timm": False, "model_args": {"num_heads": 12}}

FAMILIES: dict[str, Family] = {
    "dinov2-vit-s": _dinov2("small_patch14", 384, 22.1),
    "dinov2-vit-b": _dinov2("base_patch14", 768, 86.6),
    "dinov2-vit-l": _dinov2("large_patch14", 1024, 304.4),
    "dinov2-vit-g": _dinov2("giant_patch14", 1536, 1136.5),
    "dinov2reg-vit-s": _dinov2("small_patch14_reg4", 384, 22.1),
    "dinov2reg-vit-b": _dinov2("base_patch14_reg4", 768, 86.6),
    "dinov2reg-vit-l": _dinov2("large_patch14_reg4", 1024, 304.4),
    "dinov2reg-vit-g": _dinov2("giant_patch14_reg4", 1536, 1136.5),
    "dinov3-vit-s": _row(384, 16, 21.6, "vit_small_patch16_dinov3.lvd1689m", _DINOV3),
    "dinov3-vit-s+": _row(384, 16, 28.7, "vit_small_plus_patch16_dinov3.lvd1689m", _DINOV3),
    "dinov3-vit-b": _row(768, 16, 85.6, "vit_base_patch16_dinov3.lvd1689m", _DINOV3),
    "dinov3-vit-l": _row(1024, 16, 303.1, "vit_large_patch16_dinov3.lvd1689m", _DINOV3),
    "dinov3-vit-h+": _row(1280, 16, 840.5, "vit_huge_plus_patch16_dinov3.lvd1689m", _DINOV3),
    "dinov3-vit-7b": _row(4096, 16, 6716.0, "vit_7b_patch16_dinov3.lvd1689m", _DINOV3),
    "dino-vit-s": _row(384, 16, 21.7, "vit_small_patch16_224.dino", "Apache-2.0"),
    "dino-vit-b": _row(768, 16, 85.8, "vit_base_patch16_224.dino", "Apache-2.0"),
    "clip-vit-b": _clip(768, 16, 85.8, "base"),
    "clip-vit-l": _clip(1024, 14, 303.2, "large"),
    "siglip2-vit-b": _siglip2(768, 92.9, "base"),
    "siglip2-vit-l": _siglip2(1024, 316.0, "large"),
    "siglip2-vit-so400m": _siglip2(1152, 427.9, "so400m"),
    "siglip2-vit-g": _siglip2(1536, 1163.2, "giantopt"),
    "mae-vit-b": _row(768, 16, 85.8, "vit_base_patch16_224.mae", NON_COMMERCIAL, norm=False),
    "mae-vit-l": _row(1024, 16, 303.3, "vit_large_patch16_224.mae", NON_COMMERCIAL, norm=False),
    "mae-vit-h": _row(1280, 14, 630.8, "vit_huge_patch14_224.mae", NON_COMMERCIAL, norm=False),
    "mocov3-vit-s": _row(384, 16, 21.7, "vit_small_patch16_224", NON_COMMERCIAL, _MOCO.format("s"), **_MOCO_SMALL),
    "mocov3-vit-b": _row(768, 16, 85.8, "vit_base_patch16_224", NON_COMMERCIAL, _MOCO.format("b"), in_timm=False),
    "mocov3-vit-l": _row(1024, 16, 303.3, "vit_large_patch16_224", "MIT", _RCG, in_timm=False),
    "ijepa-vit-h": _row(1280, 14, 630.8, _IJEPA_H, NON_COMMERCIAL, _IJEPA.format("IN1K-vit.h.14-300e")),
    "ijepa-vit-g": _row(1408, 16, 1011.4, _IJEPA_G, NON_COMMERCIAL, _IJEPA.format("IN22K-vit.g.16-600e")),
    "pe-core-t": _pe(192, 16, 6.0, "core_tiny_patch16_384"),
    "pe-core-s": _pe(384, 16, 23.6, "core_small_patch16_384"),
    "pe-core-b": _pe(768, 16, 92.9, "core_base_patch16_224"),
    "pe-core-l": _pe(1024, 14, 316.1, "core_large_patch14_336"),
    "pe-core-g": _pe(1536, 14, 1880.1, "core_gigantic_patch14_448"),
    "pe-spatial-t": _pe(192, 16, 5.7, "spatial_tiny_patch16_512"),
    "pe-spatial-s": _pe(384, 16, 22.0, "spatial_small_patch16_512"),
    "pe-spatial-b": _pe(768, 16, 86.4, "spatial_base_patch16_512"),
    "pe-spatial-l": _pe(1024, 14, 304.0, "spatial_large_patch14_448"),
    "pe-spatial-g": _pe(1536, 14, 1851.9, "spatial_gigantic_patch14_448"),
}


for _name, _family in FAMILIES.items():
    _mean, _std = _family.statistics
    _options = {"norm": _family.norm, "mean": _mean, "std": _std, **_family.model_args}
    _by_hand = "" if _family.in_timm else _family.source
    _factory = partial(TimmViT, _family.model, weights_from=_by_hand, **_options)
    encoders.register(_name, card=_family, description=f"{_family.model} of timm")(_factory)


# EfficientNet-Lite by Google, converted from TensorFlow by timm's author: ImageNet's classes, learnt from their labels.
SHIPPED: dict[str, Card] = {
    "efficientnet-lite0": Card(112, 16, 64, 0.7, IN_PACKAGE, "Apache-2.0"),
    "efficientnet-lite2": Card(120, 16, 64, 1.2, IN_PACKAGE, "Apache-2.0"),
}

for _name, _card in SHIPPED.items():
    _model = f"tf_{_name.replace('-', '_')}"
    _file = Path(__file__).parent / "weights" / f"{_name.replace('-', '_')}.safetensors"
    _lite = partial(TimmBackbone, _model, weights=_file, layer=3, input_size=128)
    encoders.register(_name, card=_card, description=f"{_model} of timm, with its weights in the package")(_lite)


@encoders.register("timm:")
def timm_encoder(model_name: str, **options: Any) -> FrozenNetwork:
    """Any network of timm: a ViT's patch tokens, or else the feature map of a stage.

    The options are those of `TimmViT` or `TimmBackbone`, whichever it is.
    """
    model = sketch(model_name)
    kind = TimmViT if hasattr(model, "blocks") and takes(model, "dynamic_img_size") else TimmBackbone
    encoders.check_options(f"timm:{model_name}", kind, [model_name], options)
    return kind(model_name, **options)
