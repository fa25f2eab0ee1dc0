"""TF32 and cuDNN's benchmark mode: who lets a GPU use them, told by torch's flags, which can be set without one."""

from __future__ import annotations

import pytest
import torch
from small_runs import small_recipe, small_run
from small_samplers import images, small_sampler

from dic_repa.bench.timing import Settings
from dic_repa.bench.train import bench_train
from dic_repa.evaluation import Measure, judge_digits
from dic_repa.evaluation.digits import DigitsClassifier
from dic_repa.models import DiC
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.training.dry_run import dry_run


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture
def seen(monkeypatch):
    """The flags at each call of a denoiser or of the digits' judge."""
    seen = []

    def noting(function):
        return lambda *arguments: (seen.append(flags()), function(*arguments))[1]

    monkeypatch.setattr(DiC, "forward", noting(DiC.forward))
    monkeypatch.setattr(DigitsClassifier, "features", noting(DigitsClassifier.features))
    return seen


@pytest.fixture(params=[(False, True), (True, True)], ids=["as torch has them", "as training left them"], autouse=True)
def before(request):
    found = flags()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    assert flags() == request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = found


@pytest.mark.parametrize("allowed", [True, False])
def test_put_back_after_a_failure(allowed):
    @gpu_arithmetic(allowed)
    def fail():
        assert flags() == (allowed, allowed)
        raise KeyError

    with pytest.raises(KeyError):
        fail()


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_samples_are_exact_unless_asked_otherwise(seen, precision):
    sampler = small_sampler(precision=precision)
    decode = sampler.decode
    sampler.decode = lambda x: (seen.append(flags()), decode(x))[1]
    images(sampler)
    assert len(seen) > 2 * 3
    assert set(seen) == {(precision == "tf32",) * 2}


def test_scores_are_exact(seen):
    digits = torch.rand(4, 1, 16, 16)
    judge_digits(digits, torch.arange(4))
    Measure(["fd-digits"], [{"image": digit} for digit in (digits * 255).byte()], cache=False)([digits])
    assert len(seen) >= 3
    assert set(seen) == {(False, False)}


def test_trying_a_recipe_out_puts_back_what_it_sets(seen, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    dry_run(small_recipe("train.tf32=true"), tmp_path / "run")
    assert (True, True) in seen
    narrow = ["model.width=8", "model.depths=[1,1,1,1,1]", "alignments=[]"]
    bench_train(["digits-urepa"], Settings(torch.device("cpu"), batches=(1,), rounds=1, seconds=0.0), narrow)


@pytest.fixture
def tried(monkeypatch):
    """Whether cuDNN would try its algorithms, at each call of a denoiser."""
    tried, forward = [], DiC.forward

    def noting(*arguments):
        tried.append(torch.backends.cudnn.benchmark)
        return forward(*arguments)

    monkeypatch.setattr(DiC, "forward", noting)
    yield tried
    assert not torch.backends.cudnn.benchmark  # as before


def test_algorithms_are_tried_where_shapes_are_few(tried, tmp_path, monkeypatch):
    small_run(tmp_path / "run", "train.steps=1")
    assert tried[-1]
    images(small_sampler())
    assert not tried[-1]  # a few steps are over before the best is found
    monkeypatch.setattr("dic_repa.sampling.sampler.MANY", 2 * 3)
    images(small_sampler())  # two batches of three steps
    assert tried[-1]


@pytest.mark.parametrize("asks", ["cudnn", "torch"])
def test_algorithms_are_not_tried_against_a_wish_for_determinism(monkeypatch, asks):
    if asks == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with gpu_arithmetic(False, benchmark=True):
        assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("allowed", [True, False])
def test_training_is_what_the_recipe_says(seen, tmp_path, allowed):
    small_run(tmp_path / "run", "train.steps=1", f"train.tf32={str(allowed).lower()}")
    assert seen[-1] == (allowed, allowed)
