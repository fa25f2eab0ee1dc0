"""From given data: the arc between two noises, the start at a middle time, and a known part, against Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_mixture import GaussianMixture

from dic_repa.errors import UserError
from dic_repa.interpolants import CosinePath, LinearPath, VPPath
from dic_repa.samplers import sample, sample_ode, sample_sde
from dic_repa.samplers.editing import inpaint, noised, slerp

PATHS = pytest.mark.parametrize("path", [LinearPath(), LinearPath(2.0), CosinePath(), VPPath()], ids=repr)
GAUSSIAN = GaussianMixture([[0.4, -0.3]], [1.0], 0.5)
MEAN = GAUSSIAN.means[0].reshape(1, 2, 1, 1)


def states(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@PATHS
def test_from_a_middle_time_the_ode_brings_a_gaussian_to_its_own_width(path):
    """x_t ~ N(alpha m, alpha^2 s^2 + sigma^2) is mapped to N(m, s^2) by shift and scale."""
    x = noised(states(6), states(6, seed=1), 0.6, path)
    c = path.coefficients(torch.tensor(0.6, dtype=torch.float64))
    torch.testing.assert_close(x, c.alpha * states(6) + c.sigma * states(6, seed=1))
    exact = MEAN + 0.5 / math.hypot(c.alpha * 0.5, c.sigma) * (x - c.alpha * MEAN)
    adaptive = {"rtol": 1e-8, "atol": 1e-8}
    for solver, options in {"rk4": {"steps": 60}, "dpmpp-3m": {"steps": 100}, "dopri5": adaptive}.items():
        got = sample_ode(GAUSSIAN.velocity(path), x, solver, start=0.6, **options)
        torch.testing.assert_close(got, exact, rtol=0, atol=2e-3)
    _, info = sample_ode(GAUSSIAN.velocity(path), x, "euler", 3, start=0.6, return_info=True)
    assert (info.times[0], info.times[-1], len(info.times)) == (0.6, 0.0, 4)


def test_from_a_middle_time_the_sde_has_the_gaussians_moments():
    x = noised(MEAN + 0.5 * states(500), states(500, seed=1), 0.5, LinearPath())
    got = sample_sde(GAUSSIAN.velocity(LinearPath()), x, steps=40, start=0.5)
    torch.testing.assert_close(got.mean(0, keepdim=True), MEAN, rtol=0, atol=0.08)
    assert abs(got.std() - (0.25 + MEAN.std(correction=0) ** 2) ** 0.5) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.5}, "start=1.5"),
        ({"start": 0.0}, "start=0.0"),
        ({"start": 0.5, "direction": "backward"}, "from noise to data"),
        ({"start": 0.5, "times": [1.0, 0.0], "steps": None}, "either the time"),
    ],
)
def test_a_start_that_does_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        sample_ode(GAUSSIAN.velocity(LinearPath()), states(1), "euler", **{"steps": 2, **options})


def test_steps_of_ddpm_have_no_start():
    with pytest.raises(UserError, match="'start' is for ODE and SDE solvers"):
        sample(lambda x, t: x, states(1), "ddpm", start=0.5)


def test_the_arc_between_noises_has_their_length():
    a, b = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    b = b * (a.norm() / b.norm())
    arc = slerp(a, b, [0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(arc[0], a)
    torch.testing.assert_close(arc[-1], b)
    torch.testing.assert_close(arc.flatten(1).norm(dim=1), a.norm().expand(4))
    cosine = lambda x, y: (x * y).sum() / (x.norm() * y.norm())  # noqa: E731
    torch.testing.assert_close(torch.acos(cosine(a, arc[1])), torch.acos(cosine(a, b)) / 4)
    torch.testing.assert_close(slerp(a, a, [0.3])[0], a)


class Correlated:
    """N(0, [[1, r], [r, 1]] / 2) as images (B, 2, 1, 1)."""

    covariance = torch.tensor([[0.5, 0.4], [0.4, 0.5]], dtype=torch.float64)

    def __init__(self, path):
        self.path = path

    def __call__(self, x, t):
        c = self.path.coefficients(t[0].double())
        total = torch.linalg.inv(c.alpha**2 * self.covariance + c.sigma**2 * torch.eye(2))
        flat = x.flatten(1).double()
        data, noise = (flat @ matrix for matrix in (c.alpha * total @ self.covariance, c.sigma * total))
        return self.path.target(data.reshape(x.shape), noise.reshape(x.shape), t, "velocity")


@pytest.mark.parametrize("path", [LinearPath(2.0), CosinePath()], ids=repr)
def test_the_new_part_follows_the_known_one(path):
    """x_2 given x_1 is N(r x_1, (1 - r^2) / 2); each step once over, it is less than half way there."""
    count = 100
    x = torch.tensor([1.0, 9.0], dtype=torch.float64).reshape(1, 2, 1, 1).expand(count, -1, -1, -1)
    mask = torch.tensor([False, True]).reshape(1, 2, 1, 1).expand(count, -1, -1, -1)
    draw = lambda **options: inpaint(Correlated(path), x, mask, states(count), "heun", 12, **options)  # noqa: E731
    once, got = draw(), draw(resample=16)
    for made in (once, got):
        torch.testing.assert_close(made[:, 0], x[:, 0])
    assert once[:, 1].mean() < 0.4
    assert abs(got[:, 1].mean() - 0.8) < 0.15
    assert abs(got[:, 1].std() - (0.5 * (1 - 0.8**2)) ** 0.5) < 0.08


def test_what_is_filled_in_belongs_to_its_index():
    x, mask = torch.zeros(3, 2, 1, 1), torch.tensor([False, True]).reshape(1, 2, 1, 1).expand(3, -1, -1, -1)
    field, noise = Correlated(LinearPath()), torch.ones(3, 2, 1, 1)
    whole, info = inpaint(field, x, mask, noise, "euler", 4, resample=2, seed=5, return_info=True)
    part = inpaint(field, x[1:], mask[1:], noise[1:], "euler", 4, resample=2, seed=5, indices=[1, 2])
    torch.testing.assert_close(part, whole[1:])
    assert not torch.equal(whole[0], whole[1])
    assert (info.nfe, len(info.states)) == (7, 5)  # the step onto the data is not repeated
    for options, message in [({"solver": "dopri5"}, "takes? its own|chooses its own"), ({"resample": 0}, "resample=0")]:
        with pytest.raises(UserError, match=message):
            inpaint(field, x, mask, noise, **{"steps": 2, **options})
