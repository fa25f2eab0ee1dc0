"""JiT: its loss and velocity as its paper has them, noise of another width, and the shift by the data's size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian_mixture import GaussianMixture

from dic_repa.errors import UserError
from dic_repa.interpolants import LinearPath
from dic_repa.models import DiC
from dic_repa.objectives import FlowMatching, JiT, objectives
from dic_repa.recipe import SampleSection
from dic_repa.samplers import ShiftedGrid, initial_noise, resolution_shift, sample_ode
from dic_repa.sampling.sampler import Sampler

WIDE = {"name": "linear", "noise_scale": 2.0}
SHAPE = (5, 2, 3, 3)
TIMES = np.array([0.0, 0.02, 0.05, 0.3, 1.0])  # the paper counts them the other way round


def numbers(*shape):
    return np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)


def test_loss_and_velocity_are_the_papers_also_below_the_floor():
    objective = objectives.create({"name": "jit", "path": WIDE, "floor": 0.1})
    x, noise, given = numbers(*SHAPE)
    noisy = objective.corrupt(*map(torch.from_numpy, (x, TIMES.astype(np.float32), noise)))
    t = TIMES.reshape(-1, 1, 1, 1)
    z = (1 - t) * x + t * 2 * noise
    np.testing.assert_allclose(noisy.x_t.numpy(), z, rtol=0, atol=1e-6)
    true, found = ((z - of) / np.maximum(t, 0.1) for of in (x, given))
    loss = objective.loss(torch.from_numpy(given), noisy)
    np.testing.assert_allclose(loss.numpy(), np.square(true - found).mean(axis=(1, 2, 3)), rtol=1e-4)
    velocity = objective.velocity_model(lambda x, t, y: torch.from_numpy(given))
    np.testing.assert_allclose(velocity(noisy.x_t, noisy.t, None).numpy(), found, rtol=0, atol=1e-4)
    assert velocity.time_range == (0.0, 1.0)


def test_above_the_floor_it_is_data_prediction_with_the_velocitys_weight():
    x, noise, given = map(torch.from_numpy, numbers(*SHAPE))
    t = torch.linspace(0.06, 0.9, 5)
    known = FlowMatching(prediction="data", weighting="velocity"), JiT()
    losses = [objective.loss(given, objective.corrupt(x, t, noise)) for objective in known]
    torch.testing.assert_close(*losses)


def test_times_are_the_papers_and_a_floor_is_a_time():
    t = JiT().draw((20000, 1), torch.Generator().manual_seed(0))["t"].double()
    theirs = torch.logit(1 - t)
    assert abs(theirs.mean() + 0.8) < 0.02
    assert abs(theirs.std() - 0.8) < 0.02
    for wrong, message in (({"floor": 0.0}, "floor 0"), ({"path": WIDE | {"noise_scale": 0}}, "noise_scale 0")):
        with pytest.raises(UserError, match=message):
            JiT(**wrong)


def test_a_sampler_starts_from_noise_of_the_paths_width():
    settings = SampleSection(solver="euler", steps=2, batch_size=2)
    denoiser = DiC(8, (1, 1, 1, 1, 1), 1, 10)
    for scale in (1.0, 2.0):
        sampler = Sampler(denoiser, JiT({"name": "linear", "noise_scale": scale}), settings, (1, 8, 8), trace=True)
        list(sampler(torch.tensor([1, 2])))
        assert torch.equal(sampler.states[0], scale * initial_noise((1, 8, 8), settings.seed, [0, 1]))


def test_wide_noise_becomes_the_data():
    """With the exact predictor the end has the data's moments, but for the floor's trace of noise."""
    data, path = GaussianMixture([[-0.9], [0.7]], [0.5, 0.5], 0.25), LinearPath(noise_scale=2.0)
    model = JiT(path, floor=0.01).velocity_model(data.denoiser(path, "data"))
    quantiles = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400).reshape(-1, 1, 1, 1)
    x = sample_ode(lambda x, t: model(x, t, None), 2.0 * quantiles, "heun", 100, path=path)
    assert abs(x.mean() - data.mean) < 0.01
    assert abs(x.var() - data.variance) < 0.01


@pytest.mark.parametrize("name", ["flow-matching", "contrastive-flow-matching", "jit"])
def test_shift_auto_is_by_the_datas_size(name):
    """By sqrt(numbers / 4096), which RAE gives as 6.93 for 16x16 tokens of 768 numbers."""
    assert resolution_shift(768 * 16 * 16) == pytest.approx(6.9282, rel=1e-4)
    times = {}
    for shift in ("auto", 3**0.5):
        objective = objectives.create({"name": name, "shift": shift})
        for shape in ((64, 3, 64, 64), (64, 3, 8, 8)):
            times[shift, shape[-1]] = objective.draw(shape, torch.Generator().manual_seed(1))["t"]
    torch.testing.assert_close(times["auto", 64], times[3**0.5, 64])
    assert (times["auto", 8] < times[3**0.5, 8]).all()
    for wrong in (0, "large"):
        with pytest.raises(UserError, match="a number above 0"):
            objectives.create({"name": name, "shift": wrong})


def test_a_shifted_grid_can_be_by_the_datas_size_too():
    settings = SampleSection(solver="euler", steps=4, grid={"name": "shifted", "options": {"shift": "auto"}})
    sampler = Sampler(DiC(8, (1, 1, 1, 1, 1), 1, 10), FlowMatching(), settings, (1, 32, 32), trace=True)
    list(sampler(torch.tensor([1])))
    s = (32 * 32 / 4096) ** 0.5
    expected = [s * t / (1 + (s - 1) * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    assert sampler.times == pytest.approx(expected)
    with pytest.raises(UserError, match="the data's size"):
        ShiftedGrid("auto")(4, 1.0, 0.0, LinearPath())
    with pytest.raises(UserError, match="above 0"):
        ShiftedGrid("large")
