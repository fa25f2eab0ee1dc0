"""Objectives: the exact predictor's loss is the least, and a trained denoiser samples in any dtype."""

from __future__ import annotations

import pytest
import torch

from dic_repa.errors import UserError
from dic_repa.objectives import FlowMatching, LogitNormal, create_objective
from dic_repa.paths import PREDICTIONS, CosinePath, LinearPath, VPPath

PATHS = [LinearPath(), CosinePath(), VPPath()]
SHAPE = (512, 2, 4, 4)


def batch(objective, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator)
    return x, objective.corrupt(x, *objective.draw(SHAPE, generator))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_flow_matching_corrupts_by_its_path(path):
    objective = FlowMatching(path=path)
    generator = torch.Generator().manual_seed(0)
    t, noise = objective.draw(SHAPE, generator)
    x = torch.full(SHAPE, 0.3)
    noisy = objective.corrupt(x, t, noise)
    expected = path.sample(x, noise, t)
    torch.testing.assert_close(noisy.x_t, expected.x_t)
    torch.testing.assert_close(noisy.target, expected.velocity)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_loss_is_the_mean_squared_error(path, prediction):
    objective = FlowMatching(path=path, prediction=prediction)
    _, noisy = batch(objective)
    assert objective.loss(noisy.target, noisy) == 0
    expected = torch.nn.functional.mse_loss(noisy.x_t, noisy.target)
    torch.testing.assert_close(objective.loss(noisy.x_t, noisy), expected)


def test_learn_sigma_outputs_are_cut_and_other_counts_told():
    objective = FlowMatching()
    _, noisy = batch(objective)
    doubled = torch.cat([noisy.target, torch.ones_like(noisy.target)], dim=1).bfloat16()
    loss = objective.loss(doubled, noisy)
    assert loss.dtype == torch.float32
    assert loss < 1e-4
    with pytest.raises(UserError, match="3 channels"):
        objective.loss(torch.zeros(512, 3, 4, 4), noisy)


def test_logit_normal_times():
    t, _ = FlowMatching(time=LogitNormal(mean=-0.5, std=0.8)).draw((20000, 1), torch.Generator().manual_seed(0))
    logits = torch.logit(t.double())
    assert abs(logits.mean() + 0.5) < 0.03
    assert abs(logits.std() - 0.8) < 0.03


class Denoiser(torch.nn.Module):
    """Gives what it is asked to give for zero data: x_t = sigma noise."""

    num_classes = 7

    def __init__(self, path, prediction, dtype):
        super().__init__()
        self.path, self.prediction = path, prediction
        self.weight = torch.nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x, t, y):
        assert x.dtype == self.weight.dtype
        assert t.dtype == torch.promote_types(self.weight.dtype, torch.float32)
        sigma = self.path.coefficients(t.reshape(-1, 1, 1, 1)).sigma
        return self.path.target(torch.zeros_like(x), x / sigma, t, self.prediction).to(x.dtype) * self.weight


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_velocity_model(path, prediction):
    x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    y = torch.zeros(5, dtype=torch.long)
    sigma, d_sigma = (getattr(path.coefficients(t.reshape(-1, 1, 1, 1)), name) for name in ("sigma", "d_sigma"))
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model = FlowMatching(path=path, prediction=prediction).velocity_model(Denoiser(path, prediction, dtype))
        v = model(x, t, y)
        assert v.dtype == torch.float64
        assert model(x.bfloat16(), t, y).dtype == torch.float32
        torch.testing.assert_close(v, d_sigma / sigma * x, rtol=tolerance, atol=tolerance * (1 + sigma[0].item() ** -2))
    assert model.num_classes == 7


def test_unknown_names_are_told():
    with pytest.raises(UserError, match="did you mean flow-matching"):
        create_objective("flow_matching")
    with pytest.raises(UserError, match="did you mean logit-normal"):
        FlowMatching(time="logitnormal")
    with pytest.raises(UserError, match="did you mean velocity"):
        FlowMatching(prediction="velocities")
