"""Triton's kernels against torch's operations: run by `test_kernels.py`, on a GPU, or without one in an interpreter.

TRITON_INTERPRET=1 python -m pytest -n 0 tests/models/kernel_cases.py
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dic_repa.models import DiC, kernel_choice
from dic_repa.models.kernels import INTERPRETED, gated_residual, norm_gelu

DEVICE = "cpu" if INTERPRETED else "cuda"
LAST = torch.channels_last
# The relative error of sums of the type's own rounding, and of float32 within.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
CASES = [  # batch, channels, groups, height, width, type, modulated, biased, mean of x
    (3, 24, 6, 5, 7, torch.float32, True, True, 0.0),
    (1, 36, 9, 9, 4, torch.float32, False, False, 0.0),  # four channels in a group, 36 are no power of two
    (1, 24, 2, 33, 33, torch.bfloat16, True, True, 0.0),  # twelve in a group, several chunks of rows
    (2, 40, 10, 1, 1, torch.float16, True, False, 0.0),
    (1, 1536, 32, 3, 2, torch.float32, True, True, 0.0),
    (1, 24, 6, 16, 16, torch.float32, False, True, 100.0),  # a mean of a hundred deviations
    (1, 26, 13, 8, 3, torch.bfloat16, False, False, 0.0),
]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.detach().double().cpu() - expected.detach().cpu()).norm()
    return float(difference / expected.detach().norm().clamp_min(1e-12))


def random_case(batch, channels, groups, height, width, dtype, modulated, biased, mean):
    """x, norm, scale, shift and bias in float64, with x a number of the type."""
    generator = torch.Generator().manual_seed(channels)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = (draw(batch, channels, height, width) + mean).to(dtype).double().contiguous(memory_format=LAST)
    norm = nn.GroupNorm(groups, channels).double()
    norm.weight.data, norm.bias.data = 1 + 0.5 * draw(channels), draw(channels)
    scale, shift = (draw(batch, channels), draw(batch, channels)) if modulated else (None, None)
    return x, norm, scale, shift, draw(channels) if biased else None


def as_written(x, norm, scale=None, shift=None, bias=None):
    h = norm(x if bias is None else x + bias[:, None, None])
    return F.gelu(h if scale is None else h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def given(*tensors):
    return [tensor.requires_grad_() for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_and_gelu(case):
    dtype = case[5]
    x, norm, *others = random_case(*case)
    leaves = given(x, norm.weight, norm.bias, *others)
    y = as_written(x, norm, *others)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype).double()
    expected = torch.autograd.grad(y, leaves, dy)

    ours = nn.GroupNorm(norm.num_groups, norm.num_channels, device=DEVICE)
    ours.load_state_dict(norm.state_dict())
    x = x.detach().to(DEVICE, dtype, memory_format=LAST)
    others = [None if other is None else other.detach().float().to(DEVICE) for other in others]
    leaves = given(x, ours.weight, ours.bias, *others)
    scale, shift, bias = others
    if scale is not None:
        scale, shift = torch.cat([scale, shift], dim=1).chunk(2, dim=1)  # side by side, as a layer gives them
    found = norm_gelu(x, ours, scale, shift, bias)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=LAST)
    tolerance = TOLERANCES[dtype] * (50 if case[8] else 1)  # float32 holds a hundredth of a large mean less well
    assert relative(found, y) < tolerance
    gradients = torch.autograd.grad(found, leaves, dy.to(DEVICE, dtype))
    assert gradients[0].is_contiguous(memory_format=LAST)
    assert [relative(g, e) < tolerance for g, e in zip(gradients, expected)] == [True] * len(expected)


def test_other_layouts_are_read_as_they_are():
    torch.manual_seed(0)
    x, h, gate, norm = torch.randn(2, 8, 3, 4), torch.randn(2, 8, 3, 4), torch.randn(2, 8), nn.GroupNorm(2, 8)
    x, h, gate, norm = (each.to(DEVICE) for each in (x, h, gate, norm))
    torch.testing.assert_close(norm_gelu(x, norm), F.gelu(norm(x)))
    torch.testing.assert_close(gated_residual(x, h, gate), x + gate[:, :, None, None] * h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_gate(dtype, biased):
    generator = torch.Generator().manual_seed(0)
    x, h, dy = (torch.randn(2, 36, 7, 5, generator=generator).to(dtype) for _ in range(3))
    gate, bias = torch.randn(2, 36, generator=generator), torch.randn(36, generator=generator) if biased else None
    exact = [None if tensor is None else tensor.double() for tensor in (x, h, gate, bias)]
    leaves = given(*exact)
    y = exact[0] + exact[2][:, :, None, None] * (exact[1] + (exact[3][:, None, None] if biased else 0))
    expected = torch.autograd.grad(y, leaves, dy.double())
    x, h, dy = (tensor.to(DEVICE, memory_format=LAST) for tensor in (x, h, dy))
    gate, bias = gate.to(DEVICE), None if bias is None else bias.to(DEVICE)
    ours = given(x, h, gate, bias)
    found = gated_residual(x, h, gate, bias)
    assert relative(found, y) < TOLERANCES[dtype]
    gradients = torch.autograd.grad(found, ours, dy)
    assert [relative(g, e) < TOLERANCES[dtype] for g, e in zip(gradients, expected)] == [True] * len(ours)


def test_derivatives_by_differences():
    x, norm, scale, shift, bias = random_case(2, 6, 2, 3, 2, torch.float64, True, True, 0.0)
    x, scale, shift, bias = (t.to(DEVICE).requires_grad_() for t in (x, scale, shift, bias))
    weights = given(norm.to(DEVICE).weight, norm.bias)

    def of_norm(x, scale, shift, bias, *weights):
        return torch.ops.dic_repa.norm_gelu(x, *weights, scale, shift, bias, 2, 1e-5)[0]

    assert torch.autograd.gradcheck(of_norm, (x, scale, shift, bias, *weights), fast_mode=True)
    assert torch.autograd.gradcheck(gated_residual, (x, x.detach() ** 2, scale, bias), fast_mode=True)


def test_operations_are_registered_as_torch_wants_them():
    x, norm, *others = random_case(2, 12, 3, 4, 4, torch.float32, True, True, 0.0)
    x, *rest = (t.detach().float().to(DEVICE).requires_grad_() for t in (x, norm.weight, norm.bias, *others))
    x = x.detach().contiguous(memory_format=LAST).requires_grad_()
    torch.library.opcheck(torch.ops.dic_repa.norm_gelu.default, (x, *rest, 3, 1e-5))
    torch.library.opcheck(torch.ops.dic_repa.gated_residual.default, (x, x.detach() ** 2, rest[2], rest[4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_before_kernels_are_used(dtype, monkeypatch):
    device = torch.device(DEVICE)
    kernel_choice.compare_with_plain(device, dtype)
    monkeypatch.setattr("dic_repa.models.kernels.gated_residual", lambda x, h, gate, bias: gated_residual(x, h, gate))
    with pytest.raises(AssertionError, match="not close"):
        kernel_choice.compare_with_plain(device, dtype)


@pytest.fixture
def chosen(monkeypatch):
    """Kernels for whatever is in channels_last, and how often they were asked for."""
    asked = []

    def fits(x):
        asked.append(x)
        return x.is_contiguous(memory_format=LAST)

    monkeypatch.setattr(kernel_choice, "fits", fits)
    monkeypatch.setattr(kernel_choice, "kernels_work", lambda device: True)
    return asked


def small(depths=(1, 1, 1), **options):
    torch.manual_seed(0)
    model = DiC(8, depths, num_classes=3, **options).to(DEVICE)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def outputs(model, autocast=False, called=None):
    """A prediction, and the gradients of all weights."""
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(2, 4, 8, 8, generator=generator).to(DEVICE), torch.tensor([0.3, 0.8], device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = (model if called is None else called)(x, t, torch.tensor([0, 3], device=DEVICE))
    return [out, *torch.autograd.grad(out.float().square().sum(), model.parameters())]


@pytest.mark.parametrize("how", ["checkpointed", "autocast", "compiled"])
def test_dic_by_kernels(chosen, how):
    # Compiling takes long, and more blocks are no other code.
    model = small((1,) if how == "compiled" else (1, 1, 1), gradient_checkpointing=how == "checkpointed")
    backend = "aot_eager" if INTERPRETED else "inductor"
    called = torch.compile(model, backend=backend, fullgraph=True) if how == "compiled" else None
    found = outputs(model, how == "autocast", called)
    assert chosen
    kernel_choice.set_kernels(model, "off")
    chosen.clear()
    exact, plain = outputs(model), outputs(model, how == "autocast")
    assert not chosen
    limit = 1e-5 if how != "autocast" else 2 * max(relative(p, e.double()) for p, e in zip(plain, exact))
    assert max(relative(f, e.double()) for f, e in zip(found, exact)) < limit
    torch._dynamo.reset()
