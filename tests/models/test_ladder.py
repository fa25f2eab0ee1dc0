"""The paper's ladder, from an isotropic network to DiC: MACs against the paper's, blocks against torch's functions."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch.nn import functional as F

from dic_repa.conditions import ClassLabels
from dic_repa.errors import UserError
from dic_repa.models import DiC, measure_cost
from dic_repa.recipe import load_recipe
from dic_repa.recipe.build import build_denoiser

# Rung by rung, the GMACs at 32x32 where the paper states them.
PUBLISHED = {
    "ladder-1-isotropic": 115.6,
    "ladder-2-isotropic-skips": 117.1,
    "ladder-3-unet-dense-skips": 115.2,
    "ladder-4-sparse-skips": None,
    "ladder-5-level-embeddings": None,
    "ladder-6-mid-modulation": None,
    "ladder-7-gates": None,
    "ladder-8-gelu": 116.1,
}


def tiny(depths=(2, 2, 2, 2, 2), **options) -> DiC:
    torch.manual_seed(0)
    model = DiC(8, depths, in_channels=3, num_classes=5, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@functools.cache
def rung(name: str):
    with torch.device("meta"):
        return build_denoiser(load_recipe(name).model, 4, ClassLabels(1000))


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_rungs_have_the_papers_macs(name):
    gmacs = measure_cost(rung(name), 32).macs / 1e9
    assert gmacs == pytest.approx(PUBLISHED[name] or 116.1, rel=0.01 if PUBLISHED[name] else 0.02)


def test_each_rung_changes_what_its_name_says():
    models = [rung(name) for name in PUBLISHED]
    configs = [model.config for model in models]
    differing = [{key for key in a if a[key] != b[key]} for a, b in itertools.pairwise(configs)]
    assert differing == [
        {"skips", "depths"},
        {"shape", "depths"},
        {"skips", "depths"},
        {"embedding"},
        {"block"},
        {"block"},
        {"block"},
    ]
    with torch.device("meta"):
        dic_xl = DiC.from_preset("DiC-XL", learn_sigma=True)
    assert models[-1].config == dic_xl.config


def test_blocks_are_what_the_paper_says():
    """Each block written out with torch's functions."""
    x, c = torch.randn(2, 32, 8, 8), torch.randn(2, 32)

    def norm(h, layer):
        return F.group_norm(h, 8, layer.weight, layer.bias, 1e-5)

    def conv(h, layer):
        return F.conv2d(h, layer.weight, layer.bias, padding=1)

    def modulation(block, parts):
        return F.linear(c, block.modulation.weight, block.modulation.bias).view(2, parts, 32, 1, 1).unbind(1)

    block = tiny(block="early-modulation").mid[0]
    scale, shift = modulation(block, 2)
    h = conv(F.silu(norm(x, block.norm1) * (1 + scale) + shift), block.conv1)
    torch.testing.assert_close(block(x, c), x + conv(F.silu(norm(h, block.norm2)), block.conv2))

    block = tiny(block="mid-modulation").mid[0]
    scale, shift = modulation(block, 2)
    h = conv(F.silu(norm(x, block.norm1)), block.conv1)
    torch.testing.assert_close(block(x, c), x + conv(F.silu(norm(h, block.norm2) * (1 + scale) + shift), block.conv2))

    block = tiny(block="gated").mid[0]
    gate, scale, shift = modulation(block, 3)
    h = conv(F.silu(norm(x, block.norm1)), block.conv1)
    torch.testing.assert_close(
        block(x, c), x + gate * conv(F.silu(norm(h, block.norm2) * (1 + scale) + shift), block.conv2)
    )


def test_dense_skips_reach_every_decoder_block():
    for skips, blocks in (("dense", 8), ("sparse", 4), ("none", 0)):
        model = tiny((4, 4, 1, 4, 4), skips=skips)
        joined = [block for stage in model.dec for block in stage if block.conv1.in_channels > block.conv2.in_channels]
        assert len(joined) == blocks


def test_isotropic_keeps_width_and_resolution():
    model, shapes = tiny(shape="isotropic", skips="dense"), set()
    for block in model.blocks():
        block.register_forward_hook(lambda _m, _i, output: shapes.add(tuple(output.shape)))
    model(torch.randn(1, 3, 12, 8), torch.rand(1), torch.tensor([1]))
    assert shapes == {(1, 8, 12, 8)}


def test_a_shared_embedding_is_one():
    assert len(tiny(embedding="shared").condition) == 1
    assert {block.modulation.in_features for block in tiny(embedding="shared").blocks()} == {8}
    assert {block.modulation.in_features for block in tiny().blocks()} == {8, 16, 32}


@pytest.mark.parametrize(
    "options",
    [
        {"shape": "isotropic", "skips": "none", "embedding": "shared", "block": "early-modulation"},
        {"skips": "dense", "embedding": "shared", "block": "mid-modulation"},
        {"block": "gated"},
    ],
)
def test_a_rung_is_saved_with_its_options(tmp_path, options):
    model = tiny(**options)
    model.save_pretrained(tmp_path)
    again = DiC.from_pretrained(tmp_path)
    arguments = (torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 5]))
    torch.testing.assert_close(again(*arguments), model.eval()(*arguments), rtol=0, atol=0)
    model.set_gradient_checkpointing()
    model(*arguments).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "unett"}, "unknown shape 'unett'; did you mean unet?"),
        ({"skips": "sparce"}, "did you mean sparse?"),
        ({"embedding": "share"}, "did you mean shared?"),
        ({"block": "gate"}, "did you mean gated?"),
        ({"block": "mid-modulation", "zero_gates": True}, "zero_gates needs blocks with gates"),
    ],
)
def test_unknown_options_name_the_near_ones(options, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        tiny(**options)
