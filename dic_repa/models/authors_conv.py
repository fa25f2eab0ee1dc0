"""Checkpoints in the key layouts of the public code of DiCo and of FCDM, read and written.

Both are trained as a DDPM with a learned variance at the steps 0 ... 999, and load as they are, for the objective
`ddpm`. The layouts differ in the layers of a block and in some other names; levels count from 1.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from dic_repa.errors import UserError, first_few
from dic_repa.files.weights import load_weights
from dic_repa.models.authors import Rules, rename
from dic_repa.models.dico import DiCo
from dic_repa.models.fcdm import FCDM
from dic_repa.models.stages import LEVELS, StagedUNet

# Ours to theirs. A stage holds blocks, which are numbered alike.
_STAGES = {
    "enc.0": "encoder_level_1",
    "enc.1": "encoder_level_2",
    "mid": "latent",
    "dec.1": "decoder_level_2",
    "dec.0": "decoder_level_1",
}
_SHARED = {
    **{f"condition.{i}.time{j}": f"t_embedder_{i + 1}.mlp.{2 * (j - 1)}" for i in range(LEVELS) for j in (1, 2)},
    "output.modulation": "final_layer.adaLN_modulation.1",
}
_DICO_LAYERS = {
    "modulation": "adaLN_modulation.1",
    "conv1": "conv1",
    "depthwise": "conv2",
    "attention": "ca.1",
    "conv2": "conv3",
    "mlp1": "conv4",
    "mlp2": "conv5",
}
_DICO_OTHERS = {
    **{f"condition.{i}.label": f"y_embedder.embedding_table_{i}" for i in range(LEVELS)},
    "stem": "x_embedder.proj",
    "down.0.conv": "down1_2.body.0",
    "down.1.conv": "down2_3.body.0",
    "up.1.conv": "up3_2.body.0",
    "merge.1": "reduce_chan_level2",
    "up.0.conv": "up2_1.body.0",
    "merge.0": "reduce_chan_level1",
    "output.conv2": "final_layer.out_proj",
}
_FCDM_LAYERS = {
    "modulation": "adaLN_modulation.1",
    "depthwise": "dwconv",
    "mlp1": "pwconv1",
    "norm.scale": "grn.gamma",
    "norm.shift": "grn.beta",
    "mlp2": "pwconv2",
}
_FCDM_OTHERS = {
    **{f"condition.{i}.label": f"y_embedder_{i + 1}.embedding_table" for i in range(LEVELS)},
    "stem": "x_embedder",
    "down.0.conv": "down1_2.conv.0",
    "down.1.conv": "down2_3.conv.0",
    "up.1.conv": "up3_2.conv.0",
    "merge.1": "reduce_chans_2",
    "up.0.conv": "up2_1.conv.0",
    "merge.0": "reduce_chans_1",
    "output.conv1": "output_layer",
    "output.conv2": "final_layer.conv",
}


def _rules(layers: dict[str, str], others: dict[str, str]) -> Rules:
    in_blocks: Rules = [
        (rf"{re.escape(stage)}\.(\d+)\.{re.escape(layer)}(.*)", rf"{their_stage}.\1.{their_layer}\2")
        for stage, their_stage in _STAGES.items()
        for layer, their_layer in layers.items()
    ]
    rest = {**_SHARED, **others}
    return in_blocks + [(rf"{re.escape(ours)}\.(.*)", rf"{theirs}.\1") for ours, theirs in rest.items()]


_RULES: dict[type[StagedUNet], Rules] = {
    DiCo: _rules(_DICO_LAYERS, _DICO_OTHERS),
    FCDM: _rules(_FCDM_LAYERS, _FCDM_OTHERS),
}


def load_state(state: dict[str, Tensor], name: str, family: str | None = None, **overrides) -> StagedUNet:
    """The DiCo or FCDM of a state dict in its layout, which errors call `name`; `overrides` are other arguments of it.

    The keys tell which of them it is, so that no `family` needs to be told.
    """
    kind = FCDM if "latent.0.grn.gamma" in state else DiCo
    try:
        config = infer_config(state, kind)
    except KeyError as missing:
        raise UserError(f"{name} is not a whole checkpoint of {kind.__name__}: it has no {missing.args[0]}") from None
    model = kind(**{**config, **overrides})
    ours = {rename(key, _RULES[kind]): key for key in model.state_dict()}
    # FCDM keeps the vectors of its global response norm as (1, C, 1, 1).
    tensors = {ours.get(key, key): value.flatten() if ".grn." in key else value for key, value in state.items()}
    load_weights(model, tensors, name)
    return model.eval()


def infer_config(state: dict[str, Tensor], kind: type[StagedUNet]) -> dict[str, Any]:
    """The arguments that the names and shapes of a state dict tell; a KeyError names what it lacks."""
    stem, label, last, inner = (
        state[rename(f"{key}.weight", _RULES[kind])]
        for key in ("stem", "condition.0.label", "output.conv2", "mid.0.mlp1")
    )
    width, in_channels = stem.shape[:2]
    depths = [len({key.split(".")[1] for key in state if key.startswith(f"{stage}.")}) for stage in _STAGES.values()]
    return {
        "width": width,
        "depths": tuple(depths),
        "mlp_ratio": len(inner) // inner.shape[1],
        "in_channels": in_channels,
        "num_classes": len(label) - 1,
        "learn_sigma": len(last) == 2 * in_channels,
    }


def authors_state(model: StagedUNet) -> dict[str, Tensor]:
    """The weights of a DiCo or FCDM under its authors' names: the inverse of `load_state`.

    A UserError for parameters that their code does not have.
    """
    names = {key: rename(key, _RULES[type(model)]) for key in model.state_dict()}
    unknown = [key for key, name in names.items() if key == name]
    if "condition" in model.config:
        unknown.append("a condition other than classes")
    if unknown:
        kind = type(model).__name__
        raise UserError(f"the {kind} authors' code has no {kind} with {first_few(unknown, 3)}")
    return {
        names[key]: value[None, :, None, None] if ".grn." in names[key] else value
        for key, value in model.state_dict().items()
    }
