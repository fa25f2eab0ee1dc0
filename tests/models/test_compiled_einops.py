"""Compiled as one graph: what changes the shape of tokens and maps leaves no break in it."""

from __future__ import annotations

import pytest
import torch

from dic_repa.alignment import AlignedDenoiser, Alignment
from dic_repa.models import create_denoiser

SIZES = {
    "DiC": {"width": 8, "depths": (1, 1, 1, 1, 1)},
    "SiT": {"width": 32, "depth": 2, "num_heads": 2},
    "U-ViT": {"width": 32, "depth": 3, "num_heads": 2, "size": 8},
}


@pytest.mark.parametrize(("name", "tap"), [("DiC", "mid.0"), ("SiT", "blocks.0"), ("U-ViT", "mid")])
def test_aligned_denoiser_is_one_graph(name, tap):
    """The denoiser, its tap, a head with its resizing and the alignment's loss, forwards and backwards."""
    torch.compiler.reset()
    torch.manual_seed(0)
    denoiser = create_denoiser(name, 1, 10, **SIZES[name])
    alignment = Alignment.build(denoiser, tap, 6, (4, 4), (8, 8), head="mlp-upsample-between", hidden=8)
    model, head = AlignedDenoiser(denoiser, [alignment]), alignment.head
    x, t, y, target = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([3, 10]), torch.randn(2, 16, 6)

    def loss(x, t, y):
        out = model(x, t, y)
        return out.prediction.square().mean() + alignment.loss(out.projections[0], target, t)[0]

    plain = torch.autograd.grad(loss(x, t, y), head.parameters())
    compiled = torch.autograd.grad(torch.compile(loss, backend="eager", fullgraph=True)(x, t, y), head.parameters())
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
