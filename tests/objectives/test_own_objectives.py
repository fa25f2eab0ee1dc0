"""Objectives of new kinds, each as small as here: two times and a derivative, a teacher, the batch's other samples.

All of them run the model themselves, and train through the real loop, aligned or not.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import TINY
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dic_repa.alignment import AlignedDenoiser, Alignment
from dic_repa.interpolants import LinearPath
from dic_repa.models import DiC, Pretrained, create_denoiser
from dic_repa.objectives import Batch, FlowMatching, ObjectiveOutput, VelocityModel, objectives
from dic_repa.recipe import load_recipe
from dic_repa.training import train


class MeanFlow:
    """The average velocity u over [r, t] (arXiv 2505.13447): u = v - (t - r) du/dt, du/dt along the path and held."""

    path = LinearPath()

    def draw(self, shape, generator, device=None):
        times = torch.rand(shape[0], 2, generator=generator, device=generator.device).sort(dim=1).values
        noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
        return {"times": times.to(device), "noise": noise.to(device)}

    def __call__(self, model, batch: Batch) -> ObjectiveOutput:
        times, noise = batch.draws["times"], batch.draws["noise"]
        r, t = times.unbind(1)
        at = t.view(-1, 1, 1, 1)
        z, velocity = (1 - at) * batch.x + at * noise, noise - batch.x

        rates = torch.tensor([0.0, 1.0], device=times.device).expand_as(times)
        with forward_ad.dual_level():  # torch.func.jvp does the same, but not through DistributedDataParallel
            out = model(forward_ad.make_dual(z, velocity), forward_ad.make_dual(times, rates), batch.y, t)
            mean, change = forward_ad.unpack_dual(out.prediction)
            projections = [forward_ad.unpack_dual(projection).primal for projection in out.projections]
        target = velocity - (t - r).view(-1, 1, 1, 1) * change.detach()
        return ObjectiveOutput((mean - target).float().square().mean(dim=(1, 2, 3)), t, projections)

    def velocity_model(self, denoiser):
        return VelocityModel(denoiser, self.path, "velocity")  # with one time t, the average over [t, t]


@objectives.register("self-distillation")
class SelfDistillation(FlowMatching):
    """Flow matching, and half the distance to what the averaged weights give of the same data with less noise."""

    def __call__(self, model, batch: Batch) -> ObjectiveOutput:
        noisy = self.corrupt(batch.x, **batch.draws)
        out = model(noisy.x_t, noisy.t, batch.y)
        with torch.no_grad():
            cleaner = self.corrupt(batch.x, noisy.t / 2, batch.draws["noise"])
            teacher = batch.averaged(cleaner.x_t, cleaner.t, batch.y)
        distance = (out.prediction - teacher).float().square().mean(dim=(1, 2, 3))
        return ObjectiveOutput(self.loss(out.prediction, noisy) + 0.5 * distance, noisy.t, out.projections)


@objectives.register("away-from-the-next")
class AwayFromTheNext(FlowMatching):
    """Flow matching, away from the velocity of the pass's next sample."""

    def __init__(self, share: float = 0.05, **options):
        super().__init__(**options)
        self.share = share

    def __call__(self, model, batch: Batch) -> ObjectiveOutput:
        noisy = self.corrupt(batch.x, **batch.draws)
        out = model(noisy.x_t, noisy.t, batch.y)
        other = (out.prediction - noisy.target.roll(1, dims=0)).float().square().mean(dim=(1, 2, 3))
        return ObjectiveOutput(self.loss(out.prediction, noisy) - self.share * other, noisy.t, out.projections)


@objectives.register("second-pass-at-other-times")
class SecondPass(FlowMatching):
    """Flow matching with a second run of the model that counts for nothing."""

    def __call__(self, model, batch: Batch) -> ObjectiveOutput:
        out = super().__call__(model, batch)
        other = self.corrupt(batch.x, 1 - batch.draws["t"], batch.draws["noise"].roll(1, dims=0))
        nothing = 0 * model(other.x_t, other.t, batch.y).prediction.float().mean(dim=(1, 2, 3))
        return ObjectiveOutput(out.loss + nothing, out.time, out.projections)


class TwoTimes(Pretrained):
    """A small denoiser of one time t (B,), or of two times (r, t) (B, 2)."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 8):
        super().__init__()
        self.config = {"in_channels": in_channels, "num_classes": num_classes, "width": width}
        self.in_channels, self.num_classes = in_channels, num_classes
        self.label = nn.Embedding(num_classes + 1, width)
        self.times = nn.Linear(2, width)
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.last = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x, t, y):
        times = t if t.ndim == 2 else torch.stack([t, t], dim=1)
        condition = self.label(y) + self.times(times)
        return self.last(F.silu(self.first(x) + condition[:, :, None, None]))


class Linear(nn.Module):
    """u = a z + b r + c t, for which all of MeanFlow is known."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.7, -0.4, 1.3))
        self.tap = nn.Identity()

    def forward(self, x, t, y):
        r, t = t[:, :1, None, None], t[:, 1:, None, None]
        return self.tap(self.a * x + self.b * r + self.c * t)


def batch_for(objective, shape, dtype=torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(0)
    draws = {name: value.to(dtype) for name, value in objective.draw(shape, generator).items()}
    x, y = torch.randn(shape, generator=generator, dtype=dtype), torch.arange(shape[0]) % 3
    return Batch(x, y, draws)


def test_mean_flow_of_a_linear_model_is_its_closed_form():
    objective, model = MeanFlow(), AlignedDenoiser(Linear())
    batch = batch_for(objective, (5, 2, 3, 3))
    out = objective(model, batch)
    out.loss.sum().backward()

    r, t = (batch.draws["times"][:, i].view(-1, 1, 1, 1) for i in (0, 1))
    noise, (a, b, c) = batch.draws["noise"], (0.7, -0.4, 1.3)
    z, v = (1 - t) * batch.x + t * noise, noise - batch.x
    error = a * z + b * r + c * t - (v - (t - r) * (a * v + c))  # du/dt = a dz/dt + c
    torch.testing.assert_close(out.loss, error.square().mean(dim=(1, 2, 3)).float())
    # The target is held fixed, so that the gradient is that of u alone.
    for parameter, change in zip(model.denoiser.parameters(), (z, r.expand_as(z), t.expand_as(z))):
        expected = (2 * error * change).mean(dim=(1, 2, 3)).sum()
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)


def aligned(denoiser: nn.Module, tap: str, channels: int) -> AlignedDenoiser:
    torch.manual_seed(1)
    head = nn.Sequential(nn.Conv2d(channels, 6, 1), nn.Flatten(2))

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = head

        def forward(self, feature, t):
            return self.layers(feature).mT * (1 + t.view(-1, 1, 1))

    return AlignedDenoiser(denoiser, [Alignment(tap, Head())])


def test_taps_within_a_derivative_are_those_of_a_plain_run():
    torch.manual_seed(0)
    model = aligned(TwoTimes().double(), "first", 8).double()
    batch = batch_for(MeanFlow(), (4, 1, 6, 6))
    out = MeanFlow()(model, batch)
    times, noise = batch.draws["times"], batch.draws["noise"]
    at = times[:, 1].view(-1, 1, 1, 1)
    plain = model((1 - at) * batch.x + at * noise, times, batch.y, times[:, 1])
    torch.testing.assert_close(out.projections, plain.projections)
    weights = [model.denoiser.first.weight, model.alignments[0].head.layers[0].weight]
    within, outside = (torch.autograd.grad(p[0].square().sum(), weights) for p in (out.projections, plain.projections))
    torch.testing.assert_close(within, outside)


@pytest.mark.parametrize("name", ["DiC", "SiT"])
def test_derivative_through_a_built_in_denoiser_is_the_difference(name):
    """d/dt of the denoiser's output along the path, as MeanFlow needs it, for the denoisers of the package."""
    torch.manual_seed(0)
    sizes = {"DiC": {"width": 8, "depths": (1, 1, 1, 1, 1)}, "SiT": {"width": 32, "depth": 2, "num_heads": 2}}
    denoiser = create_denoiser(name, 1, 10, **sizes[name]).double()
    denoiser.to(memory_format=torch.contiguous_format)  # in torch 2.6 LayerNorm has no such derivative of channels_last
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, v, t, y = (
        torch.randn(3, 1, 8, 8).double(),
        torch.randn(3, 1, 8, 8).double(),
        torch.rand(3).double(),
        torch.arange(3),
    )
    model = AlignedDenoiser(denoiser)
    with sdpa_kernel(SDPBackend.MATH):  # the attention that has a derivative forwards
        _, change = torch.func.jvp(lambda x, t: model(x, t, y).prediction, (x, t), (v, torch.ones_like(t)))
    step = 1e-2  # the embedding of the time is float32
    with torch.no_grad():
        ahead, behind = (model(x + h * v, t + h, y).prediction for h in (step, -step))
    torch.testing.assert_close(change, (ahead - behind) / (2 * step), rtol=0, atol=2e-3 * change.abs().max().item())


def test_contrastive_loss_is_the_two_distances():
    torch.manual_seed(0)
    objective, model = AwayFromTheNext(share=0.2), AlignedDenoiser(DiC(8, (1, 1, 1, 1, 1), 1, 10))
    nn.init.normal_(model.denoiser.output.conv2.weight)
    batch = batch_for(objective, (3, 1, 8, 8), dtype=torch.float32)
    out = objective(model, batch)
    t, noise = batch.draws["t"], batch.draws["noise"]
    for i in range(3):
        x_t = (1 - t[i]) * batch.x[i] + t[i] * noise[i]
        given = model.denoiser(x_t[None], t[i : i + 1], batch.y[i : i + 1])[0]
        own, other = noise[i] - batch.x[i], noise[i - 1] - batch.x[i - 1]
        expected = (given - own).square().mean() - 0.2 * (given - other).square().mean()
        torch.testing.assert_close(out.loss[i], expected, rtol=1e-4, atol=1e-5)


def run(tmp_path, name: str, *overrides: str):
    """The lines of metrics.jsonl of a few real steps."""
    short = ["train.steps=3", "train.log_every=1", "evaluate=null", f"objective.name={name}"]
    tiny = [option.removeprefix("--set=") for option in TINY]
    done = train(
        load_recipe("digits-urepa", [*tiny, *short, *overrides]), tmp_path / f"{len(list(tmp_path.iterdir()))}"
    )
    return done, [json.loads(line) for line in done.metrics_file.read_text().splitlines()]


OWN = {
    f"{__name__}:MeanFlow": ["model={name: '" + __name__ + ":TwoTimes', width: 8}", "alignments.0.tap=first"],
    "self-distillation": [],
    "away-from-the-next": ["objective.options={share: 0.1, time: logit-normal}"],
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("plain", [False, True], ids=["aligned", "plain"])
def test_own_objectives_train(tmp_path, name, plain):
    settings = [option for option in OWN[name] if not (plain and option.startswith("alignments"))]
    settings += ["alignments=[]"] if plain else []
    done, lines = run(tmp_path, name, "train.micro_batch=4", "train.sample_every=3", *settings)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and line["gradient_norm"] > 0 and not line["skipped"] for line in lines)
    assert ("alignment.0.token" in lines[0]) != plain
    if not plain:
        section = done.recipe(only_read=True).alignments[0]
        terms = lines[0]["alignment.0.token"] + section.manifold_weight * lines[0]["alignment.0.manifold"]
        assert lines[0]["loss"] == pytest.approx(lines[0]["denoising"] + section.weight * terms, rel=1e-5)
    assert (done.samples / "step_00000003.png").is_file()


def test_a_second_run_of_the_model_changes_nothing_that_was_tapped(tmp_path):
    """The projections are those of the run that the objective returns, not of the last one."""
    _, once = run(tmp_path, "flow-matching", "objective.options={}")
    _, twice = run(tmp_path, "second-pass-at-other-times")
    told = ["loss", "denoising", "alignment.0.token", "alignment.0.manifold", "gradient_norm"]
    for a, b in zip(once, twice, strict=True):
        assert [b[name] for name in told] == pytest.approx([a[name] for name in told], rel=1e-6)
