"""Checkpoints in the key layout that the public code of DiT, SiT, REPA and VisionLLaMA shares.

The keys are the same, but not the models:

- DiT predicts the noise and a variance at the steps 0 ... 999. Loaded as it is, for the objective `ddpm`.
- SiT counts time from the noise, t' = 1 - t, so that its velocity points the other way: v(x, t) = -v'(x, 1 - t). The
  weights are changed for both: cos((1 - t) f) and sin((1 - t) f) are a rotation of cos(t f) and sin(t f), so the first
  time layer can take them. The surplus channels, which its code drops, are dropped.
- REPA counts as we do. Loaded as it is, for the objective `flow-matching`; its projectors are `authors_heads`.

VisionLLaMA's DiT-LLaMA and SiT-LLaMA are of the families DiT and SiT, with other blocks, which their keys tell.

The position embedding, the fixed sinusoids, is left out. (In averaged weights it differs from them by less than 1e-3.)
"""

import re
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from dic_repa.errors import UserError, unknown_name
from dic_repa.files.weights import load_weights, read_tensors
from dic_repa.models.authors import Rules, rename
from dic_repa.models.registry import preset_heads
from dic_repa.models.sit import SiT, position_embedding

FAMILIES = ("DiT", "SiT", "REPA")
_RULES: Rules = [
    (r"x_embedder\.proj\.(\w+)", r"patches.proj.\1"),
    (r"t_embedder\.mlp\.0\.(\w+)", r"condition.time1.\1"),
    (r"t_embedder\.mlp\.2\.(\w+)", r"condition.time2.\1"),
    (r"y_embedder\.embedding_table\.weight", "condition.label.weight"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)", r"blocks.\1.modulation.\2"),
    (r"blocks\.(\d+)\.mlp\.c_fc1\.(\w+)", r"blocks.\1.mlp.fc1_g.\2"),
    (r"blocks\.(\d+)\.mlp\.c_fc2\.(\w+)", r"blocks.\1.mlp.fc1_x.\2"),
    (r"blocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"final_layer\.adaLN_modulation\.1\.(\w+)", r"output.modulation.\1"),
    (r"final_layer\.linear\.(\w+)", r"output.linear.\1"),
]


def load_state(state: dict[str, Tensor], name: str, family: str | None = None, **overrides) -> SiT:
    """The SiT of a state dict in this layout, which errors call `name`; `overrides` are other arguments of `SiT`.

    Without a `family` it is REPA's if there are projectors, else the one that the file's name begins with.
    """
    family = family or _guess_family(state, name)
    if family not in FAMILIES:
        raise unknown_name("family", family, FAMILIES)
    # REPA's first checkpoints number the blocks behind the tap from 0 again, as `decoder_blocks`.
    before = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    behind = (r"decoder_blocks\.(\d+)\.(.*)", lambda m: f"blocks.{before + int(m[1])}.{m[2]}")
    state = {rename(key, [behind]): value for key, value in state.items()}
    try:
        config = infer_config(state)
        positions = state.pop("pos_embed")[0]
    except KeyError as missing:
        raise UserError(f"{name} is not a whole checkpoint of DiT, SiT or REPA: it has no {missing.args[0]}") from None
    (count, width), side = positions.shape, round(len(positions) ** 0.5)
    if side**2 != count or (position_embedding((side, side), width) - positions).abs().max() > 1e-2:
        raise UserError(f"{name} has learnt position embeddings, but SiT's are fixed sinusoids")
    # Attention and MLP are timm's, with timm's names, on both sides.
    tensors = {rename(key, _RULES): value for key, value in state.items() if not key.startswith("projectors.")}
    patch, channels = config["patch_size"], config["in_channels"]
    if family == "SiT":
        config["learn_sigma"] = False
        tensors["condition.time1.weight"] = _flip_time(tensors["condition.time1.weight"])
    for key in ("output.linear.weight", "output.linear.bias"):
        # A patch's rows are theirs by pixel, then channel; ours by channel, then pixel.
        rows = rearrange(tensors[key], "(p c) ... -> c p ...", p=patch**2)
        tensors[key] = rearrange(-rows[:channels] if family == "SiT" else rows, "c p ... -> (c p) ...")
    model = SiT(**{**config, **overrides})
    load_weights(model, tensors, name)
    return model.eval()


def authors_heads(source: str | Path | dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """REPA's projectors in a checkpoint (a file or a state dict): for each a state dict of our `mlp` head."""
    state = source if isinstance(source, dict) else read_tensors(source)[0]
    heads: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := re.fullmatch(r"(?:module\.)?projectors\.(\d+)\.(.*)", key):
            heads.setdefault(int(match[1]), {})[f"layers.{match[2]}"] = value
    return [heads[index] for index in sorted(heads)]


def _guess_family(state: dict[str, Tensor], name: str) -> str:
    if any(key.startswith("projectors.") for key in state):
        return "REPA"
    for family in FAMILIES:
        if Path(name).name.lower().startswith(family.lower()):
            return family
    raise UserError(
        f"{name} has the keys that DiT, SiT and REPA share; say which of them it is, by family (of a file: `dic-repa "
        "convert FILE FOLDER --family NAME`)"
    )


def infer_config(state: dict[str, Tensor]) -> dict:
    """The arguments of `SiT` that the names and shapes of a state dict tell; a KeyError names what it lacks."""
    width, in_channels, patch_size = state["x_embedder.proj.weight"].shape[:3]
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    blocks = {"block": "llama-layer-norm"} if "blocks.0.mlp.c_fc1.weight" in state else {}
    return {
        "width": width,
        "depth": depth,
        "num_heads": preset_heads("SiT", width, depth),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": len(state["final_layer.linear.weight"]) == 2 * in_channels * patch_size**2,
        **blocks,
    }


def _flip_time(weight: Tensor) -> Tensor:
    """The weight (C, 256) that gives for the sinusoids of t what `weight` gives for those of 1 - t."""
    half = weight.shape[1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = frequencies.cos(), frequencies.sin()
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    return torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1).to(weight.dtype)
