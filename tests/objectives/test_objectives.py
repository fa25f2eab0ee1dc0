"""Objectives: the exact predictor's loss is the least, and a trained denoiser samples in any dtype."""

from __future__ import annotations

import pytest
import torch
from gaussian_mixture import GaussianMixture
from places import FIXTURES
from safetensors.torch import load_file

from dic_repa.errors import UserError
from dic_repa.interpolants import PREDICTIONS, CosinePath, LinearPath, VPPath, paths
from dic_repa.objectives import FlowMatching, LogNormal, objectives, resolution_shift, weightings

SIT = load_file(FIXTURES / "sit_dit_reference.safetensors")
PATHS = [LinearPath(), CosinePath(), VPPath()]
SHAPE = (512, 2, 4, 4)


def batch(objective, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator)
    return x, objective.corrupt(x, **objective.draw(SHAPE, generator))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_flow_matching_corrupts_by_its_path(path):
    objective = FlowMatching(path=path)
    generator = torch.Generator().manual_seed(0)
    t, noise = objective.draw(SHAPE, generator).values()
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
    assert not objective.loss(noisy.target, noisy).any()
    expected = torch.nn.functional.mse_loss(noisy.x_t, noisy.target)
    torch.testing.assert_close(objective.loss(noisy.x_t, noisy).mean(), expected)


def test_learn_sigma_outputs_are_cut_and_other_counts_told():
    objective = FlowMatching()
    _, noisy = batch(objective)
    doubled = torch.cat([noisy.target, torch.ones_like(noisy.target)], dim=1).bfloat16()
    loss = objective.loss(doubled, noisy).mean()
    assert loss.dtype == torch.float32
    assert loss < 1e-4
    with pytest.raises(UserError, match="3 channels"):
        objective.loss(torch.zeros(512, 3, 4, 4), noisy)


def times(objective):
    return objective.draw((20000, 1), torch.Generator().manual_seed(0))["t"].double()


def test_uniform_times():
    t = times(FlowMatching())
    quantiles = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(t.quantile(quantiles), quantiles, rtol=0, atol=0.015)


def test_logit_normal_times():
    logits = torch.logit(times(FlowMatching(time={"name": "logit-normal", "mean": -0.5, "std": 0.8})))
    assert abs(logits.mean() + 0.5) < 0.03
    assert abs(logits.std() - 0.8) < 0.03


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_log_normal_times_are_of_the_ratio_of_noise_to_data(path):
    c = path.coefficients(times(FlowMatching(path=path, time=LogNormal(mean=0.3, std=0.7))))
    logs = torch.log(c.sigma / c.alpha)
    assert abs(logs.mean() - 0.3) < 0.03
    assert abs(logs.std() - 0.7) < 0.03


def test_shifted_times():
    """A latent of four times the numbers wants twice the ratio of noise to data."""
    shift = resolution_shift(4 * 64 * 64)
    plain, shifted = times(FlowMatching()), times(FlowMatching(shift=shift))
    torch.testing.assert_close(shifted / (1 - shifted), 2 * plain / (1 - plain), rtol=1e-2, atol=0)


@pytest.mark.parametrize("weighting", ["noise", "velocity", "likelihood", "min-snr-gamma"])
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_weighted_loss_is_the_same_for_every_prediction(path, weighting):
    """One wrong denoiser, put as each of the predictions, has one loss: the weights undo the change of units."""
    generator = torch.Generator().manual_seed(0)
    x, wrong, noise = torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, SHAPE[0], dtype=torch.float64)
    losses = []
    for prediction in PREDICTIONS:
        objective = FlowMatching(path=path, prediction=prediction, weighting=weighting)
        noisy = objective.corrupt(x, t, noise)
        output = path.convert(wrong, noisy.x_t, t, "data", prediction)
        error = (output - noisy.target).square().flatten(1).mean(1)
        losses.append(noisy.weight * error)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_weights_are_those_of_sit_and_min_snr(name):
    """By their own formulas: on the noise's error in SiT, on the data's in min-SNR."""
    path = paths.create(name)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    c = path.coefficients(t)
    # SiT's drift_var; its time runs the other way, so that its derivatives have the opposite sign.
    drift_variance = (-c.d_alpha / c.alpha) * c.sigma**2 + c.sigma * c.d_sigma
    expected = {
        ("velocity", "noise"): (drift_variance / c.sigma) ** 2,
        ("likelihood", "noise"): drift_variance / c.sigma**2,
        ("min-snr-gamma", "data"): torch.clamp((c.alpha / c.sigma) ** 2, max=5.0),
        ("velocity", "velocity"): torch.ones_like(t),
        ("none", "noise"): torch.ones_like(t),
        ("noise", "noise"): torch.ones_like(t),
        ("noise", "score"): c.sigma**2,
    }
    for (weighting, prediction), weight in expected.items():
        torch.testing.assert_close(weightings.create(weighting)(path, t, prediction), weight, rtol=1e-10, atol=0)


@pytest.mark.parametrize("prediction", ["score", "noise"])
@pytest.mark.parametrize("name", ["linear", "cosine", "vp"])
def test_losses_are_those_of_sits_code(name, prediction):
    """Numbers that SiT's code gave; what it calls no weighting is the error of the noise, of a score too."""
    x, noise, output, t = (SIT[f"loss.{key}"] for key in ("x", "noise", "prediction", "t"))
    for theirs, ours in ((None, "noise"), ("velocity", "velocity"), ("likelihood", "likelihood")):
        objective = FlowMatching(path=name, prediction=prediction, weighting=ours)
        noisy = objective.corrupt(x, t, noise)
        loss = noisy.weight * (output - noisy.target).square().flatten(1).mean(1)
        torch.testing.assert_close(loss, SIT[f"loss.{name}.{prediction}.{theirs}"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("weighting", ["none", "noise", "velocity", "likelihood", "min-snr-gamma"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_targets_and_weights_are_finite_at_all_times_that_are_drawn(path, prediction, weighting):
    objective = FlowMatching(path=path, prediction=prediction, weighting=weighting)
    t = torch.tensor(objective.time_range)
    assert 0 <= t[0] < 0.01
    assert 0.99 < t[1] <= 1
    noisy = objective.corrupt(torch.ones(2, 1), t, torch.ones(2, 1))
    assert noisy.target.isfinite().all()
    assert noisy.weight.isfinite().all()


def test_a_denoiser_learns_what_is_to_be_predicted():
    """The least-squares fit of each target, at one time, is the conditional expectation that the samplers assume."""
    t = torch.full((20000,), 0.4, dtype=torch.float64)
    x, noise = torch.randn(2, 20000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = 0.5 * x
    mixture = GaussianMixture([[0.0]], [1.0], 0.5)
    for path in PATHS:
        for prediction in PREDICTIONS:
            objective = FlowMatching(path=path, prediction=prediction)
            noisy = objective.corrupt(x, t, noise)
            slope = (noisy.x_t * noisy.target).sum() / noisy.x_t.square().sum()
            exact = mixture.predict(path, torch.ones(1, 1, dtype=torch.float64), t[:1], prediction).item()
            assert abs(slope - exact) < 0.05 * max(abs(exact), 1), (path, prediction)


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
    assert (model.null(torch.tensor([0, 3])) == 7).all()


def test_unknown_names_are_told():
    with pytest.raises(UserError, match="did you mean flow-matching"):
        objectives.create("flow_matching")
    with pytest.raises(UserError, match="did you mean logit-normal"):
        FlowMatching(time="logitnormal")
    with pytest.raises(UserError, match="did you mean velocity"):
        FlowMatching(prediction="velocities")
    with pytest.raises(UserError, match="did you mean min-snr-gamma"):
        FlowMatching(weighting="min-snr")
    with pytest.raises(UserError, match="did you mean linear"):
        FlowMatching(path="linar")
    with pytest.raises(UserError, match="shift"):
        FlowMatching(shift=0.0)
    with pytest.raises(UserError, match="unknown option of time sampling 'log-normal'"):
        FlowMatching(time={"name": "log-normal", "sd": 1.0})
