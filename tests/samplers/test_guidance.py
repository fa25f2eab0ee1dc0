"""Guidance: what it computes, and what it costs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from gaussian_mixture import GaussianMixture

from dic_repa.errors import UserError
from dic_repa.interpolants import LinearPath
from dic_repa.samplers import CFGPlusPlus, Guidance, list_solvers, sample_ode, sample_sde

LABELS = torch.tensor([0, 1])
NOISE = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EVERYWHERE = (0.0, 1.0)


class Model:
    """velocity = (1 + label) x, which records the size of every batch."""

    num_classes = 2

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        return (1 + y).reshape(-1, 1, 1, 1) * x


class TwoClasses:
    """Exact velocities of two classes and, as the null class, of both together."""

    num_classes = 2

    def __init__(self, path):
        self.path = path
        mixtures = ([[-0.8]], [1.0]), ([[0.6]], [1.0]), ([[-0.8], [0.6]], [0.5, 0.5])
        self.fields = [GaussianMixture(means, weights, 0.3).velocity(path) for means, weights in mixtures]
        self.evaluations = 0

    def __call__(self, x, t, y):
        self.evaluations += len(x)
        velocities = torch.stack([field(x, t) for field in self.fields])
        return velocities[y, torch.arange(len(x))]


def scalars(count):
    return torch.linspace(-2, 2, count, dtype=torch.float64).reshape(-1, 1, 1, 1)


def velocity_at(guidance, t, weak_model=None):
    return guidance.bind(Model(), LABELS, weak_model)(NOISE, torch.full((2,), t, dtype=torch.float64))


def guided(scale):
    """What `Model` should give under guidance by its null class, whose velocity is 3 x."""
    factors = torch.tensor([3 + scale * (1 - 3), 3 + scale * (2 - 3)], dtype=torch.float64)
    return factors.reshape(-1, 1, 1, 1) * NOISE


def test_guided_velocity():
    torch.testing.assert_close(velocity_at(Guidance(1.5, EVERYWHERE), 0.5), guided(1.5))


def test_doubled_batch_inside_the_interval_only():
    model = Model()
    field = Guidance(scale=2.0, interval=(0.25, 0.5)).bind(model, LABELS)
    _, info = sample_ode(field, NOISE, solver="euler", steps=8, return_info=True)
    # Steps start at 1, 7/8, ..., 1/8; those at 4/8, 3/8 and 2/8 are guided.
    assert model.batches == [2, 2, 2, 2, 4, 4, 4, 2]
    assert info.nfe == 11


@pytest.mark.parametrize(
    "info",
    [info for info in list_solvers() if info.process != "ddpm" and info.name != "meanflow"],
    ids=lambda info: info.name,
)
def test_counted_evaluations_are_those_that_the_network_makes(info):
    """And outside the interval guidance adds none, whatever the solver."""
    model, noise, y = TwoClasses(LinearPath()), scalars(4), torch.tensor([0, 1, 0, 1])
    sampler = sample_sde if info.process == "sde" else sample_ode
    settings = {} if info.kind == "adaptive" else {"steps": 12}
    _, plain = sampler(Guidance(1.0).bind(model, y), noise, solver=info.name, **settings, return_info=True)
    model.evaluations = 0
    _, outside = sampler(
        Guidance(3.0, (0.0, 0.0)).bind(model, y), noise, solver=info.name, **settings, return_info=True
    )
    assert model.evaluations == 4 * outside.nfe
    if info.kind == "fixed" and info.evaluations is not None:
        assert outside.nfe == plain.nfe
    model.evaluations = 0
    _, inside = sampler(Guidance(3.0, EVERYWHERE).bind(model, y), noise, solver=info.name, **settings, return_info=True)
    assert model.evaluations == 4 * inside.nfe
    if info.kind == "fixed" and info.evaluations is not None:
        assert inside.nfe == 2 * plain.nfe


def test_all_of_a_step_is_guided_by_where_it_starts():
    model = Model()
    sample_ode(Guidance(scale=2.0, interval=(0.0, 0.5)).bind(model, LABELS), NOISE, "heun", 4)
    # Starts 1, 3/4, 1/2, 1/4; the second evaluation of the step from 3/4 is at 1/2 and still unguided.
    assert model.batches == [2, 2, 2, 2, 4, 4, 4]
    model.batches.clear()
    sample_ode(Guidance(scale=2.0, interval=(0.0, 0.5)).bind(model, LABELS), NOISE, "midpoint", 4)
    assert model.batches == [2, 2, 2, 2, 4, 4, 4, 4]


def test_scale_one_costs_nothing():
    model = Model()
    sample_ode(Guidance(scale=1.0, interval=EVERYWHERE).bind(model, LABELS), NOISE, solver="euler", steps=3)
    assert model.batches == [2, 2, 2]


@pytest.mark.slow
def test_split_adaptive_solvers_agree_with_many_euler_steps():
    noise, y = scalars(8) / 2, torch.tensor([0, 1] * 4)
    field = Guidance(scale=1.65, interval=(0.2, 0.7)).bind(TwoClasses(LinearPath()), y)
    fine = sample_ode(field, noise, "euler", 10000)
    # Extrapolated to steps of no size, as the error of Euler's method is most of the difference.
    limit = 2 * fine - sample_ode(field, noise, "euler", 5000)
    for solver in ("dopri5", "bosh3"):
        adaptive = sample_ode(field, noise, solver, rtol=1e-6, atol=1e-6)
        assert (adaptive - fine).abs().max() < 1e-4
        assert (adaptive - limit).abs().max() < 1e-5


def test_inversion_retraces_a_guided_sample():
    noise, y = scalars(8), torch.tensor([0, 1] * 4)
    field = Guidance(scale=1.65, interval=(0.2, 0.7)).bind(TwoClasses(LinearPath()), y)
    x = sample_ode(field, noise, "dopri5", rtol=1e-8, atol=1e-8)
    back = sample_ode(field, x, "dopri5", rtol=1e-8, atol=1e-8, direction="backward")
    torch.testing.assert_close(back, noise, rtol=1e-5, atol=1e-5)


def test_the_first_channels_only():
    v = velocity_at(Guidance(1.5, EVERYWHERE, channels=3), 0.5)
    torch.testing.assert_close(v[:, :3], guided(1.5)[:, :3])
    torch.testing.assert_close(v[:, 3:], guided(1.0)[:, 3:])
    torch.testing.assert_close(velocity_at(Guidance(1.5, EVERYWHERE, channels=9), 0.5), guided(1.5))


@pytest.mark.parametrize(("schedule", "shares"), [("linear", (0, 0.25, 1)), ("cosine", (0, (1 - 0.5**0.5) / 2, 1))])
def test_schedules_rise_from_the_intervals_noisy_end(schedule, shares):
    guidance = Guidance(3.0, (0.2, 0.6), schedule=schedule)
    for t, share in zip((0.6, 0.5, 0.2), shares):
        torch.testing.assert_close(velocity_at(guidance, t), guided(1 + 2 * share))
    torch.testing.assert_close(velocity_at(guidance, 0.7), guided(1.0))


def test_rescaled_guidance_keeps_the_deviation():
    for share in (0.3, 1.0):
        v = velocity_at(Guidance(4.0, EVERYWHERE, rescale=share), 0.5)
        plain, conditional = guided(4.0), guided(1.0)
        ratio = conditional.flatten(1).std(1) / plain.flatten(1).std(1)
        torch.testing.assert_close(v, plain * (share * ratio + 1 - share).reshape(-1, 1, 1, 1))
    torch.testing.assert_close(v.flatten(1).std(1), conditional.flatten(1).std(1))


def test_autoguidance_moves_away_from_the_weaker_model():
    weak = Model()
    v = velocity_at(Guidance(2.0, EVERYWHERE), 0.5, weak_model=lambda x, t, y: 0.5 * weak(x, t, y))
    conditional = guided(1.0)
    torch.testing.assert_close(v, 0.5 * conditional + 2 * (conditional - 0.5 * conditional))
    assert weak.batches == [2]
    # It needs no null class.
    Guidance(2.0).bind(lambda x, t, y: x, LABELS, weak_model=weak)


def test_cfg_plus_plus_is_its_papers_step():
    """DDIM with the guided data prediction and the null class's noise, on a path where Euler's step is DDIM's."""
    path, model, y, x = LinearPath(), TwoClasses(LinearPath()), torch.tensor([0, 1]), scalars(2)
    null = torch.full_like(y, 2)
    times, scale = [1.0, 0.6, 0.3, 0.0], 0.7
    got = sample_ode(CFGPlusPlus(scale).bind(model, y), x, "euler", times=times)
    for t, s in pairwise(times):
        at = torch.full((2,), t, dtype=torch.float64)
        data, data_null = (path.convert(model(x, at, label), x, at, "velocity", "data") for label in (y, null))
        noise_null = path.convert(model(x, at, null), x, at, "velocity", "noise")
        x = (1 - s) * (data_null + scale * (data - data_null)) + s * noise_null
    torch.testing.assert_close(got, x)


def test_cfg_plus_plus_needs_steps():
    with pytest.raises(UserError, match="fixed steps"):
        sample_ode(CFGPlusPlus().bind(TwoClasses(LinearPath()), LABELS), scalars(2), "dopri5")


def test_a_field_can_be_called_after_sampling():
    field = Guidance(1.5, (0.0, 0.5)).bind(Model(), LABELS)
    sample_ode(field, NOISE, "euler", 2)
    torch.testing.assert_close(field(NOISE, torch.full((2,), 0.9, dtype=torch.float64)), guided(1.0))


@pytest.mark.parametrize("interval", [(0.7, 0.0), (-0.1, 0.5), (0.5, 1.1), (math.nan, 1.0)])
def test_bad_intervals_are_told(interval):
    with pytest.raises(UserError, match="interval"):
        Guidance(interval=interval)


def test_other_bad_values_are_told():
    with pytest.raises(UserError, match="did you mean cosine"):
        Guidance(schedule="cosin")
    with pytest.raises(UserError, match="rescale"):
        Guidance(rescale=1.5)
    with pytest.raises(UserError, match="channels"):
        Guidance(channels=0)
    with pytest.raises(UserError, match="between 0 and 1"):
        CFGPlusPlus(scale=1.65)


def test_a_model_without_null_class_is_told():
    with pytest.raises(UserError, match="null class"):
        Guidance().bind(lambda x, t, y: x, LABELS)


def test_one_by_one_gives_what_the_doubled_batch_gives():
    one_by_one, doubled = Model(), Model()
    t = torch.full((2,), 0.5, dtype=torch.float64)
    v = Guidance(1.5, EVERYWHERE, doubled=False).bind(one_by_one, LABELS)(NOISE, t)
    torch.testing.assert_close(v, Guidance(1.5, EVERYWHERE, doubled=True).bind(doubled, LABELS)(NOISE, t))
    assert one_by_one.batches == [2, 2]
    assert doubled.batches == [4]


def test_out_of_memory_goes_on_one_by_one():
    class Small(Model):
        def __call__(self, x, t, y):
            if len(x) > 2:
                raise torch.OutOfMemoryError
            return super().__call__(x, t, y)

    model, t = Small(), torch.full((2,), 0.5, dtype=torch.float64)
    field = Guidance(1.5, EVERYWHERE).bind(model, LABELS)
    torch.testing.assert_close(field(NOISE, t), guided(1.5))
    field(NOISE, t)
    assert model.batches == [2, 2, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        Guidance(1.5, EVERYWHERE, doubled=True).bind(model, LABELS)(NOISE, t)


def test_a_model_may_mean_something_else_by_path():
    """Only an interpolation path counts: a denoiser of one's own may keep the name of its file there."""
    model = Model()
    model.path = "weights.safetensors"
    for guidance in (Guidance(scale=2.0, interval=EVERYWHERE), CFGPlusPlus(scale=0.6)):
        field = guidance.bind(model, LABELS)
        assert sample_ode(field, NOISE, solver="euler", steps=2).isfinite().all()
        assert sample_sde(field, NOISE, solver="euler_maruyama", steps=2).isfinite().all()
    plain = lambda x, t: model(x, t, LABELS)  # noqa: E731
    plain.path = model.path
    assert sample_sde(plain, NOISE, solver="euler_maruyama", steps=2).isfinite().all()


class TwoHeads(Model):
    """As `Model`; its middle head's velocity is -x."""

    def with_middle(self, x, t, y):
        return self(x, t, y), -x


def test_internal_guidance_is_its_papers_formula_in_one_evaluation():
    """m + w (v - m), alone and inside classifier-free guidance, each on its own interval."""
    model = TwoHeads()
    field = Guidance(1.0, internal=1.4, internal_interval=(0.25, 0.5)).bind(model, LABELS)
    for t, w in ((0.2, 1.0), (0.3, 1.4), (0.6, 1.0)):
        factors = torch.tensor([-1 + w * (1 + 1), -1 + w * (2 + 1)], dtype=torch.float64)
        found = field(NOISE, torch.full((2,), t, dtype=torch.float64))
        torch.testing.assert_close(found, factors.reshape(-1, 1, 1, 1) * NOISE)
    assert model.batches == [2, 2, 2]
    for solve, solver in ((sample_ode, "heun"), (sample_sde, "stochastic_heun")):
        counts = [
            solve(guidance.bind(TwoHeads(), LABELS), NOISE, solver=solver, steps=4, return_info=True)[1].nfe
            for guidance in (Guidance(1.0), Guidance(1.0, internal=1.4))
        ]
        assert counts[0] == counts[1]
    both = Guidance(1.5, (0.0, 0.5), internal=1.4, internal_interval=(0.25, 1.0)).bind(model, LABELS)
    for t, s, w in ((0.1, 1.5, 1.0), (0.4, 1.5, 1.4), (0.8, 1.0, 1.4)):
        null = -1 + w * (3 + 1)
        factors = torch.tensor([null + s * (-1 + w * (v + 1) - null) for v in (1, 2)], dtype=torch.float64)
        found = both(NOISE, torch.full((2,), t, dtype=torch.float64))
        torch.testing.assert_close(found, factors.reshape(-1, 1, 1, 1) * NOISE)
        assert both.evaluations == 1 + (s != 1)
    with pytest.raises(UserError, match="internal guidance needs a denoiser with a middle head"):
        Guidance(1.0, internal=1.4).bind(Model(), LABELS)
