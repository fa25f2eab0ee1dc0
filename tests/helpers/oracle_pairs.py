"""A denoiser beside its oracle, and how their outputs and gradients are compared."""

from __future__ import annotations

import torch
from oracle import OracleDiC

from dic_repa.models import DiC

TOLERANCE = 1e-4


def pair(oracle=OracleDiC, width=16, depths=(4, 4, 2, 4, 4), **options):
    torch.manual_seed(0)
    model = DiC(width, depths, in_channels=3, num_classes=5, time_scale=10.0, **options)
    for name, parameter in model.named_parameters():  # the output starts at zero, which would hide all behind it
        if name.startswith(("output", "condition")) or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model, oracle(model)


def inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 16, 8, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.tensor([0, 5, 2])[:batch]


def outputs_and_gradients(call, model, arguments):
    x, t, y = arguments
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    out = call(x, t, y)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"output": out.detach(), "input": x.grad, **gradients}


def assert_close(actual, expected):
    """Each tensor as a whole: its error is at most TOLERANCE of its size."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert (actual[name] - value).norm() <= TOLERANCE * value.norm(), name
