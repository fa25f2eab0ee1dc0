"""Checkpoints in the key layouts of the DiC and U-ViT authors' public code; those of DiT, SiT and REPA are in
`authors_sit.py`.

Nothing but tensors is needed: width, depths, classes and channels are read off their names and shapes.

All U-ViTs predict the noise, and the time's token is the sinusoids of a number that differs between them, so a model is
loaded with the `time_scale` that it was trained with:

- U-ViT-H on ImageNet embeds the steps 1 to 1000 of Stable Diffusion's betas: scale 1, for the recipe `u-vit-h-2`.
- the others embed 999 t on the VP path: scale 999, for `flow-matching` with the options `path: vp, prediction: noise`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from dic_repa.errors import UserError
from dic_repa.files.weights import load_weights, read_tensors
from dic_repa.models.dic import DiC
from dic_repa.models.pretrained import Pretrained
from dic_repa.models.registry import preset_heads

# Ours to theirs. Their decoder stages are numbered in running order (0 is level 1), ours by level.
_BLOCK = {
    "norm1": "conv.norm0",
    "conv1": "conv.conv0",
    "modulation": "conv.affine.1",
    "norm2": "conv.norm1",
    "conv2": "conv.conv1",
    "shortcut": "conv.skip",
}
Rules = list[tuple[str, str | Callable[[re.Match], str]]]  # patterns of one side's keys, and the other's keys
_RULES: Rules = [
    (r"stem\.(.*)", r"x_embedder.proj.\1"),
    (r"condition\.(\d)\.time1\.(.*)", r"t_embedder_ls.\1.mlp.0.\2"),
    (r"condition\.(\d)\.time2\.(.*)", r"t_embedder_ls.\1.mlp.2.\2"),
    (r"condition\.(\d)\.label\.(.*)", r"y_embedder_ls.\1.embedding_table.\2"),
    (r"enc\.(\d)\.(\d+)\.(\w+)\.(.*)", lambda m: f"enc_blocks.{m[1]}.{m[2]}.{_BLOCK[m[3]]}.{m[4]}"),
    (r"mid\.(\d+)\.(\w+)\.(.*)", lambda m: f"lat_blocks.0.{m[1]}.{_BLOCK[m[2]]}.{m[3]}"),
    (r"dec\.(\d)\.(\d+)\.(\w+)\.(.*)", lambda m: f"dec_blocks.{1 - int(m[1])}.{m[2]}.{_BLOCK[m[3]]}.{m[4]}"),
    (r"down\.(\d)\.conv\.(.*)", r"downs.\1.body.0.\2"),
    (r"up\.(\d)\.conv\.(.*)", lambda m: f"ups.{1 - int(m[1])}.body.0.{m[2]}"),
    (r"output\.conv1\.(.*)", r"output.\1"),
    (r"output\.modulation\.(.*)", r"final_layer.adaLN_modulation.1.\1"),
    (r"output\.conv2\.(.*)", r"final_layer.out_proj.\1"),
]
_UVIT_RULES: Rules = [
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


def rename(key: str, rules: Rules) -> str:
    """What the first rule that fits makes of a parameter's `key`; the key itself if none fits."""
    for pattern, other in rules:
        if match := re.fullmatch(pattern, key):
            return match.expand(other) if isinstance(other, str) else other(match)
    return key


def load_authors_checkpoint(
    source: str | Path | dict[str, Tensor], family: str | None = None, **overrides
) -> Pretrained:
    """The denoiser of a checkpoint of public code: a file (safetensors, or torch's with `ema` or `model` inside) or a
    state dict.

    It is a DiC, a U-ViT, or a SiT: DiT, SiT and REPA share a layout, and `family` says which of them it is if neither
    REPA's projectors nor the file's name tell. `overrides` are arguments of the class that replace those read off the
    tensors. Returned in eval mode, in our conventions of time and velocity.
    """
    state = read_tensors(source)[0] if not isinstance(source, dict) else source
    name = "the state dict" if isinstance(source, dict) else str(source)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if "t_embedder.mlp.0.weight" in state:
        from dic_repa.models.authors_sit import load_sit  # timm takes seconds to import

        return load_sit(state, name, family, **overrides)
    if "patch_embed.proj.weight" in state:
        return _load_uvit(state, name, **overrides)
    model = DiC(**{**_infer_config(state, name), **overrides})
    ours = {rename(key, _RULES): key for key in model.state_dict()}
    load_weights(model, {ours.get(key, key): value for key, value in state.items()}, name)
    return model.eval()


def _infer_config(state: dict[str, Tensor], name: str) -> dict:
    def depth(stage: str) -> int:
        return len({m[1] for key in state if (m := re.match(rf"{re.escape(stage)}\.(\d+)\.", key))})

    try:
        width, in_channels = state["x_embedder.proj.weight"].shape[:2]
        out_channels = state["final_layer.out_proj.weight"].shape[0]
        rows = state["y_embedder_ls.0.embedding_table.weight"].shape[0]
    except KeyError as missing:
        raise UserError(
            f"{name} is not a checkpoint of the DiC authors' code, nor of DiT, SiT, REPA or U-ViT: "
            f"it has no {missing.args[0]}"
        ) from None
    stages = ("enc_blocks.0", "enc_blocks.1", "lat_blocks.0", "dec_blocks.0", "dec_blocks.1")
    return {
        "width": width,
        "depths": tuple(depth(stage) for stage in stages),
        "in_channels": in_channels,
        "num_classes": rows - 1,
        "learn_sigma": out_channels == 2 * in_channels,
    }


def _load_uvit(state: dict[str, Tensor], name: str, **overrides) -> Pretrained:
    from dic_repa.models.uvit import UViT

    try:
        config = infer_uvit(state)
    except KeyError as missing:
        raise UserError(f"{name} is not a checkpoint of a U-ViT with classes: it has no {missing.args[0]}") from None
    tensors = {rename(key, _UVIT_RULES): value for key, value in state.items()}
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


def authors_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A DiC's weights under the authors' names: the inverse of `load_authors_checkpoint`.

    A UserError for what their code has no model for: another denoiser, the earlier steps of the paper's ladder.
    """
    if not isinstance(model, DiC):
        raise UserError(f"the DiC authors' code has no {type(model).__name__}, only DiC")
    theirs: dict[str, Any] = {"shape": "unet", "skips": "sparse", "embedding": "per-level", "block": "dic"}
    theirs |= dict.fromkeys(("stem_bottleneck", "wide_head"))
    other = [key for key, value in theirs.items() if model.config.get(key) != value]
    if other or model.strides != (2, 2):
        raise UserError(
            f"the DiC authors' code has no DiC with another {' or '.join(other or ['depths or strides'])} than its own"
        )
    return {rename(key, _RULES): value for key, value in model.state_dict().items()}
