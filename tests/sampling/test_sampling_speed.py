"""Sampling in half precision and compiled: the same images within the precision, and what is cast or decoded when."""

from __future__ import annotations

import functools

import pytest
import torch
from small_samplers import LABELS, images, small_sampler

from dic_repa.models import DiC
from dic_repa.sampling import sampler as sampler_module
from dic_repa.sampling.sampler import decode_batches


def test_half_precision_gives_the_same_images_within_its_rounding():
    expected, half = images(small_sampler()), small_sampler(precision="bf16")
    torch.testing.assert_close(images(half), expected, rtol=0, atol=0.02)
    assert next(half.denoiser.parameters()).dtype == torch.float32  # a run goes on averaging into it


def test_weights_are_cast_once_a_call_and_follow_the_original():
    half, casts = small_sampler(precision="bf16"), []
    before = images(half)
    (cast,) = half._cast.values()
    cast.register_load_state_dict_post_hook(lambda *_: casts.append(1))
    for parameter in half.denoiser.parameters():
        parameter.mul_(2)
    after = images(half)
    assert len(casts) == 1  # two batches of three steps
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(cast.stem.weight, half.denoiser.stem.weight.bfloat16())


@pytest.fixture
def graphs(monkeypatch):
    """What torch.compile has been given to compile, which here runs as it is."""
    given = []

    def keep(graph, _inputs, **_options):
        given.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: compile_(model, backend=keep, dynamic=dynamic))
    yield given
    torch._dynamo.reset()


def test_compiled_sampling(graphs):
    compiled = images(small_sampler(compile="reduce-overhead"))
    assert len(graphs) == 2  # one for the plain batch, one for the doubled
    torch.testing.assert_close(compiled, images(small_sampler()), rtol=1e-5, atol=1e-5)


def test_many_images_on_a_gpu_are_compiled_by_block(monkeypatch):
    modes = []
    monkeypatch.setattr(sampler_module, "can_compile", lambda denoiser, device: True)
    monkeypatch.setattr(sampler_module, "CompiledDenoiser", lambda model, mode: modes.append(mode) or model)
    monkeypatch.setattr(sampler_module, "MANY", 4 * 3)  # four batches of two images, each of three steps
    sampler = small_sampler()
    images(sampler, torch.zeros(6, dtype=torch.int64))
    assert not modes
    images(sampler, torch.zeros(7, dtype=torch.int64))
    images(sampler, torch.zeros(8, dtype=torch.int64))
    assert modes == ["blocks"]


def test_a_scale_that_changes_is_not_compiled_for(graphs):
    sampler = small_sampler(compile="reduce-overhead", solver="euler_maruyama")
    sampler.settings.guidance.schedule, sampler.settings.steps = "cosine", 8
    images(sampler)
    assert len(graphs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["heun", "euler_maruyama"])
def test_a_smaller_last_batch_is_not_compiled_for(graphs, solver):
    sampler = small_sampler(compile="default", solver=solver)
    batches = list(sampler(LABELS[:3]))
    assert [len(batch) for batch in batches] == [2, 1]
    assert len(graphs) == 2  # as for full batches
    torch.testing.assert_close(torch.cat(batches), images(sampler)[:3], rtol=0, atol=0)
    images(sampler, LABELS[:1])
    assert len(graphs) == 3  # where all there is fits into one batch, it is of that size; doubled, of the full one's


def test_batches_are_decoded_as_they_come():
    made = []

    def samples():
        for k in range(3):
            made.append(k)
            yield torch.full((1,), float(k))

    decoded = decode_batches(samples(), functools.partial(torch.add, other=1))
    assert [float(batch) for batch in decoded] == [1, 2, 3]
    assert made == [0, 1, 2]


def test_a_doubled_batch_that_does_not_fit_is_tried_once(monkeypatch):
    expected, full = images(small_sampler()), []
    forward = DiC.forward

    def limited(self, x, t, y):
        if len(x) > 2:
            full.append(len(x))
            raise torch.OutOfMemoryError
        return forward(self, x, t, y)

    monkeypatch.setattr(DiC, "forward", limited)
    torch.testing.assert_close(images(small_sampler()), expected)
    assert full == [4]  # in the first of two batches


@pytest.mark.gpu
def test_the_cpu_waits_for_a_gpu_only_to_hand_out_images():
    sampler = small_sampler(solver="euler_maruyama", precision="bf16")
    sampler.denoiser.to("cuda")
    images(sampler)  # what is done once
    torch.cuda.set_sync_debug_mode("error")
    try:
        samples = list(sampler.solved(LABELS))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(batch.is_pinned() for batch in decode_batches(samples, torch.neg))  # else the copies would wait


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["heun", "euler_maruyama"])
def test_a_gpu_makes_the_same_images(solver):
    expected, sampler = images(small_sampler(solver=solver)), small_sampler(solver=solver)
    sampler.denoiser.to("cuda")
    torch.testing.assert_close(images(sampler), expected, rtol=1e-3, atol=1e-3)
