"""A sample's noise is its own: independent of batch, order and everything but (seed, index, step).

Philox's known answers are those of its authors (Random123, `kat_vectors`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dic_repa.samplers.noise as noise_module
from dic_repa.errors import UserError
from dic_repa.samplers import StepNoise, initial_noise, sample_sde
from dic_repa.samplers.philox import fill_normal, philox, split_words

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


KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_its_authors_answers(counter, key, answer):
    several = torch.tensor(words(counter))[:, None].repeat(1, 5)  # no shorter than what vector instructions take
    assert [word.tolist() for word in philox(several, words(key))] == [[word] * 5 for word in words(answer)]


class AsOnGPU(list):
    """Rows for torch's own arithmetic, as a GPU's are."""

    is_cuda = True


def test_torch_and_numpy_do_the_same_arithmetic():
    counter = torch.randint(0, 2**32, (4, 3000), generator=torch.Generator().manual_seed(0))
    by_torch = philox(AsOnGPU(counter.clone()), [123, 2**32 - 5])
    assert all(torch.equal(a, b) for a, b in zip(by_torch, philox(counter, [123, 2**32 - 5]), strict=True))


def test_normal_numbers_are_box_and_mullers():
    drawn = torch.randint(0, 2**32, (4, 1000), generator=torch.Generator().manual_seed(0))
    drawn[:, :4] = torch.tensor([0, 1, 2**31, 2**32 - 1])
    u = (drawn.numpy() + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * np.pi * u[1::2]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)  # (pair, which of it, 1000)
    out = torch.empty(1, 4, 1000)
    fill_normal(out, list(drawn[:, None]))
    torch.testing.assert_close(out[0], torch.from_numpy(expected.reshape(4, 1000)).float(), rtol=3e-7, atol=1e-7)


def steps_of(seed: int, indices: list[int], count: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    made, like = StepNoise(seed, indices), torch.empty(len(indices), *shape)
    return torch.stack([made(step, like) for step in range(count)])


def test_noise_of_steps_is_standard_normal():
    ordered = steps_of(7, list(range(50)), 4, (3, 31, 33)).flatten().double().sort().values
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs((ordered**power).mean() - moment) < 5 * (96 / len(ordered)) ** 0.5
    grid = torch.arange(1, len(ordered) + 1) / len(ordered)
    distance = (torch.special.ndtr(ordered) - grid).abs().max()
    assert distance < 1.95 / len(ordered) ** 0.5  # Kolmogorov-Smirnov, passed by 999 of 1000 seeds


def test_noise_of_steps_differs_by_seed_index_step_and_place():
    rows = torch.cat([steps_of(seed, [0, 1, 2**32, -1, 2**63 + 1], 3) for seed in (0, 1, 2**32, -1)]).flatten(1)
    flat = torch.cat([rows.view(-1, 256), initial_noise(SHAPE, 0, [0, 1]).flatten(1)])
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 6 / 256**0.5
    assert len(flat.unique()) > 0.999 * flat.numel()


def test_noise_of_steps_is_the_same_in_any_batch_and_draw(monkeypatch):
    whole = steps_of(3, list(range(6)), 5, (3, 5, 7))
    assert torch.equal(whole[:, [4, 1]], steps_of(3, [4, 1], 5, (3, 5, 7)))
    assert torch.equal(whole[2], StepNoise(3, range(6))(2, whole[2]))
    for at_once in (8, 24, 700):  # pieces of a row, of few rows, of a step
        monkeypatch.setitem(noise_module._AT_ONCE, "cpu", at_once)
        assert torch.equal(whole, steps_of(3, list(range(6)), 5, (3, 5, 7)))
    double = StepNoise(3, range(6))(1, whole[1].double())
    assert double.dtype == torch.float64
    assert torch.equal(double.float(), whole[1])


def test_words_of_a_number():
    assert split_words(2**32 + 5) == (5, 1)
    assert split_words(-1) == split_words(2**64 - 1) == (2**32 - 1, 2**32 - 1)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_noise():
    made, drawn = steps_of(5, list(range(64)), 3, (4, 32, 33)), StepNoise(5, range(64))
    like = torch.empty(64, 4, 32, 33, device="cuda")
    on_gpu = torch.stack([drawn(step, like) for step in range(3)])
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), made, rtol=3e-7, atol=0)
    assert (on_gpu.cpu() != made).float().mean() < 1e-5
