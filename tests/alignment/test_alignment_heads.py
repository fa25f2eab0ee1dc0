"""Heads and targets against direct formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dic_repa.alignment import AlignedDenoiser, Alignment, heads, targets
from dic_repa.errors import UserError

GRID = (6, 8)


@pytest.fixture
def feature():
    return torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))


def up(maps):
    return F.interpolate(maps, GRID, mode="bilinear")


def tokens(maps):
    return maps.flatten(2).mT


def conv(layer: nn.Linear, maps):
    """A linear layer as a 1x1 convolution."""
    return F.conv2d(maps, layer.weight[:, :, None, None], layer.bias)


def test_linear_head(feature):
    head = heads.find("linear")(5, 7, GRID)
    torch.testing.assert_close(head(feature, torch.rand(2)), tokens(up(conv(head.layer, feature))))


def test_conv_head_sees_three_by_three(feature):
    head = heads.find("conv")(5, 7, GRID)
    assert head.layer.weight.shape == (7, 5, 3, 3)
    expected = F.conv2d(F.pad(feature, (1, 1, 1, 1)), head.layer.weight, head.layer.bias)
    torch.testing.assert_close(head(feature, torch.rand(2)), tokens(up(expected)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "mlp-upsample-between", "mlp-upsample-first", "time-aware"])
def test_projections_start_as_large_as_repas(name):
    """Xavier's variance 2 / (fan in + fan out), and what is left of a normal's square behind each SiLU."""
    torch.manual_seed(0)
    head = heads.find(name)(1152, 768, (8, 8))
    assert all(layer.bias.abs().max() == 0 for layer in head.layers if isinstance(layer, nn.Linear))
    z = torch.randn(2_000_000, generator=torch.Generator().manual_seed(1))
    rms, widths = 1.0, [1152, 2048, 2048, 768]
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        rms = (F.silu(rms * z) if index else z).square().mean().sqrt().item() * (2 * before / (before + after)) ** 0.5
    projected = head(torch.randn(8, 1152, 8, 8), torch.rand(8)).square().mean().sqrt().item()
    assert projected == pytest.approx(rms, rel=0.02)
    assert projected == pytest.approx(0.316, rel=0.02)  # measured with REPA's projector; PyTorch's own start: 0.055


@torch.no_grad()
def test_irepas_convolution_starts_from_pytorchs_values():
    torch.manual_seed(0)
    weight = heads.find("conv")(64, 32, (8, 8)).layer.weight
    assert weight.abs().max().item() == pytest.approx((9 * 64) ** -0.5, rel=0.01)  # uniform within 1 / sqrt(fan in)


@pytest.mark.parametrize("name", ["mlp", "mlp-upsample-between", "mlp-upsample-first"])
def test_the_three_places_of_the_upsampling(name, feature):
    head = heads.find(name)(5, 7, GRID, hidden=9)
    first, second, third = (layer for layer in head.layers if isinstance(layer, nn.Linear))
    place = ["mlp-upsample-first", "mlp-upsample-between", "mlp"].index(name)
    maps = up(feature) if place == 0 else feature
    maps = F.silu(conv(first, maps))
    maps = up(maps) if place == 1 else maps
    maps = conv(third, F.silu(conv(second, maps)))
    maps = up(maps) if place == 2 else maps
    torch.testing.assert_close(head(feature, torch.rand(2)), tokens(maps))


def test_time_aware_head_scales_and_shifts_by_the_time(feature):
    torch.manual_seed(0)
    head = heads.find("time-aware")(5, 7, GRID, hidden=9)
    plain = heads.find("mlp")(5, 7, GRID, hidden=9)
    plain.load_state_dict({key: value for key, value in head.state_dict().items() if key.startswith("layers")})
    t = torch.tensor([0.25, 1.0])
    torch.testing.assert_close(head(feature, t), plain(feature, t))  # at first: gamma 1, beta 0

    last = head.time[-1]
    nn.init.normal_(last.weight, std=0.1)
    nn.init.normal_(last.bias)
    angles = 1000 * t.double()[:, None] * 10_000 ** (-torch.arange(128).double() / 128)
    sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    gamma, beta = last(F.silu(head.time[0](sinusoids))).chunk(2, dim=1)
    expected = plain(feature, t) * (1 + gamma[:, None]) + beta[:, None]
    torch.testing.assert_close(head(feature, t), expected, rtol=1e-3, atol=1e-3)
    # The same feature at another time is another projection.
    same = feature[:1].repeat(2, 1, 1, 1)
    assert not torch.allclose(*head(same, t))


def test_spatial_norm_is_the_formula_of_irepa():
    y = torch.randn(3, 10, 4) * 5 + 2
    array = y.double().numpy()
    mean, std = array.mean(axis=1, keepdims=True), array.std(axis=1, keepdims=True, ddof=1)
    expected = (array - 0.6 * mean) / (std + 1e-6)
    np.testing.assert_allclose(targets.find("spatial-norm")()(y).numpy(), expected, rtol=1e-4, atol=1e-5)
    half = targets.find("spatial-norm")(gamma=1.0)(y.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.mean(dim=1), torch.zeros(3, 4), atol=1e-4, rtol=0)


def test_the_loss_compares_with_the_transformed_target():
    h, y = torch.randn(2, 6, 8), torch.randn(2, 6, 8) + 3
    normed = Alignment("mid.0", nn.Identity(), target={"name": "spatial-norm", "gamma": 1.0})
    z = (y - y.mean(1, keepdim=True)) / (y.std(1, keepdim=True) + 1e-6)
    expected = Alignment("mid.0", nn.Identity()).loss(h, z, torch.rand(2))[0]
    torch.testing.assert_close(normed.loss(h, y, torch.rand(2))[0], expected)


def test_heads_see_the_time_between_0_and_1():
    class Recorder(nn.Module):
        def forward(self, feature, t):
            self.seen = t
            return feature

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Identity()

        def forward(self, x, t, y):
            self.seen = t
            return self.body(x)

    head, denoiser = Recorder(), Denoiser()
    aligned = AlignedDenoiser(denoiser, [Alignment("body", head)])
    steps, unit = torch.tensor([0, 999]), torch.tensor([0.001, 1.0])
    aligned(torch.zeros(2, 1, 4, 4), steps, None, unit)
    assert head.seen is unit
    assert denoiser.seen is steps
    aligned(torch.zeros(2, 1, 4, 4), unit, None)
    assert head.seen is unit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "spatial"}, "unknown target 'spatial'; did you mean spatial-norm"),
        ({"target": {"name": "spatial-norm", "gama": 1}}, "option of target 'spatial-norm'.*did you mean gamma"),
        ({"time_weight": "v"}, "unknown time weight 'v'"),
        ({"schedule": "cosin"}, "unknown alignment schedule 'cosin'; did you mean cosine"),
        ({"schedule": "stop"}, "'stop'.*steps"),
    ],
)
def test_unknown_parts_list_the_near_ones(options, message):
    with pytest.raises(UserError, match=message):
        Alignment("mid.0", nn.Identity(), **options)
