"""The warm-up of the averaged weights, what is shown of them while they are behind, and sampling from other weights."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import SMALL, assert_same, small_recipe, small_run

import dic_repa.training.after_step
from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.evaluation.runs import evaluate_run
from dic_repa.recipe import TrainSection, list_recipes, load_recipe
from dic_repa.recipe.keys import differences
from dic_repa.runs import RunFolder
from dic_repa.sampling.load import load
from dic_repa.training import EMA

GRIDS = ["train.ema_decay=0.9999", "train.sample_every=8", "sample.steps=1"]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def lag_of_a_weight_that_rises_by_one(steps: int, **options) -> float:
    weight = torch.nn.Linear(1, 1, bias=False).double()
    weight.weight.data.zero_()
    ema = EMA(weight, **options)
    ema.model.double()
    for step in range(1, steps + 1):
        weight.weight.data.fill_(float(step))
        ema.update(weight, step)
    return steps - ema.model.weight.item()


@pytest.mark.parametrize("n", [1, 8, 400])
def test_average_is_a_tenth_of_the_steps_behind(n):
    """Of w_n = n the recurrence has a closed form: behind by (n + 1) / 10 - 9! (n + 1)! / (n + 10)! with warm-up, and
    by d (1 - d^n) / (1 - d) without.
    """
    warm = (n + 1) / 10 - math.exp(math.lgamma(10) + math.lgamma(n + 2) - math.lgamma(n + 11))
    cold = 0.9999 * (1 - 0.9999**n) / (1 - 0.9999)
    for expected, warmup in ((warm, True), (cold, False)):
        assert lag_of_a_weight_that_rises_by_one(n, decay=0.9999, warmup=warmup) == pytest.approx(expected, rel=1e-6)
        assert EMA(torch.nn.Linear(1, 1), 0.9999, warmup).lag(n) == pytest.approx(expected, rel=1e-9)
    assert EMA(torch.nn.Linear(1, 1), 0.9, True).decay_at(1000) == 0.9  # (1 + n) / (10 + n) is more


@pytest.mark.parametrize("batch", [32, 256])
def test_half_is_forgotten_after_as_many_images_for_any_batch(batch):
    """Of a weight that jumps from 0 to 1, the average is 1/2 after the half-life and 3/4 after twice that."""
    settings = TrainSection(batch_size=batch, ema_half_life=1024, ema_decay=0.5)
    weight = torch.nn.Linear(1, 1, bias=False)
    weight.weight.data.zero_()
    ema, found = EMA(weight, settings.sampled_decay), []
    weight.weight.data.fill_(1.0)
    for step in range(1, 2048 // batch + 1):
        ema.update(weight, step)
        found.append(ema.model.weight.item())
    assert (found[1024 // batch - 1], found[-1]) == pytest.approx((0.5, 0.75), rel=1e-5)
    assert TrainSection(ema_decay=0.5).sampled_decay == 0.5


def test_warmup_is_the_default_but_for_the_rows_of_papers():
    rows = 0
    for name in list_recipes():
        recipe = load_recipe(name)
        if hasattr(recipe, "train"):
            assert recipe.train.ema_warmup == (recipe.paper is None and name != "imagenet256"), name
            rows += recipe.paper is not None
    assert rows > 30


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of eight steps as it is by default, and one without warm-up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        folder = tmp_path_factory.mktemp("runs")
        more = ["train.more_ema_decays=[0.2]", *GRIDS]
        return small_run(folder / "warm", *more), small_run(folder / "cold", "train.ema_warmup=false", *more)


def distances(run: RunFolder) -> tuple[float, float]:
    """Of the average after eight steps from the weights then, and after four."""
    average = load_file(run.checkpoint_path(8) / "ema/model.safetensors")
    found = []
    for step in (8, 4):
        raw = load_file(run.checkpoint_path(step) / "model.safetensors")
        found.append(torch.stack([(raw[f"denoiser.{name}"] - average[name]).norm() for name in average]).norm().item())
    return tuple(found)


def test_early_average_is_near_the_weights(runs):
    warm, cold = (distances(run) for run in runs)
    assert warm[0] < warm[1]  # nearer to the last weights than to those of half way
    assert cold[0] > cold[1]  # the initial weights, still
    assert warm[0] < 0.3 * cold[0]


def test_resumed_run_has_the_same_average(runs, tmp_path):
    stopped = small_run(tmp_path / "run", "train.steps=4", "train.more_ema_decays=[0.2]", "train.ema_decay=0.9999")
    small_run(stopped.path, "train.more_ema_decays=[0.2]", *GRIDS, resume=True)
    for name in ("ema", "ema-0.2"):
        whole, resumed = (load_file(run.checkpoint_path(8) / name / "model.safetensors") for run in (runs[0], stopped))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_run_of_before_goes_on_without(tmp_path):
    run = small_run(tmp_path / "run", "train.steps=1", "train.ema_warmup=false")
    run.recipe_file.write_text(run.recipe_file.read_text().replace("  ema_warmup: false\n", ""))
    assert run.recipe().train.ema_warmup is False
    assert "train.ema_warmup" in differences(run.recipe(), small_recipe("train.steps=1"))


def test_grid_shows_the_raw_weights_too_while_the_average_is_far_behind(runs, tmp_path, monkeypatch):
    with Image.open(runs[0].samples / "step_00000008.png") as picture:
        sheet = np.asarray(picture)
    middle = sheet.shape[1] // 2
    assert np.ptp(sheet[:30, : middle - 20]) > 100  # a title above each half
    assert np.ptp(sheet[:30, middle + 20 :]) > 100

    drawn = []
    monkeypatch.setattr(
        dic_repa.training.after_step,
        "draw_grid",
        lambda images, *_, **__: drawn.append(images) or Image.new("L", (9, 9)),
    )
    run = small_run(tmp_path / "short", "train.steps=8", "train.more_ema_decays=[0.2]", *GRIDS, "train.sample_every=4")
    assert len(drawn) == 4
    for half, weights in zip(drawn[2:], ("ema", "raw")):
        assert_same({weights: half}, {weights: samples(run, weights)}, atol=1e-5)
    assert not torch.equal(*drawn[2:])
    for name in ("ema", "ema-0.2"):  # a grid at step 4 has changed nothing
        assert_same(*(load_file(r.checkpoint_path(8) / name / "model.safetensors") for r in (run, runs[0])))

    drawn.clear()
    small_run(tmp_path / "quick", "train.steps=16", *GRIDS, "train.ema_decay=0.5", "train.sample_every=16")
    assert len(drawn) == 1  # a step behind


def samples(run: RunFolder, weights: str) -> torch.Tensor:
    """As in the progress grid."""
    loaded = load(run.path, weights=weights)
    return torch.cat(list(loaded.sampler(loaded.recipe.sample)(torch.arange(10).repeat(6))))


@pytest.fixture
def call(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(verb, *arguments) -> str:
        with pytest.raises(SystemExit) as exit:
            main([verb, str(runs[0].path), "--steps=1", "--num=10", *arguments])
        assert exit.value.code == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_sampling_the_raw_weights(call, runs, tmp_path, mistake):
    call("sample")
    call("sample", "--weights=raw")
    call("sample", "--weights=ema-0.2")
    specs = [json.loads((tmp_path / f"samples/warm{end}/samples.json").read_text()) for end in ("", "-raw", "-ema-0.2")]
    assert [spec["sample"]["weights"] for spec in specs] == ["ema", "raw", "ema-0.2"]
    assert len({spec["weights"] for spec in specs}) == 3
    assert samples(runs[0], "raw").shape == (60, 1, 16, 16)
    error = mistake("sample", runs[0].path, "--weights=raw", "--steps=1", "--num=10", "--out=samples/warm")
    assert "sample.weights" in error
    error = mistake("sample", runs[0].path, "--weights=ema-0.22")
    assert "has no weights 'ema-0.22'; did you mean ema-0.2" in error
    error = mistake("sample", runs[0].checkpoint_path(8) / "ema-0.2", "--weights=ema-0.9")
    assert "has no weights 'ema-0.9'" in error
    shutil.copytree(runs[0].checkpoint_path(8) / "ema", tmp_path / "alone")
    assert "has only one set of weights" in mistake("sample", tmp_path / "alone", "--weights=raw")


def test_judging_the_raw_weights(tmp_path, monkeypatch, capsys):
    """A judge of the verb and one during the training agree; what they keep says of which weights it is."""
    monkeypatch.chdir(tmp_path)
    every = ["evaluate={metric: digits, every: 8, num: 10}", "sample.weights=raw", "sample.steps=1", "sample.num=10"]
    run = small_run(tmp_path / "run", *every, base=[key for key in SMALL if key != "evaluate=null"])
    (file,) = run.path.glob("evaluation/step_00000008-10-heun-1-weights-raw.json")
    during = json.loads(file.read_text())["scores"]
    judged = evaluate_run(run.path, again=True)
    assert judged.scores["fd-digits"] == pytest.approx(during["fd-digits"], rel=1e-4)
    assert evaluate_run(run.path, judged.sample.model_copy(update={"weights": "ema"})).record != judged.record
    with pytest.raises(UserError, match=r"sample.weights: this recipe has no 'ema-0.2'; did you mean ema"):
        small_run(tmp_path / "other", "sample.weights=ema-0.2")
    assert not (tmp_path / "other").exists()
