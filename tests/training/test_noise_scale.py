"""The gradient noise scale: on a Gaussian problem whose own is known, and in runs."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from small_runs import assert_same, metrics, small_run, weights
from torch import nn

from dic_repa.training.noise_scale import NoiseScale


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_of_a_gaussian_it_is_the_trace_over_the_mean_squared():
    """Of |w - x|^2 / 2 with x from N(mu, diag(s^2)), an image's gradient is w - x: G is w - mu, Sigma diag(s^2)."""
    generator = torch.Generator().manual_seed(0)
    w, mu = nn.Parameter(torch.randn(2000, generator=generator)), torch.randn(2000, generator=generator)
    s = torch.linspace(1, 5, 2000)
    known = (s.square().sum() / (w.detach() - mu).square().sum()).item()
    scale = NoiseScale(nn.ParameterList([w]), Accelerator(cpu=True), batch=8, passes=4)
    assert scale.value() is None
    for _ in range(40):
        w.grad = None
        with scale.measuring():
            for _ in range(4):
                x = mu + s * torch.randn(2, 2000, generator=generator)
                ((w - x).square().sum(1) / 2).mean().div(4).backward()
        found = scale.measure(w.grad.norm())
    assert found == pytest.approx(known, rel=0.1)
    before, norm = scale.state(), torch.tensor(float("nan"))
    assert scale.measure(norm) == found  # a step that was skipped says nothing
    assert scale.state() == before
    with scale.measuring():
        (gradient,) = torch.autograd.grad(w.sin().sum(), w)
    assert torch.equal(gradient, w.cos())  # it changes no gradient
    assert not w._backward_hooks
    alone = NoiseScale(nn.ParameterList([w]), Accelerator(cpu=True), batch=8, passes=1)  # nothing to compare with
    assert not alone.measurable
    assert alone.measure(w.grad.norm()) is None


def test_under_fp16_it_counts_by_the_scale_that_the_gradients_had():
    """The scaler's own change comes before the log asks."""
    w, scales = nn.Parameter(torch.randn(5)), iter([1024.0, 2048.0])
    scaler = SimpleNamespace(get_scale=lambda: next(scales))
    accelerator = SimpleNamespace(num_processes=1, scaler=scaler, reduce=lambda values, _how: values)
    scale = NoiseScale(nn.ParameterList([w]), accelerator, batch=2, passes=2)
    x = torch.randn(2, 5)
    with scale.measuring():
        for row in x:
            (1024 * (w * row).sum() / 2).backward()
    next(scales)  # it has grown
    scale.measure(x.mean(0).norm())
    small, whole = x.square().sum(1).mean().item(), x.mean(0).square().sum().item()
    assert scale.state() == pytest.approx([0.1 * (2 * whole - small), 0.1 * (small - whole) / 0.5], rel=1e-4)


def test_a_resumed_run_logs_the_same(tmp_path):
    keys = ["train.micro_batch=2", "train.steps=4", "train.checkpoint_every=2", "train.log_every=1"]
    whole = small_run(tmp_path / "whole", *keys)
    cut = small_run(tmp_path / "cut", *keys)
    shutil.rmtree(cut.checkpoint_path(4))
    small_run(cut.path, *keys, resume=True)
    scales = [record["noise_scale"] for record in metrics(whole)]
    assert len(scales) == 4
    assert scales[-1] is None or scales[-1] > 0
    assert [record["noise_scale"] for record in metrics(cut)][-2:] == scales[-2:]
    assert_same(weights(cut.checkpoint_path(4)), weights(whole.checkpoint_path(4)))
