"""Checkpoints in the key layout of the U-ViT authors' public code.

All U-ViTs predict the noise, and the time's token is the sinusoids of a number that differs between them, so a model is
loaded with the `time_scale` that it was trained with:

- U-ViT-H on ImageNet embeds the steps 1 to 1000 of Stable Diffusion's betas: scale 1, for the recipe `u-vit-h-2`.
- the others embed 999 t on the VP path: scale 999, for `flow-matching` with the options `path: vp, prediction: noise`.
"""

from einops import rearrange
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.files.weights import load_weights
from dic_repa.models.authors import Rules, rename
from dic_repa.models.registry import preset_heads
from dic_repa.models.uvit import UViT

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


def load_state(state: dict[str, Tensor], name: str, family: str | None = None, **overrides) -> UViT:
    """The U-ViT of a state dict in this layout, which errors call `name`; `overrides` are other arguments of `UViT`.

    Only a U-ViT has it, so that no `family` needs to be told.
    """
    try:
        config = infer_uvit(state)
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


def infer_uvit(state: dict[str, Tensor]) -> dict:
    """The arguments of `UViT` that the names and shapes of a state dict tell; a KeyError names what it lacks."""
    width, in_channels, patch_size = state["patch_embed.proj.weight"].shape[:3]
    depth = 2 * len({key.split(".")[1] for key in state if key.startswith("in_blocks.")}) + 1
    return {
        "width": width,
        "depth": depth,
        "num_heads": preset_heads("U-ViT", width, depth),
        "patch_size": patch_size,
        "size": patch_size * round((state["pos_embed"].shape[1] - 2) ** 0.5),  # without label and time
        "in_channels": in_channels,
        "num_classes": len(state["label_emb.weight"]) - 1,
        "final_conv": "final_layer.weight" in state,
        "time_scale": 1.0 if (width, depth) == (1152, 29) else 999.0,  # U-ViT-H
    }
