"""Contrastive flow matching: its loss, what it has learnt at its least, and what guidance makes of that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gaussian_mixture import GaussianMixture
from torch import nn

from dic_repa.alignment import AlignedDenoiser
from dic_repa.conditions import class_labels
from dic_repa.data.latents import data_mean
from dic_repa.data.saved import SavedData
from dic_repa.errors import UserError
from dic_repa.interpolants import PREDICTIONS, CosinePath, LinearPath
from dic_repa.models import DiC
from dic_repa.objectives import Batch, ContrastiveFlowMatching
from dic_repa.recipe import load_recipe
from dic_repa.recipe.build import build_dataset
from dic_repa.samplers import Guidance
from dic_repa.sampling.load import Checkpoint

SHAPE = (6, 2, 3, 3)


class Affine(nn.Module):
    def forward(self, x, t, y):
        return 0.7 * x + t.reshape(-1, 1, 1, 1) - 0.2 * y.reshape(-1, 1, 1, 1)


def rows(batch: Batch, chosen: slice, whole: Batch) -> Batch:
    return Batch(batch.x[chosen], batch.y[chosen], {k: v[chosen] for k, v in batch.draws.items()}, whole=whole)


def whole_step(objective, shape=SHAPE) -> Batch:
    generator = torch.Generator().manual_seed(3)
    draws = objective.draw(shape, generator)
    return Batch(torch.randn(shape, generator=generator), torch.arange(shape[0]) % 3, draws)


@pytest.mark.parametrize(("prediction", "weighting"), [("velocity", "none"), ("data", "velocity")])
def test_the_loss_is_the_papers_and_the_same_in_one_pass_as_in_three(prediction, weighting):
    objective = ContrastiveFlowMatching(contrast=0.2, prediction=prediction, weighting=weighting)
    model, batch = AlignedDenoiser(Affine()), whole_step(objective)
    loss = objective(model, batch).loss
    parts = [objective(model, rows(batch, slice(k, k + 2), batch)).loss for k in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), loss)

    given = batch.x, batch.y, *(batch.draws[name] for name in ("noise", "t", "other"))
    x, y, noise, t, other = (values.double().numpy() for values in given)
    for i, j in enumerate(other.astype(int)):
        x_t = (1 - t[i]) * x[i] + t[i] * noise[i]
        velocity = 0.7 * x_t + t[i] - 0.2 * y[i]
        if prediction == "data":
            velocity = (x_t - velocity) / t[i]
        own, others = noise[i] - x[i], noise[j] - x[j]
        expected = np.mean((velocity - own) ** 2) - 0.2 * np.mean((velocity - others) ** 2)
        assert loss[i].item() == pytest.approx(expected, rel=1e-4)


def test_each_is_contrasted_with_any_other_and_never_with_itself():
    draws = [ContrastiveFlowMatching().draw((5, 1), torch.Generator().manual_seed(k))["other"] for k in range(400)]
    drawn = torch.stack(draws)
    counts = torch.stack([(drawn == j).sum(0) for j in range(5)])
    assert not counts.diagonal().any()
    assert counts[~torch.eye(5, dtype=torch.bool)].min() > 60  # of 100 on average
    plain = {key: value for key, value in whole_step(ContrastiveFlowMatching()).draws.items() if key != "other"}
    assert plain.keys() == {"t", "noise"}


def test_a_step_of_one_image_has_no_other():
    objective = ContrastiveFlowMatching()
    batch = whole_step(objective, (1, 2, 3, 3))
    with pytest.raises(UserError, match="another sample in each step"):
        objective(AlignedDenoiser(Affine()), rows(batch, slice(None), batch))
    with pytest.raises(UserError, match="below 1"):
        ContrastiveFlowMatching(contrast=1)


@pytest.mark.parametrize(("prediction", "weighting"), [("velocity", "none"), ("data", "velocity")])
def test_on_gaussian_data_the_least_loss_is_the_formulas(prediction, weighting):
    """Of x ~ N(m, s^2) the velocity that plain flow matching learns is a line in x_t; least squares find ours."""
    m, s, t, contrast, count = 0.8, 0.5, 0.6, 0.1, 200_000
    objective = ContrastiveFlowMatching(contrast=contrast, prediction=prediction, weighting=weighting)
    generator = torch.Generator().manual_seed(0)
    noise, drawn = torch.randn(2, count, 1, 1, 1, generator=generator, dtype=torch.float64)
    x = m + s * drawn
    noisy = objective.corrupt(x, torch.full((count,), t, dtype=torch.float64), noise, x.roll(1, 0), noise.roll(1, 0))
    line = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def loss(line):
        return objective.loss(line[0] * noisy.x_t + line[1], noisy).double().mean()

    # The loss is quadratic: one Newton step from anywhere ends at its least.
    gradient = torch.autograd.functional.jacobian(loss, line)
    least = line - torch.linalg.solve(torch.autograd.functional.hessian(loss, line), gradient)

    slope = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)  # cov(v, x_t) / var(x_t)
    for x_t in (-1.0, 0.4, 2.0):
        velocity = least[0] * x_t + least[1]
        velocity = (x_t - velocity) / t if prediction == "data" else velocity
        plain = -m + slope * (x_t - (1 - t) * m)
        assert velocity.item() == pytest.approx((plain + contrast * m) / (1 - contrast), abs=0.02)


WEIGHTINGS = {"velocity": "none", "noise": "none", "score": "likelihood", "data": "velocity"}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=["linear", "cosine"])
def test_guidance_gets_what_plain_flow_matching_learns(path, prediction):
    """A denoiser at the least contrastive loss, guided, is the exact denoiser of the data, guided."""
    objective = ContrastiveFlowMatching(0.1, path, prediction=prediction, weighting=WEIGHTINGS[prediction])
    classes = [GaussianMixture([[mean, -mean]], [1.0], 0.4) for mean in (-0.8, 0.6)]
    classes.append(GaussianMixture([[-0.8, 0.8], [0.6, -0.6]], [0.5, 0.5], 0.4))
    mean, unit = classes[2].mean.reshape(2, 1, 1), objective.unit

    def exact(x, t, y):
        return torch.stack([data.predict(path, x, t, "velocity") for data in classes])[y, torch.arange(len(x))]

    def contrastive(x, t, y):
        learnt = path.convert(exact(x, t, y), x, t, "velocity", unit)
        away = path.target(mean.expand_as(x), torch.zeros_like(x), t, unit)
        return path.convert((learnt - 0.1 * away) / 0.9, x, t, unit, prediction)

    exact.num_classes = contrastive.num_classes = 2
    x, y = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(4, 2, 1, 1), torch.tensor([0, 1, 1, 0])
    guidance = Guidance(1.7, (0.2, 0.7))
    for known, corrected in ((mean, True), (None, False)):
        objective.data_mean = known
        model = objective.velocity_model(contrastive)
        within, outside = (torch.full((4,), t, dtype=torch.float64) for t in (0.4, 0.9))
        same = torch.allclose(guidance.bind(model, y)(x, within), guidance.bind(exact, y)(x, within), rtol=1e-6)
        assert same == corrected
        torch.testing.assert_close(guidance.bind(model, y)(x, outside), model(x, outside, y))


def test_the_guided_velocity_is_the_papers_formula():
    """w ((1 - lambda) v_y + lambda T) + (1 - w) ((1 - lambda) v_null + lambda T), with T minus the data's mean."""
    objective = ContrastiveFlowMatching(0.05)
    objective.data_mean = mean = torch.tensor([0.3, -0.5]).reshape(2, 1, 1)
    model = objective.velocity_model(AlignedDenoiser(Affine()).denoiser)
    model.null = lambda y: torch.full_like(y, 4)
    x, y, t = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2]), 0.5
    found = Guidance(1.85, (0.0, 0.65)).bind(model, y)(x, torch.full((3,), t))
    of_class, of_null = 0.7 * x + t - 0.2 * y.reshape(-1, 1, 1, 1), 0.7 * x + t - 0.8
    expected = 1.85 * (0.95 * of_class - 0.05 * mean) - 0.85 * (0.95 * of_null - 0.05 * mean)
    torch.testing.assert_close(found, expected)


def test_a_checkpoint_brings_the_mean_of_its_data(tmp_path):
    recipe = load_recipe("digits-contrastive", ["sample.guidance={scale: 1.5}"])
    digits = build_dataset(recipe.data)
    pixels = np.stack([digits[k]["x"].numpy() for k in range(len(digits))]).astype(np.float64)
    mean = data_mean(digits, count=len(digits))
    np.testing.assert_allclose(mean.numpy(), pixels.mean(axis=0), rtol=0, atol=1e-6)

    SavedData(None, class_labels(10), mean).write(tmp_path)
    kept = SavedData.read(tmp_path)
    assert torch.equal(kept.mean, mean)
    model = Checkpoint(DiC(8, (1, 1, 1, 1, 1), 1, 10), recipe, Path("a run"), kept)
    assert torch.equal(model.sampler(recipe.sample).objective.data_mean, mean)
    model.data = SavedData(None, class_labels(10), mean[:, :8])
    with pytest.raises(UserError, match="the data's mean"):
        model.sampler(recipe.sample)
