"""Several layers of one encoder as the target, against the network's own blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dic_repa.alignment.cache import cache_key
from dic_repa.data import Digits
from dic_repa.encoders import create_encoder
from dic_repa.errors import UserError

TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2, "pretrained": False, "img_size": 64}


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def run(encoder, images):
    """The tokens, and what each block that ran gave, each run, without prefix tokens and normalised: by its index."""
    found, skip = [], getattr(encoder.model, "num_prefix_tokens", 0)
    hooks = [
        block.register_forward_hook(lambda _, inputs, output, index=index: found.append((index, output[:, skip:])))
        for index, block in enumerate(encoder.model.blocks)
    ]
    tokens = encoder(images)
    for hook in hooks:
        hook.remove()
    blocks = {index: output.double().numpy() for index, output in found}
    assert len(blocks) == len(found)  # each at most once
    normalised = {
        index: (each - each.mean(-1, keepdims=True)) / np.sqrt(each.var(-1, keepdims=True) + 1e-5)
        for index, each in blocks.items()
    }
    return tokens.numpy(), normalised


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_224.mae"]
)
def test_blocks_of_a_vit_are_normalised_and_combined(name, images):
    torch.manual_seed(0)
    sums = create_encoder(f"timm:{name}", layer=[-2, 0], **TINY)
    for parameter in sums.model.parameters():
        parameter.normal_(std=0.1)  # also the final norm's, which must play no part
    tokens, blocks = run(sums, images)
    assert sorted(blocks) == [0, 1, 2]  # what is behind the last of them is not computed
    assert sums.embed_dim == 32
    np.testing.assert_allclose(tokens, blocks[0] + blocks[2], atol=1e-4)

    joined = create_encoder(f"timm:{name}", layer=[2, 0], combine="concat", **TINY)
    joined.model.load_state_dict(sums.model.state_dict())
    assert joined.embed_dim == 64
    np.testing.assert_allclose(joined(images), np.concatenate([blocks[0], blocks[2]], axis=-1), atol=1e-4)


def test_digits_vit_takes_several_layers():
    images = Digits().images[:3]
    encoder = create_encoder("digits-vit", layer=[-1, -3])
    tokens, blocks = run(encoder, images)
    np.testing.assert_allclose(tokens, blocks[0] + blocks[2], atol=1e-4)
    assert create_encoder("digits-vit", layer=[0, 1, 2], combine="concat")(images).shape == (3, 49, 3 * 96)
    torch.testing.assert_close(
        create_encoder("digits-vit", layer=[1])(images), create_encoder("digits-vit", layer=1)(images)
    )


def test_a_cache_of_other_layers_is_another():
    data, options = Digits(), [{}, {"layer": [-1, -2]}, {"layer": [-1, -3]}, {"layer": [-1, -2], "combine": "concat"}]
    keys = {cache_key("digits-vit", each, create_encoder("digits-vit", **each), data) for each in options}
    assert len(keys) == len(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": [-1, 3]}, "layer 3 does not exist: the encoder has 3 blocks, 0 to 2 or -1 to -3"),
        ({"layer": [-1, 2]}, r"layer \[-1, 2\] names no layer, or one of them twice: take different blocks"),
        ({"layer": []}, r"layer \[\] names no layer"),
        ({"layer": [0, 1.5]}, r"layer takes a whole number or a list of whole numbers, not \[0, 1.5\]"),
        ({"layer": [0, 1], "combine": "mean"}, "unknown way to combine layers 'mean'"),
    ],
)
def test_what_a_list_of_layers_may_not_be(options, message):
    with pytest.raises(UserError, match=message):
        create_encoder("digits-vit", **options)


def test_maps_of_several_stages_are_not_combined():
    with pytest.raises(UserError, match=r"layer takes a whole number, not \[1, 2\]"):
        create_encoder("efficientnet-lite0", layer=[1, 2])
