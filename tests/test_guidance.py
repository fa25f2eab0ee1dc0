"""Guidance: what it computes, and what it costs."""

from __future__ import annotations

import pytest
import torch

from dic_repa.errors import UserError
from dic_repa.samplers import Guidance, sample_ode

LABELS = torch.tensor([0, 1])
NOISE = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Model:
    """velocity = (1 + label) x, which records the size of every batch."""

    num_classes = 2

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        return (1 + y).reshape(-1, 1, 1, 1) * x


def test_doubled_batch_inside_the_interval_only():
    model = Model()
    sample_ode(Guidance(scale=2.0, interval=(0.25, 0.5)).bind(model, LABELS), NOISE, solver="euler", steps=8)
    # Steps start at 1, 7/8, ..., 1/8; those at 4/8, 3/8 and 2/8 are guided.
    assert model.batches == [2, 2, 2, 2, 4, 4, 4, 2]


def test_scale_one_costs_nothing():
    model = Model()
    sample_ode(Guidance(scale=1.0, interval=(0.0, 1.0)).bind(model, LABELS), NOISE, solver="euler", steps=3)
    assert model.batches == [2, 2, 2]


def test_guided_velocity():
    got = Guidance(scale=1.5, interval=(0.0, 1.0)).bind(Model(), LABELS)(NOISE, torch.full((2,), 0.5))
    factor = torch.tensor([3 + 1.5 * (1 - 3), 3 + 1.5 * (2 - 3)]).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(got, factor * NOISE)


@pytest.mark.parametrize("interval", [(0.7, 0.0), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.0)])
def test_bad_intervals_are_told(interval):
    with pytest.raises(UserError, match="interval"):
        Guidance(interval=interval)


def test_a_model_without_null_class_is_told():
    with pytest.raises(UserError, match="null class"):
        Guidance().bind(lambda x, t, y: x, LABELS)


@pytest.mark.parametrize("steps", [0, -1, None])
def test_steps_are_needed(steps):
    with pytest.raises(UserError, match="step count"):
        sample_ode(lambda x, t: x, NOISE, solver="euler", steps=steps)
