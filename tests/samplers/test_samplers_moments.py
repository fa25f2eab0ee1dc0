"""Every path x prediction x solver takes noise to a Gaussian mixture's true moments."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from gaussian_mixture import GaussianMixture

from dic_repa.interpolants import PREDICTIONS, CosinePath, LinearPath, VPPath
from dic_repa.objectives import FlowMatching
from dic_repa.samplers import Guidance, KarrasGrid, ShiftedGrid, list_solvers, sample_ode, sample_sde

MIXTURE = GaussianMixture([[-0.9], [0.2], [0.8]], [0.3, 0.3, 0.4], 0.25)
PATHS = {"linear": LinearPath(), "cosine": CosinePath(), "vp": VPPath()}
# The mid-points of equal shares of a normal distribution: the ODE's moments without sampling error.
QUANTILES = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400).reshape(-1, 1, 1, 1)
COMBINATIONS = list(product(PATHS, PREDICTIONS))


def velocity(path, prediction, count):
    """What a user has: a trained denoiser, here a perfect one, by way of its objective."""
    model = FlowMatching(path=PATHS[path], prediction=prediction).velocity_model(
        MIXTURE.denoiser(PATHS[path], prediction)
    )
    return Guidance(scale=1.0).bind(model, torch.zeros(count, dtype=torch.long))


def check(x, tolerance):
    assert abs(x.mean() - MIXTURE.mean) < tolerance
    assert abs(x.var() - MIXTURE.variance) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize(
    "info", [info for info in list_solvers("ode") if info.name != "meanflow"], ids=lambda info: info.name
)
@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
def test_ode(info):
    for path, prediction in COMBINATIONS:
        steps = 150 if info.order == 1 else 60
        settings = {"rtol": 1e-4, "atol": 1e-4} if info.kind == "adaptive" else {"steps": steps}
        check(sample_ode(velocity(path, prediction, 400), QUANTILES, info.name, **settings), 0.015)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [KarrasGrid(), ShiftedGrid(2.0), ShiftedGrid(0.5)], ids=repr)
@pytest.mark.parametrize("solver", ["heun", "ab3", "dpmpp-3m"])
def test_ode_on_other_grids(solver, grid):
    for path, prediction in COMBINATIONS:
        check(sample_ode(velocity(path, prediction, 400), QUANTILES, solver, 80, times=grid), 0.015)


def check_sde(path, prediction, solver, last_step):
    count = 4000
    generator = torch.Generator().manual_seed(0)

    def normal(step=None, like=None):
        return torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)

    settings = {"steps": 120, "last_step_size": 0.02, "last_step": last_step, "noise_fn": normal}
    x = sample_sde(velocity(path, prediction, count), normal(), solver=solver, **settings)
    check(x, 5 * (MIXTURE.variance / count).sqrt().item() + 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [info.name for info in list_solvers("sde")])
def test_sde(solver):
    """With all predictions one solver: the others are given the same velocity (test_ode has each with each)."""
    for path, prediction in COMBINATIONS if solver == "euler_maruyama" else product(PATHS, ["velocity"]):
        check_sde(path, prediction, solver, "tweedie")


@pytest.mark.parametrize("last_step", ["mean", "euler", "none"])
def test_last_steps_of_the_sde(last_step):
    for path in PATHS:
        check_sde(path, "velocity", "euler_maruyama", last_step)
