"""Checkpoints in the key layout of the DiC authors' public code, and of other code by whoever reads its layout.

Nothing but tensors is needed: width, depths, classes and channels are read off their names and shapes.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dic_repa.errors import UserError
from dic_repa.files.weights import load_weights, read_tensors
from dic_repa.models.dic import DiC
from dic_repa.models.pretrained import Pretrained
from dic_repa.models.stages import StagedUNet

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
# A key that only another layout has, and the module of `dic_repa.models` whose `load_state` reads it; imported when it
# is needed, since timm takes seconds.
_OTHERS = {
    "t_embedder.mlp.0.weight": "authors_sit",
    "patch_embed.proj.weight": "authors_uvit",
    "latent.0.ca.1.weight": "authors_conv",
    "latent.0.grn.gamma": "authors_conv",
}


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

    It is a DiC, DiCo, FCDM, U-ViT or SiT: DiT, SiT and REPA share a layout, and `family` says which of them it is if
    neither REPA's projectors nor the file's name tell. `overrides` are arguments of the class that replace those read
    off the tensors. Returned in eval mode, in our conventions of time and velocity.
    """
    state = read_tensors(source)[0] if not isinstance(source, dict) else source
    name = "the state dict" if isinstance(source, dict) else str(source)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    for key, module in _OTHERS.items():
        if key in state:
            return importlib.import_module(f"dic_repa.models.{module}").load_state(state, name, family, **overrides)
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
            f"{name} is not a checkpoint of the DiC authors' code, nor of DiCo, FCDM, DiT, SiT, REPA or "
            f"U-ViT: it has no {missing.args[0]}"
        ) from None
    stages = ("enc_blocks.0", "enc_blocks.1", "lat_blocks.0", "dec_blocks.0", "dec_blocks.1")
    return {
        "width": width,
        "depths": tuple(depth(stage) for stage in stages),
        "in_channels": in_channels,
        "num_classes": rows - 1,
        "learn_sigma": out_channels == 2 * in_channels,
    }


def authors_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a DiC, DiCo or FCDM under its authors' names: the inverse of `load_authors_checkpoint`.

    A UserError for what their code has no model for: another denoiser, the earlier steps of DiC's ladder.
    """
    if isinstance(model, StagedUNet):
        return importlib.import_module("dic_repa.models.authors_conv").authors_state(model)
    if not isinstance(model, DiC):
        raise UserError(f"{type(model).__name__} is not written in its authors' layout, only DiC, DiCo and FCDM are")
    theirs: dict[str, Any] = {"shape": "unet", "skips": "sparse", "embedding": "per-level", "block": "dic"}
    theirs |= dict.fromkeys(("stem_bottleneck", "wide_head"))
    other = [key for key, value in theirs.items() if model.config.get(key) != value]
    if other or model.strides != (2, 2):
        raise UserError(
            f"the DiC authors' code has no DiC with another {' or '.join(other or ['depths or strides'])} than its own"
        )
    return {rename(key, _RULES): value for key, value in model.state_dict().items()}
