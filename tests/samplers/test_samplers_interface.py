"""What the samplers take, return and refuse."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from gaussian_mixture import GaussianMixture

from dic_repa.errors import UserError
from dic_repa.interpolants import CosinePath, LinearPath, VPPath
from dic_repa.objectives import DDPM, FlowMatching
from dic_repa.samplers import (
    Guidance,
    KarrasGrid,
    ShiftedGrid,
    UniformGrid,
    initial_noise,
    list_solvers,
    sample,
    sample_ode,
    sample_sde,
    solver_info,
    time_grids,
)

MIXTURE = GaussianMixture([[0.8, -0.5], [-0.6, 0.4]], [0.5, 0.5], 0.3)
NOISE = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FIELD = MIXTURE.velocity(LinearPath())
ODE = [info for info in list_solvers("ode") if info.name != "meanflow"]  # that takes average velocities alone


@pytest.mark.parametrize("info", [info for info in ODE if info.kind == "fixed"], ids=lambda info: info.name)
def test_evaluations_per_step_are_the_catalogues(info):
    _, run = sample_ode(FIELD, NOISE, info.name, 30, return_info=True)
    extra = {"heun": -1, "ab3": 1, "dpmpp-3m": 1, "explicit_adams": 6}.get(info.name, 0)
    if info.evaluations is None:
        assert 60 <= run.nfe <= 5 * 30
    else:
        assert run.nfe == 30 * info.evaluations + extra
    assert len(run.states) == len(run.times) == 31


def test_intermediate_states():
    """Every state lies on the way to the next: integrating on from it gives the same end."""
    for solver in ("heun", "rk4", "dpmpp-2m"):
        x, run = sample_ode(FIELD, NOISE, solver, 40, return_info=True)
        assert torch.equal(run.states[0], NOISE)
        assert torch.equal(run.states[-1], x)
        rest = sample_ode(FIELD, run.states[20], solver, times=run.times[20:])
        torch.testing.assert_close(rest, x, rtol=0, atol=2e-3)
    x, run = sample_ode(FIELD, NOISE, "dopri5", times=[1.0, 0.5, 0.25, 0.0], return_info=True)
    assert run.times == [1.0, 0.5, 0.25, 0.0]
    half = sample_ode(FIELD, NOISE, "dopri5", times=[1.0, 0.5])
    torch.testing.assert_close(run.states[1], half, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", [info.name for info in ODE if not info.name.startswith("dpmpp")])
def test_backward_inverts_forward(solver):
    settings = {"rtol": 1e-6, "atol": 1e-6} if solver_info(solver).kind == "adaptive" else {"steps": 200}
    x = sample_ode(FIELD, NOISE, solver, **settings)
    back, run = sample_ode(FIELD, x, solver, **settings, direction="backward", return_info=True)
    assert run.times[0] == 0
    assert run.times[-1] == 1
    torch.testing.assert_close(back, NOISE, rtol=0, atol=0.05 if solver == "euler" else 2e-3)


@pytest.mark.parametrize("path", [LinearPath(), CosinePath(), VPPath()], ids=repr)
def test_grids(path):
    low, high = path.safe_interval("velocity", "velocity")
    for grid in (UniformGrid(), ShiftedGrid(3.0), KarrasGrid()):
        times = torch.tensor(grid(20, high, low, path), dtype=torch.float64)
        assert len(times) == 21
        assert times[0] == high
        assert times[-1] == low
        assert (times.diff() < 0).all()
    assert UniformGrid()(4, 1.0, 0.0, path) == [1.0, 0.75, 0.5, 0.25, 0.0]
    # t / (1 - t) is multiplied by the shift.
    shifted = torch.tensor(ShiftedGrid(3.0)(4, 1.0, 0.0, path)[1:-1])
    torch.testing.assert_close(shifted / (1 - shifted), 3 * torch.tensor([3.0, 1.0, 1 / 3]))
    # Equal steps in the root of the ratio of noise to data, between the given ones.
    grid = KarrasGrid(rho=5.0, ratio_min=0.02, ratio_max=50.0)
    c = path.coefficients(torch.tensor(grid(10, high, low, path)[1:-1], dtype=torch.float64))
    gaps = ((c.sigma / c.alpha) ** (1 / 5)).diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, (0.02**0.2 - 50**0.2) / 10), rtol=1e-6, atol=0)


def test_a_range_that_ends_above_zero_ends_in_the_data_prediction():
    path = VPPath()
    field = MIXTURE.velocity(path)
    x, run = sample_ode(field, NOISE, "euler", 10, return_info=True)
    assert run.times[-2:] == [pytest.approx(1e-3), 0.0]
    assert run.nfe == 10
    t = torch.full((4,), 1e-3, dtype=torch.float64)
    data, _ = MIXTURE.expectations(path, run.states[-2], t)
    torch.testing.assert_close(x, data)
    one = sample_ode(field, NOISE, "rk4", 1)
    torch.testing.assert_close(one, MIXTURE.expectations(path, NOISE, torch.ones(4))[0])


def test_adaptive_solvers_go_as_far_as_the_range_before_the_data_prediction():
    field = MIXTURE.velocity(VPPath())
    x = sample_ode(field, NOISE, "dopri5")
    by_way, run = sample_ode(field, NOISE, "dopri5", times=[1.0, 0.5, 0.0], return_info=True)
    assert run.times == [1.0, 0.5, pytest.approx(1e-3), 0.0]
    assert len(run.states) == 4
    torch.testing.assert_close(by_way, x, rtol=0, atol=1e-3)


def test_state_dtype():
    for dtype, state in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        seen = set()

        def field(x, t, seen=seen):
            seen.update({x.dtype, t.dtype})
            return -x.half()

        for solver in ("heun", "dpmpp-3m", "dopri5"):
            settings = {} if solver == "dopri5" else {"steps": 4}
            assert sample_ode(field, NOISE.to(dtype), solver, **settings).dtype == state
        assert sample_sde(field, NOISE.to(dtype), steps=4).dtype == state
        assert seen == {state}


class ConvDenoiser(torch.nn.Module):
    """A small network, untrained: whatever it does to one image it should do to it in every batch."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.label = torch.nn.Embedding(11, 8)
        self.inward, self.outward = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x, t, y):
        hidden = self.inward(x) + self.label(y)[:, :, None, None] + t.reshape(-1, 1, 1, 1)
        return self.outward(torch.nn.functional.gelu(hidden))


@pytest.mark.parametrize(
    "solver", ["heun", "dpmpp-2m", "rk4", "euler_maruyama", "stochastic_heun", "heun-sit", "ou", "ddpm", "ddim"]
)
def test_images_do_not_depend_on_the_batches(solver):
    torch.manual_seed(0)
    denoiser, labels = ConvDenoiser().eval(), torch.arange(64) % 10
    ddpm = solver in ("ddpm", "ddim")
    model = DDPM().noise_model(denoiser) if ddpm else FlowMatching().velocity_model(denoiser)

    def images(indices):
        noise = initial_noise((1, 8, 8), 5, indices)
        field = Guidance(1.5).bind(model, labels[list(indices)])
        stochastic = {} if solver_info(solver).deterministic else {"seed": 5, "indices": indices}
        return sample(field, noise, solver, steps=8, **stochastic)

    whole = images(range(64))
    ends = [0, 1, 8, 20, 23, 40, 50, 64]
    uneven = torch.cat([images(range(start, stop)) for start, stop in pairwise(ends)])
    torch.testing.assert_close(uneven, whole, rtol=1e-5, atol=1e-5)
    # As two processes share them out, each second one to each.
    shared = torch.empty_like(whole)
    for rank in range(2):
        shared[rank::2] = images(range(rank, 64, 2))
    torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"solver": "hein", "steps": 5}, "did you mean heun"),
        ({"solver": "euler_maruyama", "steps": 5}, "sample_sde"),
        ({"solver": "dopri5", "steps": 5}, "rtol and atol instead of a step count"),
        ({"solver": "dopri5", "times": UniformGrid()}, "chooses its own steps"),
        ({"solver": "heun"}, "at least 1"),
        ({"solver": "heun", "steps": 0}, "at least 1"),
        ({"solver": "heun", "steps": 5, "rtol": 1e-4}, "takes fixed steps, no tolerances"),
        ({"solver": "dopri5", "rtol": 0.0}, "above 0"),
        ({"solver": "dopri5", "atol": -1.0}, "above 0"),
        ({"solver": "heun", "steps": 5, "times": [1.0, 0.0]}, "either"),
        ({"solver": "heun", "times": [0.0, 1.0]}, "must fall"),
        ({"solver": "heun", "times": [1.0, 0.5, 0.5, 0.0]}, "must fall"),
        ({"solver": "heun", "times": [1.2, 0.0]}, "within"),
        ({"solver": "heun", "times": [1.0]}, "at least two"),
        ({"solver": "heun", "steps": 5, "direction": "backwards"}, "did you mean backward"),
        ({"solver": "dpmpp-2m", "steps": 5, "direction": "backward"}, "noise to data only"),
        ({"solver": "heun", "steps": 5, "options": {"max_order": 4}}, "takes no options"),
        ({"solver": "explicit_adams", "steps": 5, "times": KarrasGrid()}, "steps of one size"),
    ],
)
def test_bad_input_to_the_ode_is_told(settings, told):
    with pytest.raises(UserError, match=told):
        sample_ode(FIELD, NOISE, **settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"solver": "euler_maruyma"}, "did you mean euler_maruyama"),
        ({"solver": "heun"}, "sample_ode"),
        ({"steps": 0}, "at least 1"),
        ({"last_step_size": 0.0}, "last_step_size"),
        ({"last_step_size": 1.0}, "last_step_size"),
        ({"last_step": "twedie"}, "did you mean tweedie"),
        ({"diffusion": "sbmd"}, "did you mean sbdm"),
        ({"diffusion_norm": -1.0}, "norm"),
        ({"indices": [1, 2]}, "2 sample indices"),
    ],
)
def test_bad_input_to_the_sde_is_told(settings, told):
    with pytest.raises(UserError, match=told):
        sample_sde(FIELD, NOISE, **settings)


def test_options_of_other_samplers_are_told():
    with pytest.raises(UserError, match="'diffusion' is for SDE solvers"):
        sample(FIELD, NOISE, "heun", steps=5, diffusion="sigma")
    with pytest.raises(UserError, match="'rtol' is for ODE solvers"):
        sample(FIELD, NOISE, "ddim", steps=5, rtol=1e-5)
    with pytest.raises(UserError, match="did you mean steps"):
        sample(FIELD, NOISE, "heun", stepz=5)
    x = sample(FIELD, NOISE, "heun", steps=5, diffusion=None)
    torch.testing.assert_close(x, sample_ode(FIELD, NOISE, "heun", 5))


def test_bad_grids_are_told():
    with pytest.raises(UserError, match="did you mean karras"):
        time_grids.create("karas")
    with pytest.raises(UserError, match="shift"):
        ShiftedGrid(0.0)
    with pytest.raises(UserError, match="karras"):
        KarrasGrid(ratio_min=2.0, ratio_max=1.0)
