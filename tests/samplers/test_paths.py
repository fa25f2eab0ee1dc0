"""Paths against automatic differentiation, numerical identities and the REPA authors' scores."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from places import FIXTURES
from safetensors.torch import load_file

from dic_repa.errors import UserError
from dic_repa.interpolants import PREDICTIONS, CosinePath, LinearPath, VPPath, paths

REFERENCE = load_file(FIXTURES / "repa_reference.safetensors")
PATHS = [LinearPath(), LinearPath(noise_scale=2.0), CosinePath(), VPPath()]
TIMES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_derivatives_are_those_of_alpha_and_sigma(path):
    for name in ("alpha", "sigma"):
        t = TIMES.clone().requires_grad_()
        (slope,) = torch.autograd.grad(getattr(path.coefficients(t), name).sum(), t)
        torch.testing.assert_close(getattr(path.coefficients(TIMES), f"d_{name}"), slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_ends_are_data_and_noise(path):
    ends = path.coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.alpha[0] == 1
    assert ends.sigma[0] == 0
    assert ends.sigma[1] > 0.9999
    assert (ends.alpha[1] == 0) == path.alpha_vanishes


@pytest.mark.parametrize("path", [CosinePath(), VPPath()], ids=repr)
def test_variance_is_preserved(path):
    c = path.coefficients(TIMES)
    torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones_like(TIMES))


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_every_prediction_converts_into_every_other(path):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 25, 3, 2, 2, generator=generator, dtype=torch.float64)
    x_t = path.sample(x, noise, TIMES).x_t
    for source, target in product(PREDICTIONS, PREDICTIONS):
        value = path.target(x, noise, TIMES, source)
        got = path.convert(value, x_t, TIMES, source, target)
        torch.testing.assert_close(got, path.target(x, noise, TIMES, target), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_conversions_are_finite_within_their_safe_interval(path):
    x_t = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    for source, target in product(PREDICTIONS, PREDICTIONS):
        t = torch.tensor(path.safe_interval(source, target))
        assert path.convert(torch.ones_like(x_t), x_t, t, source, target).isfinite().all(), (source, target)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_time_at_ratio_inverts_sigma_over_alpha(path):
    c = path.coefficients(TIMES)
    torch.testing.assert_close(path.time_at_ratio(c.sigma / c.alpha), TIMES, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_score_of_a_velocity_is_the_references(name):
    got = paths.create(name).convert(
        REFERENCE["score.v"], REFERENCE["score.x"], REFERENCE["score.t"], "velocity", "score"
    )
    torch.testing.assert_close(got, REFERENCE[f"score.{name}"], rtol=1e-6, atol=1e-6)


def test_unknown_names_are_told_with_the_near_ones():
    with pytest.raises(UserError, match="did you mean linear"):
        paths.create("linaer")
    with pytest.raises(UserError, match="did you mean velocity"):
        LinearPath().convert(torch.ones(1), torch.ones(1), torch.ones(1), "velocty", "data")
