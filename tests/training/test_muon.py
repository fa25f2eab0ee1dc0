"""Muon: its step against a singular value decomposition and torch's own Muon, and which parameters it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dic_repa.errors import UserError
from dic_repa.models import create_denoiser
from dic_repa.recipe import OptimizerSection
from dic_repa.training.muon import Muon, orthogonal
from dic_repa.training.optimizers import build_optimizer, hidden_matrices

SIZES = [(12, 20), (30, 7), (1, 4)]


def jordans_polynomial(s: np.ndarray) -> np.ndarray:
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("size", SIZES)
def test_a_step_has_the_gradients_singular_vectors(size):
    """Of X = U S V', it is U f(S / |X|) V' with f on each singular value by itself; so nearly UV'."""
    x = np.random.default_rng(0).standard_normal(size)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    values = jordans_polynomial(s / np.linalg.norm(s))
    assert values.min() > 0.68
    assert values.max() < 1.21
    found = orthogonal(torch.tensor(x, dtype=torch.float32))
    np.testing.assert_allclose(found, u @ np.diag(values) @ vt, atol=2e-5)


def test_a_convolution_is_the_matrix_of_its_outputs():
    """The first step of a kernel, laid out either way, is 0.2 sqrt(36) times the matrix U f(S) V'."""
    gradient = np.random.default_rng(1).standard_normal((8, 36))
    u, s, vt = np.linalg.svd(gradient, full_matrices=False)
    expected = -0.01 * 0.2 * 6 * u @ np.diag(jordans_polynomial(s / np.linalg.norm(s))) @ vt
    for layout in (torch.contiguous_format, torch.channels_last):
        kernel = nn.Parameter(torch.zeros(8, 4, 3, 3).to(memory_format=layout))
        kernel.grad = torch.tensor(gradient, dtype=torch.float32).reshape(8, 4, 3, 3).to(memory_format=layout)
        Muon([kernel], [], lr=0.01).step()
        np.testing.assert_allclose(kernel.detach().flatten(1), expected, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
def test_muon_is_torchs():
    """In bfloat16, as torch computes it, the orthogonal matrix is off by 0.01."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(size)) for size in SIZES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    bias, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Muon(ours, [bias], 0.01, weight_decay=0.1, others_rate=0.5)
    muon = torch.optim.Muon(theirs, 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([other], 0.005, weight_decay=0.1)
    for _ in range(4):
        for p, q in zip([*ours, bias], [*theirs, other]):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=4 * 0.01 * 0.2 * max(p.shape) ** 0.5 * 0.015)
    torch.testing.assert_close(bias, other)


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (create_denoiser("DiC", width=8, depths=[1, 1, 1, 1, 1]), ["stem", "output.conv2", "condition.0.label"]),
        (create_denoiser("FCDM", width=4, depths=[1, 1, 1, 1, 1]), ["stem", "output.conv2", "condition.0.label"]),
        (create_denoiser("SiT", width=32, depth=1, num_heads=2), ["patches.proj", "output.linear", "condition.label"]),
        (
            create_denoiser("U-ViT", width=16, depth=3, num_heads=2, size=16),
            ["patches.proj", "linear", "conv", "label"],
        ),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.PReLU(4), nn.Conv2d(4, 1, 3)), ["0", "3"]),
    ],
)
def test_hidden_matrices_are_all_but_ends_and_embeddings(model, left):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = {names[id(parameter)] for parameter in hidden_matrices(model)}
    weights = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    tables = {name for name in weights if ".label." in name or name == "positions"}  # of the other levels, too
    assert chosen == weights - tables - {f"{name}.weight" for name in left}
    model.requires_grad_(False)
    assert hidden_matrices(model) == []


def test_patterns_name_further_parameters_of_adamw():
    model = create_denoiser("DiC", width=8, depths=[1, 1, 1, 1, 1])
    section = OptimizerSection(name="muon", options={"others": ["*.modulation.*"]})
    muons, adamws = (group["params"] for group in build_optimizer(section, model).param_groups)
    for name, parameter in model.named_parameters():
        assert sum(parameter is each for each in adamws) == 1 - sum(parameter is each for each in muons), name
        if ".modulation." in name:
            assert any(parameter is each for each in adamws), name
    wrong = OptimizerSection(name="muon", options={"others": ["*.modulatoin.*"]})
    with pytest.raises(UserError, match=r"optimizer.options.others: no parameter .* '\*.modulatoin.\*'"):
        build_optimizer(wrong, model)
    with pytest.raises(UserError, match="momentum 1"):
        build_optimizer(OptimizerSection(name="muon", options={"momentum": 1.0}), model)
