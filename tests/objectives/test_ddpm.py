"""DDPM's loss and samplers against the ADM / DiT code, and on Gaussian data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian_mixture import GaussianMixture
from places import FIXTURES
from safetensors.torch import load_file

from dic_repa.errors import UserError
from dic_repa.models import DiC
from dic_repa.objectives import DDPM, objectives
from dic_repa.samplers import Guidance, sample, sample_ddpm, sample_ode

REFERENCE = load_file(FIXTURES / "ddpm_reference.safetensors")
DIT = load_file(FIXTURES / "sit_dit_reference.safetensors")
OBJECTIVE = DDPM()
MIXTURE = GaussianMixture([[-1.0], [0.5]], [0.4, 0.6], 0.3)


def reference_batch():
    return OBJECTIVE.corrupt(REFERENCE["train.x0"], REFERENCE["train.t"].float(), REFERENCE["train.noise"])


def reference_model(x, t):
    step = (1000 * t).round().long() - 1
    output = torch.einsum("oc,bchw->bohw", REFERENCE["sample.W"], x)
    sigma = (1 - OBJECTIVE.schedule.alpha_bar[step]).sqrt().float().reshape(-1, 1, 1, 1)
    return torch.cat([sigma * output[:, :4], torch.tanh(output[:, 4:])], dim=1)


def test_loss_of_the_reference():
    noisy = reference_batch()
    torch.testing.assert_close(noisy.x_t, REFERENCE["train.x_t"], rtol=1e-5, atol=1e-5)
    squared, bound = OBJECTIVE.terms(REFERENCE["train.model_out"], noisy)
    torch.testing.assert_close(squared, REFERENCE["train.mse"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bound, REFERENCE["train.vb"], rtol=1e-5, atol=1e-5)
    loss = OBJECTIVE.loss(REFERENCE["train.model_out"], noisy).mean()
    torch.testing.assert_close(loss, REFERENCE["train.loss"].mean(), rtol=1e-5, atol=1e-5)


def test_the_bound_trains_the_variance_alone():
    output = REFERENCE["train.model_out"].clone().requires_grad_()
    _, bound = OBJECTIVE.terms(output, reference_batch())
    bound.sum().backward()
    assert output.grad[:, :4].abs().max() == 0
    assert output.grad[:, 4:].abs().amin(dim=(1, 2, 3)).min() > 0


def test_samples_of_the_reference():
    got = sample_ddpm(
        reference_model, REFERENCE["sample.z"], steps=10, noise_fn=lambda i, x: REFERENCE["sample.noise"][i]
    )
    torch.testing.assert_close(got, REFERENCE["sample.10"], rtol=1e-5, atol=1e-5)
    got = sample_ddpm(reference_model, REFERENCE["sample.z"], "ddim", steps=10)
    torch.testing.assert_close(got, REFERENCE["sample.ddim10"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", ["ddpm", "heun"])
def test_a_step_is_embedded_once_for_all_rows(solver, dtype):
    denoiser = DiC(8, (1, 1, 1, 1, 1), num_classes=3, learn_sigma=True).to(dtype)
    rows = []
    denoiser.condition[0].time1.register_forward_hook(lambda _m, given, _o: rows.append(len(given[0])))
    ddpm = solver == "ddpm"
    model = OBJECTIVE.noise_model(denoiser) if ddpm else OBJECTIVE.velocity_model(denoiser)
    options = {"schedule": OBJECTIVE.schedule, "seed": 0, "indices": [0, 1]} if ddpm else {"path": OBJECTIVE.path}
    guided = Guidance(2.0, (0.0, 0.6)).bind(model, torch.tensor([0, 1]))
    with torch.no_grad():
        sample(guided, torch.randn(2, 4, 4, 4), solver, steps=2, **options)
    assert set(rows) == {1}


@pytest.mark.parametrize(
    ("steps", "strided", "name"),
    [(10, False, "sample.timesteps.10"), (10, True, "sample.timesteps.ddim10"), (250, False, "timesteps.250")],
)
def test_respaced_steps_of_the_reference(steps, strided, name):
    times = torch.tensor(OBJECTIVE.schedule.respaced(steps, strided).times)
    assert torch.equal((1000 * times).round().long() - 1, REFERENCE[name])


@pytest.mark.parametrize("steps", [1, 21, 23, 27, 35, 39])
def test_respaced_steps_are_dits_where_rounding_decides(steps):
    times = torch.tensor(OBJECTIVE.schedule.respaced(steps).times)
    assert torch.equal((1000 * times).round().long() - 1, DIT[f"dit.steps.{steps}"])


def test_a_fixed_variance_is_dits():
    noise_fn = lambda i, x: REFERENCE["sample.noise"][i]  # noqa: E731
    noise_alone = lambda x, t: reference_model(x, t)[:, :4]  # noqa: E731
    got = sample_ddpm(noise_alone, REFERENCE["sample.z"], steps=10, noise_fn=noise_fn)
    torch.testing.assert_close(got, DIT["dit.large.10"], rtol=1e-5, atol=1e-5)
    large, small = DDPM().schedule, DDPM(fixed_variance="small").schedule
    x, fraction = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    for i in (1, 500, 999):
        assert large.log_variance(None, x, i) == large.log_variance(fraction, x, i)
        assert small.log_variance(None, x, i) == small.log_variance(-fraction, x, i)
        assert small.respaced(1000).fixed_variance == "small"
    with pytest.raises(UserError, match="large"):
        DDPM(fixed_variance="larg")


class NoisePredictor(torch.nn.Module):
    """Predicts the mixture's noise at integer steps, which it checks, with the posterior's variance."""

    num_classes = 1

    def forward(self, x, t, y):
        assert torch.equal(t, t.round())
        assert t.min() >= 0
        return self.at(x, t)

    def at(self, x, step):
        alpha_bar = OBJECTIVE.schedule.alpha_bar.numpy()
        log_ratio = np.interp(step.double().numpy(), np.arange(1000), 0.5 * np.log((1 - alpha_bar) / alpha_bar))
        # On a variance-preserving path the ratio of noise to data says all.
        t = OBJECTIVE.path.time_at_ratio(torch.exp(torch.from_numpy(log_ratio)))
        return MIXTURE.expectations(OBJECTIVE.path, x, t)[1].to(x.dtype)


class AnyStepPredictor(NoisePredictor):
    """The same between the integer steps."""

    def forward(self, x, t, y):
        return self.at(x, t)


def normal(count, seed=0):
    return torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("solver", "steps", "eta"), [("ddpm", 250, None), ("ddim", 100, None), ("ddim", 100, 1.0)])
def test_samplers_reach_the_data(solver, steps, eta):
    count = 8000
    model = OBJECTIVE.noise_model(NoisePredictor())
    generator = torch.Generator().manual_seed(1)
    noise_fn = lambda i, like: torch.randn(like.shape, generator=generator, dtype=like.dtype)  # noqa: E731
    y = torch.zeros(count, dtype=torch.long)
    x = sample(lambda x, t: model(x, t, y), normal(count), solver, steps=steps, eta=eta, noise_fn=noise_fn).flatten()
    standard_error = (MIXTURE.variance / count).sqrt().item()
    assert abs(x.mean() - MIXTURE.mean) < 5 * standard_error
    assert abs(x.var() - MIXTURE.variance) < 5 * MIXTURE.variance * (2 / count) ** 0.5


def test_a_noise_predictor_samples_by_ode():
    """Its velocity is the VP path's, so any ODE solver takes it to the data, and 'heun' needs far fewer steps."""
    model = OBJECTIVE.velocity_model(AnyStepPredictor())
    x, t = normal(50), torch.linspace(0.01, 1, 50, dtype=torch.float64)
    exact = MIXTURE.predict(OBJECTIVE.path, x, t, "velocity")
    torch.testing.assert_close(model(x, t, torch.zeros(50, dtype=torch.long)), exact, rtol=2e-3, atol=2e-3)
    quantiles = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000).reshape(-1, 1, 1, 1)
    field = Guidance(scale=1.0).bind(model, torch.zeros(1000, dtype=torch.long))
    data = sample_ode(field, quantiles, "heun", 100)
    assert abs(data.mean() - MIXTURE.mean) < 0.01
    assert abs(data.var() - MIXTURE.variance) < 0.01


def test_guidance_is_counted_and_leaves_the_variance_alone():
    class Model:
        num_classes = 2

        def __call__(self, x, t, y):
            return torch.cat([(1 + y).reshape(-1, 1, 1, 1) * x, y.reshape(-1, 1, 1, 1).expand_as(x).to(x)], dim=1)

    field = Guidance(scale=2.0, interval=(0.0, 0.5)).bind(Model(), torch.tensor([0, 1]))
    x = torch.ones(2, 4, 2, 2)
    output = field(x, torch.full((2,), 0.3))
    torch.testing.assert_close(output[:, :4, 0, 0], torch.tensor([[-1.0], [1.0]]).expand(2, 4))
    torch.testing.assert_close(output[:, 4:, 0, 0], torch.tensor([[0.0], [1.0]]).expand(2, 4))
    _, info = sample_ddpm(field, x, steps=10, return_info=True)
    # The steps 999, 888, ..., 555 lie above the interval's end at step 499; 444, ..., 0 are guided.
    assert info.nfe == 5 * 1 + 5 * 2
    assert info.times[0] == 1
    assert len(info.states) == len(info.times) == 11


def test_bad_input_is_told():
    noise = torch.zeros(2, 4, 2, 2)
    with pytest.raises(UserError, match="between 1 and 1000"):
        sample_ddpm(reference_model, noise, steps=1001)
    with pytest.raises(UserError, match="near are 500 and 1000"):
        sample_ddpm(reference_model, noise, "ddim", steps=700)
    with pytest.raises(UserError, match="3 channels"):
        sample_ddpm(lambda x, t: x[:, :3], noise, steps=5)
    with pytest.raises(UserError, match="eta"):
        sample_ddpm(reference_model, noise, "ddim", steps=5, eta=2.0)
    with pytest.raises(UserError, match="sample_ode"):
        sample_ddpm(reference_model, noise, "heun", steps=5)
    with pytest.raises(UserError, match="learn_sigma"):
        OBJECTIVE.loss(REFERENCE["train.model_out"][:, :4], reference_batch())
    with pytest.raises(UserError, match="betas"):
        objectives.create("ddpm", beta_end=2.0)


def test_without_learned_variance_the_loss_is_the_squared_error():
    objective = DDPM(learned_variance=False)
    for output in (REFERENCE["train.model_out"], REFERENCE["train.model_out"][:, :4]):
        loss = objective.loss(output, reference_batch()).mean()
        torch.testing.assert_close(loss, REFERENCE["train.mse"].mean(), rtol=1e-5, atol=1e-5)


def test_draw_covers_all_steps_and_unit_time():
    t, noise = OBJECTIVE.draw((20000, 1, 1, 1), torch.Generator().manual_seed(0)).values()
    assert t.min() == 0
    assert t.max() == 999
    assert torch.equal(t, t.round())
    unit = OBJECTIVE.corrupt(torch.zeros_like(noise), t, noise).unit_time
    assert unit.max() == 1
    assert abs(unit.mean() - 0.5) < 0.02
