"""Alignment against the REPA authors' loss, direct formulas, and modules that are no DiC."""

from __future__ import annotations

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from dic_repa.alignment import AlignedDenoiser, Alignment, manifold_loss, register_head, token_loss
from dic_repa.errors import UserError
from dic_repa.models import DiC


def test_token_loss_is_the_reference():
    reference = load_file(DATA / "repa_reference.safetensors")
    losses = [token_loss(reference[f"align.pred{i}"], reference[f"align.target{i}"]).mean() for i in (0, 1)]
    torch.testing.assert_close(sum(losses) / 2, reference["align.loss"][0], rtol=1e-6, atol=1e-6)


def test_manifold_loss_is_the_mean_over_pairs():
    h, y = torch.randn(2, 5, 8), torch.randn(2, 5, 3)
    expected = torch.zeros(2)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                target = F.cosine_similarity(y[b, i], y[b, j], dim=0)
                expected[b] += (target - F.cosine_similarity(h[b, i], h[b, j], dim=0)) ** 2 / 25
    torch.testing.assert_close(manifold_loss(h, y), expected)


def test_losses_vanish_on_a_perfect_projection():
    y = torch.randn(2, 6, 4)
    torch.testing.assert_close(token_loss(3 * y, y), torch.full((2,), -1.0))
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    torch.testing.assert_close(manifold_loss(y @ rotation, y), torch.zeros(2))  # blind to a rotation, as it should be


@pytest.mark.parametrize("loss", [token_loss, manifold_loss])
def test_losses_are_float32_under_autocast(loss):
    """1e-6 squared is zero in half precision, and normalising it gives NaN there."""
    h, y = torch.randn(2, 4, 8) * 1e-6, torch.randn(2, 4, 8)
    exact = loss(h.double(), y.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(h, y)
    assert value.dtype == torch.float32
    assert exact.dtype == torch.float64
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)


def test_mlp_head_projects_first_and_upsamples_after():
    alignment = Alignment.build(tiny(), "mid.0", embed_dim=6, grid=(8, 8), size=(16, 16), hidden=10)
    feature, head = torch.randn(2, 32, 4, 4), alignment.head
    linears = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linears] == [10, 10, 6]
    tokens = feature.flatten(2).mT
    for layer in linears[:-1]:
        tokens = F.silu(layer(tokens))
    projected = linears[-1](tokens).mT.reshape(2, 6, 4, 4)
    expected = F.interpolate(projected, (8, 8), mode="bilinear").flatten(2).mT
    torch.testing.assert_close(head(feature, torch.rand(2)), expected)


def tiny() -> DiC:
    return DiC(8, (1, 1, 2, 1, 1), in_channels=3, num_classes=5)


class Plain(nn.Module):
    """A denoiser that knows nothing of this library."""

    in_channels = 3

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.SiLU(), nn.Conv2d(7, 3, 3, padding=1))

    def forward(self, x, t, y):
        return self.body(x)


def test_several_alignments_of_a_foreign_denoiser():
    denoiser = Plain()
    alignments = [
        Alignment.build(denoiser, "body.0", 4, (8, 8), size=(8, 8), hidden=5),
        Alignment.build(denoiser, "body.1", 6, (2, 2), size=(8, 8), hidden=5),
        Alignment.build(denoiser, "body.1", 9, (4, 4), size=(8, 8), hidden=5),
    ]
    aligned = AlignedDenoiser(denoiser, alignments)
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1])
    out = aligned(x, t, y)
    torch.testing.assert_close(out.prediction, denoiser(x, t, y))
    assert [tuple(p.shape) for p in out.projections] == [(2, 64, 4), (2, 4, 6), (2, 16, 9)]
    expected = alignments[1].head(denoiser.body[1](denoiser.body[0](x)), t)
    torch.testing.assert_close(out.projections[1], expected)

    targets = [torch.randn_like(p) for p in out.projections]
    losses = [a.loss(p, z, t)[0] for a, p, z in zip(alignments, out.projections, targets)]
    sum(losses).backward()
    assert all(p.grad is not None for a in alignments for p in a.parameters())
    assert denoiser.body[0].weight.grad.abs().sum() > 0
    assert denoiser.body[2].weight.grad is None  # behind the taps


def test_loss_is_the_weighted_sum_of_its_terms():
    alignment = Alignment("mid.0", nn.Identity(), weight=0.5, manifold_weight=3.0)
    h, y = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    loss, terms = alignment.loss(h, y, torch.rand(4))
    torch.testing.assert_close(loss, 0.5 * (token_loss(h, y).mean() + 3 * manifold_loss(h, y).mean()))
    torch.testing.assert_close(terms["token"], token_loss(h, y).mean())
    assert not terms["token"].requires_grad


def test_the_weight_of_the_manifold_is_the_key_or_the_losses_own_option():
    h, y = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    for loss, w in (("u-repa", 2.0), ({"name": "u-repa"}, 2.0), ({"name": "u-repa", "manifold_weight": 5.0}, 5.0)):
        alignment = Alignment("mid.0", nn.Identity(), weight=1.0, manifold_weight=2.0, loss=loss)
        expected = token_loss(h, y).mean() + w * manifold_loss(h, y).mean()
        torch.testing.assert_close(alignment.loss(h, y, torch.rand(4))[0], expected)


def test_encoder_and_heads_are_where_they_belong():
    denoiser = tiny()
    names = set(denoiser.state_dict())
    aligned = AlignedDenoiser(denoiser, [Alignment.build(denoiser, "mid.1", 4, (4, 4), size=(16, 16), hidden=5)])
    assert set(denoiser.state_dict()) == names  # untouched
    assert {name.split(".")[0] for name in aligned.state_dict()} == {"denoiser", "alignments"}


def test_unknown_names_list_the_near_ones():
    build = {"denoiser": tiny(), "embed_dim": 4, "grid": (4, 4), "size": (16, 16)}
    with pytest.raises(UserError, match=r"unknown tap 'mid.7'; did you mean mid"):
        Alignment.build(tap="mid.7", **build)
    with pytest.raises(UserError, match=r"unknown head 'mlpp'; did you mean mlp"):
        Alignment.build(tap="mid.0", head="mlpp", **build)
    with pytest.raises(UserError, match="unknown option of head 'mlp'"):
        Alignment.build(tap="mid.0", hiden=3, **build)
    with pytest.raises(UserError, match=r"tap 'condition.0' gives a tensor of shape \(1, 8\)"):
        Alignment.build(tap="condition.0", **build)


def test_a_head_of_ones_own():
    @register_head("test-mean")
    class MeanHead(nn.Module):
        def __init__(self, channels, embed_dim, grid, bias=True):
            super().__init__()
            self.tokens, self.linear = grid[0] * grid[1], nn.Linear(channels, embed_dim, bias=bias)

        def forward(self, feature, t):
            return self.linear(feature.mean((2, 3)))[:, None].expand(-1, self.tokens, -1)

    alignment = Alignment.build(tiny(), "mid.0", 4, (2, 3), size=(16, 16), head="test-mean", bias=False)
    assert alignment.head(torch.randn(2, 32, 4, 4), torch.rand(2)).shape == (2, 6, 4)
    assert alignment.head.linear.bias is None
