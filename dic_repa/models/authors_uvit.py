"""Checkpoints in the key layout of U-ViT's public code: `nnet_ema.pth`, `imagenet256_uvit_huge.pth` and their like.

All its models predict the noise, and the time's token is the sinusoids of a number that differs between them, so a
model is loaded with the `time_scale` of what it was trained by:

- U-ViT-H on ImageNet embeds the steps 1 to 1000 of Stable Diffusion's betas: scale 1, for the recipe `u-vit-h-2`.
- the others embed 999 t on the VP path: scale 999, for `flow-matching` with the options `path: vp, prediction: noise`.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.files.weights import load_weights
from dic_repa.models.authors import Rules, rename
from dic_repa.models.registry import preset_heads
from dic_repa.models.uvit import EXTRA_TOKENS, UViT

_RULES: Rules = [
    (r"patch_embed\.(.*)", r"patches.\1"),
    (r"label_emb\.(.*)", r"label.\1"),
    (r"pos_embed", "positions"),
    (r"in_blocks\.(.*)", r"enc.\1"),
    (r"mid_block\.(.*)", r"mid.\1"),
    (r"out_blocks\.(\d+)\.skip_linear\.(.*)", r"dec.\1.skip.\2"),
    (r"out_blocks\.(.*)", r"dec.\1"),
    (r"decoder_pred\.(.*)", r"linear.\1"),
    (r"final_layer\.(.*)", r"conv.\1"),
]


def load_uvit(state: dict[str, Tensor], name: str, **overrides) -> UViT:
    """The U-ViT of a state dict in this layout, which errors call `name`; `overrides` are other arguments of `UViT`.

    Without a `time_scale`, U-ViT-H has 1 and any other 999.
    """
    try:
        config = infer_config(state)
    except KeyError as missing:
        raise UserError(f"{name} is not a checkpoint of a U-ViT with classes: it has no {missing.args[0]}") from None
    tensors = {rename(key, _RULES): value for key, value in state.items()}
    for key in ("linear.weight", "linear.bias"):
        # A patch's rows are theirs by pixel, then channel; ours by channel, then pixel.
        if key in tensors:
            tensors[key] = rearrange(tensors[key], "(p c) ... -> (c p) ...", p=config["patch_size"] ** 2)
    model = UViT(**{**config, **overrides})
    load_weights(model, tensors, name)
    return model.eval()


def infer_config(state: dict[str, Tensor]) -> dict:
    """The arguments of `UViT` that the names and shapes of a state dict tell; a KeyError names what it lacks."""
    width, in_channels, patch_size = state["patch_embed.proj.weight"].shape[:3]
    depth = 2 * len({key.split(".")[1] for key in state if key.startswith("in_blocks.")}) + 1
    classes, positions = len(state["label_emb.weight"]) - 1, state["pos_embed"].shape[1]
    return {
        "width": width,
        "depth": depth,
        "num_heads": preset_heads("U-ViT", width, depth),
        "patch_size": patch_size,
        "size": patch_size * round((positions - EXTRA_TOKENS) ** 0.5),
        "in_channels": in_channels,
        "num_classes": classes,
        "final_conv": "final_layer.weight" in state,
        "time_scale": 1.0 if (width, depth) == (1152, 29) else 999.0,  # U-ViT-H
    }
