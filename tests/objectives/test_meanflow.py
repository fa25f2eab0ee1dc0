"""MeanFlow's target against finite differences, and on Gaussian data, where the average velocity is known."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dic_repa.alignment import AlignedDenoiser
from dic_repa.conditions import class_labels
from dic_repa.errors import UserError
from dic_repa.export.inputs import example_inputs
from dic_repa.models import create_denoiser
from dic_repa.models.derivative import total_derivative
from dic_repa.objectives import Batch, FlowMatching, ImprovedMeanFlow, MeanFlow
from dic_repa.recipe import load_recipe
from dic_repa.samplers import Guidance, log_likelihood, sample_ode
from dic_repa.sampling import override_sampling
from dic_repa.sampling.load import Checkpoint
from dic_repa.training.memory_estimate import activation_bytes
from dic_repa.training.start import start_from

MEAN, STD = 0.7, 0.5
SIZES = {
    "DiC": {"width": 8, "depths": (1, 1, 1, 1, 1)},
    "SiT": {"width": 16, "depth": 1, "num_heads": 2},
    "U-ViT": {"width": 16, "depth": 1, "num_heads": 2, "size": 8},
}
OBJECTIVES = [MeanFlow, ImprovedMeanFlow]


def denoiser_of(name, two_times=True, **options):
    """A small one of two classes in float64, with weights that make its output depend on everything."""
    torch.manual_seed(0)
    options = {"in_channels": 1, "num_classes": 2, "two_times": two_times, **SIZES[name], **options}
    denoiser = create_denoiser(name, **options).double()
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    return denoiser


def batch_of(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, tangent = (torch.randn(rows, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    t, r = torch.rand(2, rows, generator=generator, dtype=torch.float64).sort(0, descending=True).values
    return x, tangent, torch.stack([t, r], dim=1), torch.arange(rows) % 3


class ExactAverage(nn.Module):
    """The average velocity of data N(MEAN, STD^2): the ODE keeps (x - mean_t) / std_t. `error` is added to it."""

    num_classes, two_times, error = 1, True, 0.0

    def forward(self, x, t, y):
        t, r = (t, t) if t.ndim == 1 else t.unbind(1)
        t, r = t.reshape(-1, 1, 1, 1), r.reshape(-1, 1, 1, 1)
        mean_t, mean_r = (1 - t) * MEAN, (1 - r) * MEAN
        std_t, std_r = (((1 - time) * STD).square() + time.square() for time in (t, r))
        std_t, std_r = std_t.sqrt(), std_r.sqrt()
        velocity = -MEAN + (t - (1 - t) * STD**2) / std_t.square() * (x - mean_t)
        moved = x - mean_r - std_r / std_t * (x - mean_t)
        return torch.where(t == r, velocity, moved / torch.where(t == r, 1.0, t - r)) + self.error * x * t


@pytest.mark.parametrize("name", SIZES)
def test_total_derivative_against_finite_differences(name):
    denoiser = denoiser_of(name)
    x, tangent, times, y = batch_of(3)
    step, along = 1e-5, torch.tensor([1.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (denoiser(x + h * tangent, times + h * along, y) for h in (step, -step))
        found = total_derivative(denoiser, x, times, y, tangent)
        own = denoiser(x, times[:, :1].expand(-1, 2), y)
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(
        total_derivative(denoiser, x, times, y, None), total_derivative(denoiser, x, times, y, own)
    )


def test_the_loss_takes_the_derivative_in_the_precision_of_the_weights():
    """Under autocast, which would give it three digits; and nothing of it stays with the taps."""
    denoiser = denoiser_of("SiT").float()
    x, tangent, times, y = (each.float() if each.is_floating_point() else each for each in batch_of(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = AlignedDenoiser(denoiser).derivative(x, times, y, tangent)
    torch.testing.assert_close(found, total_derivative(denoiser, x, times, y, tangent), rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32
    assert not found.requires_grad


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exact_average_velocity_is_the_fixed_point(objective):
    """The target is linear in the velocity of the pair, so its mean is the target of their mean, the field's velocity;
    pairs are made to have just that."""
    exact = ExactAverage()
    objective = objective(p=0.0, kappa=0.0, span_share=1.0)
    draws = objective.draw((64, 1, 2, 2), torch.Generator().manual_seed(0))
    t = draws["t"].double()
    x_t = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    velocity, y = exact(x_t, t, None), torch.zeros(64, dtype=torch.int64)
    time = t.reshape(-1, 1, 1, 1)
    draws = {"t": t, "r": draws["r"].double(), "noise": x_t + (1 - time) * velocity}
    batch = Batch(x_t - time * velocity, y, draws)
    assert objective(AlignedDenoiser(exact), batch).loss.max() < 1e-20
    exact.error = 0.01
    assert objective(AlignedDenoiser(exact), batch).loss.min() > 1e-8


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_target_for_the_rows_that_span(objective):
    """The loss against the formula, with the derivative of all rows by finite differences; and in equal parts."""
    objective, denoiser = objective(p=0.0, kappa=0.0), denoiser_of("DiC")
    x, _, _, y = batch_of(8)
    draws = {name: value.double() for name, value in objective.draw(x.shape, torch.Generator().manual_seed(3)).items()}
    model = AlignedDenoiser(denoiser)
    losses = objective(model, Batch(x, y, draws)).loss
    t, r = draws["t"], draws["r"]
    t4, span, noise = t.reshape(-1, 1, 1, 1), (t - r).reshape(-1, 1, 1, 1), draws["noise"]
    x_t, pair, times = (1 - t4) * x + t4 * noise, noise - x, torch.stack([t, r], dim=1)
    with torch.no_grad():
        tangent = pair if type(objective) is MeanFlow else denoiser(x_t, t, y)
        step, along = 1e-5, torch.tensor([1.0, 0.0], dtype=torch.float64)
        ahead, behind = (denoiser(x_t + h * tangent, times + h * along, y) for h in (step, -step))
        target = pair - span * (ahead - behind) / (2 * step)
        expected = (denoiser(x_t, times, y) - target).square().flatten(1).sum(1)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    assert (span > 0).sum() == 8 * objective.span_share
    for parts in (2, 8):  # of one row, which row spans is not known
        cut = [{name: value.chunk(parts)[k] for name, value in draws.items()} for k in range(parts)]
        each = [objective(model, Batch(x.chunk(parts)[k], y.chunk(parts)[k], cut[k])).loss for k in range(parts)]
        torch.testing.assert_close(torch.cat(each), losses)


@pytest.mark.parametrize(("p", "c"), [(1.0, 0.01), (0.5, 1e-3), (0.0, 1.0)])
def test_adaptive_weight(p, c):
    squared = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    loss = MeanFlow(p=p, c=c).adaptive(squared)
    loss.sum().backward()
    weight = torch.tensor([(0.5 + c) ** -p, (2.0 + c) ** -p], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), squared.detach() * weight)
    torch.testing.assert_close(squared.grad, weight)


def test_times_as_in_the_paper():
    """t and r are the larger and smaller of two logit-normal times; a quarter of the rows, evenly spread, has r < t."""
    draws = MeanFlow().draw((8000, 1, 1, 1), torch.Generator().manual_seed(0))
    t, r = draws["t"], draws["r"]
    assert (r < t).reshape(-1, 4).tolist() == [[False, False, False, True]] * 2000
    both = torch.logit(torch.stack([t, r])[:, 3::4])
    assert abs(both.mean() + 0.4) < 0.05
    assert abs(both.std() - 1) < 0.05
    assert abs((both[0] - both[1]).mean() - 2 / torch.pi**0.5) < 0.05  # of |a - b| for a, b ~ N(., 1)


@pytest.mark.parametrize("condition", ["classes", "vector"])
def test_guidance_inside_the_target(condition):
    """v_g = omega v + (1 - omega - kappa) u(null) + kappa u(y) in the interval; v without a condition and outside."""
    options = {} if condition == "classes" else {"num_classes": 0, "condition": {"kind": "vector", "dim": 3}}
    denoiser = denoiser_of("DiC", **options)
    x_t, velocity, _, y = batch_of(6)
    t = torch.tensor([0.1, 0.4, 0.5, 0.6, 0.7, 0.9], dtype=torch.float64)
    null = torch.full_like(y, 2)
    if condition == "vector":
        y = torch.randn(6, 3, dtype=torch.float64)
        null = torch.full_like(y, torch.nan)
        y[2] = torch.nan
    objective = MeanFlow(omega=0.6, kappa=0.7, interval=(0.2, 0.8))
    with torch.no_grad():
        found = objective.guide(AlignedDenoiser(denoiser), x_t, velocity, t, y)
        expected = 0.6 * velocity + (1 - 0.6 - 0.7) * denoiser(x_t, t, null) + 0.7 * denoiser(x_t, t, y)
    for row in range(6):
        torch.testing.assert_close(found[row], velocity[row] if row in (0, 2, 5) else expected[row])


@pytest.mark.parametrize("steps", [1, 2])
def test_solver_is_exact_with_the_exact_average(steps):
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)
    field = MeanFlow().velocity_model(ExactAverage())
    for guidance, evaluations in ((Guidance(1.0), steps), (Guidance(2.0, interval=(0, 1)), 2 * steps)):
        bound = guidance.bind(field, torch.zeros(9, dtype=torch.int64))
        x, info = sample_ode(bound, noise, "meanflow", steps, return_info=True)
        torch.testing.assert_close(x, MEAN + STD * noise)
        assert info.nfe == evaluations
    x = sample_ode(bound, noise, "heun", 200)  # the velocity is the average at r = t
    torch.testing.assert_close(x, MEAN + STD * noise, atol=1e-4, rtol=0)


def test_solver_needs_average_velocities():
    velocity = lambda x, t: x  # noqa: E731
    noise = torch.zeros(1, 1, 1, 1)
    with pytest.raises(UserError, match="trained with the objective meanflow"):
        sample_ode(velocity, noise, "meanflow", 1)
    with pytest.raises(UserError, match="to data only"):
        log_likelihood(velocity, noise, solver="meanflow", steps=2)


@pytest.mark.parametrize("name", SIZES)
def test_a_second_time_changes_nothing_at_first(name):
    """A new denoiser of two times with the weights of one for one time is the same function at any r."""
    plain, both = (create_denoiser(name, 1, 2, two_times=two, **SIZES[name]) for two in (False, True))
    assert "two_times" not in plain.config
    assert both.config["two_times"]
    weights = denoiser_of(name, two_times=False).float().state_dict()
    plain.load_state_dict(weights)
    missing = both.load_state_dict(weights, strict=False)
    assert missing.missing_keys
    assert all("span" in key for key in missing.missing_keys)
    x, _, times, y = batch_of(3)
    x, times = x.float(), times.float()
    with torch.no_grad():
        torch.testing.assert_close(both(x, times, y), plain(x, times[:, 0], y), rtol=0, atol=0)
        assert torch.equal(both(x, times[:, 0], y), plain(x, times[:, 0], y))
        shared = both(x, times[:1].expand(3, 2), y)
        torch.testing.assert_close(shared, both(x, times[:1].repeat(3, 1), y))
    with pytest.raises(UserError, match="two_times: true"):
        plain(x, times, y)
    with pytest.raises(UserError, match=r"set model\.options\.two_times"):
        MeanFlow().check_denoiser(plain)
    MeanFlow().check_denoiser(both)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"path": "vp"}, "linear or cosine"),
        ({"span_share": 1.5}, "span_share"),
        ({"c": 0.0}, "above 0"),
        ({"kappa": 1.0}, "kappa"),
        ({"interval": (0.8, 0.2)}, "low, high"),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(UserError, match=match):
        MeanFlow(**options)


def test_a_model_that_has_learnt_guidance_is_not_guided_again():
    recipe = load_recipe("digits-meanflow", ["objective.options.kappa=0.5"])
    denoiser = create_denoiser("DiC", 1, 10, two_times=True, **SIZES["DiC"])
    settings = override_sampling(recipe.sample, {"scale": 1.8})
    with pytest.raises(UserError, match="has learnt guidance itself"):
        Checkpoint(denoiser, recipe, Path("mine")).sampler(settings)
    recipe = load_recipe("digits-meanflow", ["objective.options.kappa=0"])
    checkpoint = Checkpoint(denoiser, recipe, Path("mine"))
    assert checkpoint.sampler(settings).settings.guidance.scale == 1.8
    _, times, _ = example_inputs(checkpoint, 3)  # what an exported program takes
    assert times.shape == (3, 2)
    assert (times[:, 1] <= times[:, 0]).all()


def test_memory_is_estimated_without_the_derivative():
    """Autograd keeps nothing of the target: an estimate is flow matching's, but for the embedding of the span."""
    estimates = []
    for objective, two_times in ((FlowMatching(), False), (MeanFlow(kappa=0.0), True)):
        with torch.device("meta"):
            denoiser = create_denoiser("DiC", 1, 2, two_times=two_times, **SIZES["DiC"])
        model = AlignedDenoiser(denoiser)
        estimates.append(activation_bytes(model, objective, [], (32, 1, 8, 8), False))
    assert estimates[0] < estimates[1] < 1.2 * estimates[0]


def test_a_run_begins_from_a_model_of_one_time(tmp_path):
    plain = denoiser_of("DiC", two_times=False).float()
    plain.save_pretrained(tmp_path / "plain")
    both = create_denoiser("DiC", 1, 2, two_times=True, **SIZES["DiC"])
    recipe = load_recipe("digits-meanflow", [f"train.init_from={tmp_path / 'plain'}"])
    start = start_from(both, class_labels(2), recipe)
    assert start.fresh == {name for name in both.state_dict() if "span" in name}
    x, _, times, y = batch_of(3)
    with torch.no_grad():
        torch.testing.assert_close(both(x.float(), times.float(), y), plain(x.float(), times[:, 0].float(), y))
