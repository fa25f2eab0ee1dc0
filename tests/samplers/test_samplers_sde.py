"""The SDE's parts: SiT's diffusion forms by their own formulas, and what the exact step is in known cases."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_mixture import GaussianMixture
from torch.utils._python_dispatch import TorchDispatchMode

from dic_repa.interpolants import CosinePath, LinearPath, VPPath
from dic_repa.samplers import sample_sde
from dic_repa.samplers.field import Field
from dic_repa.samplers.sde import ReverseSDE, create_diffusion, decay

PATHS = [LinearPath(), LinearPath(2.0), CosinePath(), VPPath()]
TIMES = (0.05, 0.3, 0.8)


def coefficients(path, t):
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    return c.alpha.item(), c.sigma.item(), c.d_alpha.item(), c.d_sigma.item()


@pytest.mark.parametrize("norm", [1.0, 0.5])
@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_forms_are_twice_those_of_sit_in_its_reversed_time(path, norm):
    for t in TIMES:
        alpha, sigma, d_alpha, d_sigma = coefficients(path, t)
        s = 1 - t  # SiT's time, in which derivatives have the opposite sign
        sit = {
            "constant": norm,
            "sbdm": norm * (-d_alpha / alpha * sigma**2 + sigma * d_sigma),
            "sigma": norm * sigma,
            "linear": norm * (1 - s),
            "decreasing": 0.25 * (norm * math.cos(math.pi * s) + 1) ** 2,
            "increasing-decreasing": norm * math.sin(math.pi * s) ** 2,
        }
        for form, value in sit.items():
            assert create_diffusion(form, path, norm)(t) == pytest.approx(2 * value, rel=1e-10), form


def test_decay_has_closed_forms():
    for t, s in ((0.9, 0.5), (0.5, 0.02), (1.0, 0.04)):
        linear = LinearPath()
        # int_s^t w / (2 sigma^2) with sigma = t: of 1/t for w = 2t, of 1/t^2 for w = 2.
        assert decay(create_diffusion("linear", linear), linear, t, s) == pytest.approx(s / t, rel=1e-10)
        assert decay(create_diffusion("constant", linear), linear, t, s) == pytest.approx(math.exp(1 / t - 1 / s))
        assert decay(create_diffusion("linear", linear, 0.0), linear, t, s) == 1
    for path in PATHS:
        # That of the diffusion itself is the ratio of its noise to data, before and after.
        (alpha_t, sigma_t, *_), (alpha_s, sigma_s, *_) = coefficients(path, 0.9), coefficients(path, 0.6)
        expected = sigma_s * alpha_t / (alpha_s * sigma_t)
        assert decay(create_diffusion("sbdm", path), path, 0.9, 0.6) == pytest.approx(expected, rel=1e-10)


def test_the_exact_step_is_ddim_without_diffusion_and_ddpm_with_its_own():
    path, t, s = VPPath(), 0.7, 0.6
    mixture = GaussianMixture([[-0.5], [0.8]], [0.5, 0.5], 0.3)
    x, z = torch.randn(2, 16, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = {"path": path, "solver": "ou", "times": [t, s], "last_step": "none", "noise_fn": lambda step, like: z}
    (alpha_t, sigma_t, *_), (alpha_s, sigma_s, *_) = coefficients(path, t), coefficients(path, s)
    data, noise = mixture.expectations(path, x, torch.full((16,), t))

    got = sample_sde(mixture.velocity(path), x, **settings, diffusion_norm=0.0)
    torch.testing.assert_close(got, alpha_s * data + sigma_s * noise)

    got = sample_sde(mixture.velocity(path), x, **settings, diffusion="sbdm")
    # Ho et al. 2020, eq. 7, for a step from s to t with 1 - beta = (alpha_t / alpha_s)^2.
    ratio = alpha_t / alpha_s
    mean = (alpha_s * (1 - ratio**2) * data + ratio * sigma_s**2 * x) / sigma_t**2
    deviation = (sigma_s**2 / sigma_t**2 * (1 - ratio**2)) ** 0.5
    torch.testing.assert_close(got, mean + deviation * z)


def test_the_exact_step_is_stable_where_the_diffusion_is_large():
    """A narrow Gaussian under constant diffusion: Euler-Maruyama's steps blow up, the exact ones do not."""
    data = GaussianMixture([[0.3]], [1.0], 0.02)
    noise = torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    deviations = {
        solver: (
            sample_sde(data.velocity(LinearPath()), noise, None, solver, 25, diffusion="constant", last_step="none")
            - 0.3
        ).std()
        for solver in ("euler_maruyama", "ou")
    }
    assert deviations["euler_maruyama"] > 1
    assert deviations["ou"] < 0.03


def test_a_diffusion_of_ones_own():
    data = GaussianMixture([[0.3]], [1.0], 0.5)
    noise = torch.randn(8, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = sample_sde(data.velocity(LinearPath()), noise, steps=20, diffusion=lambda t: 2 * t)
    torch.testing.assert_close(own, sample_sde(data.velocity(LinearPath()), noise, steps=20, diffusion="linear"))


def test_run_is_told():
    data = GaussianMixture([[0.3]], [1.0], 0.5)
    x, run = sample_sde(data.velocity(LinearPath()), torch.zeros(8, 1, 1, 1), steps=20, return_info=True)
    assert run.nfe == 20
    assert run.times[0] == 1
    assert run.times[-2:] == [pytest.approx(0.04), 0.0]
    assert len(run.states) == len(run.times) == 21
    assert torch.equal(run.states[-1], x)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_drift_is_the_velocity_less_half_w_times_the_score(path):
    data = GaussianMixture([[-0.5], [0.8]], [0.5, 0.5], 0.3)
    x = torch.randn(16, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    velocity = data.velocity(path)
    sde = ReverseSDE(Field(velocity, path), create_diffusion("sigma", path))
    for t in TIMES:
        alpha, sigma, *_ = coefficients(path, t)
        mean, times = data.expectations(path, x, torch.full((16,), t))[0], torch.full((16,), t, dtype=x.dtype)
        score = -(x - alpha * mean) / sigma**2  # Tweedie's formula
        torch.testing.assert_close(sde.drift(x, t), velocity(x, times) - sigma * score)


class Launches(TorchDispatchMode):
    """Counts operations on batches, each a launch on a GPU: not views, nor the few numbers that stay on the CPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 4:
            self.count += function.overloadpacket.__name__ not in ("expand", "view", "slice", "select", "unsqueeze")
        return result


def test_a_step_launches_few_operations():
    counts = []
    for steps in (10, 20):
        with Launches() as launches:
            noise = torch.zeros(2, 1, 2, 2)
            sample_sde(lambda x, t: x, noise, steps=steps, noise_fn=lambda step, x: x)
        counts.append(launches.count)
    assert (counts[1] - counts[0]) / 10 <= 7
