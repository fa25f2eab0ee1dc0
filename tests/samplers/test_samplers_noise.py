"""A sample's noise is its own: independent of batch, order and everything but (seed, index, step)."""

from __future__ import annotations

import pytest
import torch

from dic_repa.errors import UserError
from dic_repa.samplers import StepNoise, initial_noise, sample_sde

SHAPE = (4, 8, 8)


def test_noise_is_the_same_in_any_batch():
    whole = initial_noise(SHAPE, 3, range(10))
    parts = torch.cat([initial_noise(SHAPE, 3, indices) for indices in ([0], [1, 2, 3], range(4, 10))])
    assert torch.equal(whole, parts)
    assert torch.equal(initial_noise(SHAPE, 3, [7, 2]), whole[[7, 2]])


def test_streams_differ_by_seed_index_and_step():
    rows = [
        initial_noise(SHAPE, 0, [0, 1]),
        initial_noise(SHAPE, 1, [0, 1]),
        StepNoise(0, [0, 1])(0, torch.empty(2, *SHAPE)),
        StepNoise(0, [0, 1])(1, torch.empty(2, *SHAPE)),
    ]
    flat = torch.cat(rows).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 5 / SHAPE[0] ** 0.5 / 8


def test_noise_is_standard_normal():
    flat = initial_noise((64, 64), 0, range(50)).flatten().double()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs((flat**power).mean() - moment) < 5 * (96 / len(flat)) ** 0.5


def test_sde_samples_do_not_depend_on_the_batch():
    def field(x, t):
        return -x

    noise = initial_noise(SHAPE, 0, range(6))
    whole = sample_sde(field, noise, steps=5, seed=1)
    parts = [sample_sde(field, noise[rows], steps=5, seed=1, indices=rows) for rows in ([0, 1, 2, 3], [4, 5])]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_wrong_batch_is_told():
    with pytest.raises(UserError, match="2 sample indices"):
        StepNoise(0, [0, 1])(0, torch.empty(3, *SHAPE))
