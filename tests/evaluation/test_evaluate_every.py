"""`evaluate.every`: the records it leaves, the best checkpoint it keeps, and that training goes on as without it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import TINY
from pictures import write_tree
from safetensors.torch import load_file

from dic_repa.cli import main
from dic_repa.conditions import ClassLabels
from dic_repa.errors import UserError
from dic_repa.evaluation import Metric, judge_digits, metrics
from dic_repa.evaluation.report import read_run
from dic_repa.evaluation.solvers import compare_solvers, save_comparison
from dic_repa.recipe import load_recipe
from dic_repa.runs.folder import RunFolder
from dic_repa.sampling.labels import balanced_labels
from dic_repa.sampling.load import load
from dic_repa.training import train

EVERY = ["evaluate.every=2", "evaluate.num=12"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)


def run(name: str, *overrides: str, steps: int = 8, resume: bool = False) -> RunFolder:
    given = [option.removeprefix("--set=") for option in TINY]
    given += [f"train.steps={steps}", "train.checkpoint_every=4", "train.keep_checkpoints=1", *overrides]
    return train(load_recipe("digits-urepa", given), name, resume=resume)


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: load_file(folder / name) for name in ("model.safetensors", "ema/model.safetensors")}


def records(run: RunFolder) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((run.path / "evaluation").glob("*.json"))]


@pytest.fixture
def judged(monkeypatch):
    """A metric with scores known beforehand, one for each evaluation; None where it can tell nothing."""
    values: list[float | None] = []

    class Known(Metric):
        needs = ""

        def __call__(self, features, reference):
            if values[0] is None:
                raise UserError(f"no score for {values.pop(0)}")
            return values.pop(0)

    monkeypatch.setitem(metrics._entries, "known", lambda: Known("digits.features", "known"))
    return values


def test_training_goes_on_as_without_it():
    plain, evaluated = run("plain"), run("evaluated", *EVERY)
    for name, tensors in weights(plain.checkpoint_path(8)).items():
        for key, tensor in weights(evaluated.checkpoint_path(8))[name].items():
            assert torch.equal(tensor, tensors[key]), key
    assert not (plain.path / "evaluation").exists()
    assert plain.best() is None


def test_the_scores_are_those_of_the_averaged_weights():
    done = run("run", *EVERY)
    found = records(done)
    assert [record["step"] for record in found] == [2, 4, 6, 8]
    loaded = load(done.checkpoint_path(8))
    labels = balanced_labels(loaded.recipe, ClassLabels(10), 12)
    images = torch.cat(list(loaded.sampler(loaded.recipe.sample)(labels)))
    expected = judge_digits((images * 255).round() / 255, labels)
    assert found[-1]["scores"]["fd-digits"] == pytest.approx(expected["fd-digits"], rel=1e-9)
    assert [e["step"] for e in read_run(done)["evaluations"]] == [2, 4, 6, 8]
    best = min(found, key=lambda record: record["scores"]["fd-digits"])
    assert done.best() == {"step": best["step"], "score": "fd-digits", "value": best["scores"]["fd-digits"]}


def test_the_best_checkpoint_is_kept(judged):
    judged += [3.0, 1.0, math.nan, 2.0, 1.0]
    done = run("run", *EVERY, "evaluate.metric=known", steps=10)
    assert done.best() == {"step": 4, "score": "known", "value": 1.0}  # the first of two alike
    assert sorted(folder.name for folder in done.list_checkpoints()) == ["step_00000004", "step_00000010"]
    assert (done.checkpoints / "best").resolve() == done.checkpoint_path(4).resolve()
    same = load(done.checkpoints / "best").denoiser.state_dict()
    other = load(done.checkpoint_path(4)).denoiser.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in same.items())


def test_a_best_step_between_checkpoints_is_saved(judged):
    judged += [1.0, 2.0, 3.0, 4.0]
    done = run("run", *EVERY, "evaluate.metric=known")
    assert done.best()["step"] == 2
    assert done.checkpoint_path(2).is_dir()


def test_samples_that_cannot_be_scored_do_not_end_a_run(judged, capfd):
    judged += [None, 2.0]
    done = run("run", *EVERY, "evaluate.metric=known", steps=4)
    assert "the samples of step 2 cannot be scored (no score" in capfd.readouterr().err
    assert done.best()["step"] == 4


@pytest.mark.slow
def test_a_resumed_run_finds_the_same_best(judged):
    judged += [5.0, 3.0, 4.0, 2.0]
    whole = run("whole", *EVERY, "evaluate.metric=known")
    judged += [5.0, 3.0]
    run("parts", *EVERY, "evaluate.metric=known", steps=4)
    judged += [4.0, 2.0]
    parts = run("parts", *EVERY, "evaluate.metric=known", resume=True)
    assert parts.best() == whole.best() == {"step": 8, "score": "known", "value": 2.0}
    assert records(parts) == records(whole)
    for name, tensors in weights(whole.checkpoint_path(8)).items():
        assert all(torch.equal(t, tensors[key]) for key, t in weights(parts.checkpoint_path(8))[name].items())
    judged += [6.0]
    longer = run("parts", *EVERY, "evaluate.metric=known", steps=10, resume=True)
    assert longer.best()["step"] == 8  # the record of an earlier session counts
    assert longer.checkpoint_path(8).is_dir()


@pytest.mark.slow
def test_two_processes_of_torchrun_that_nobody_told_of_the_cpu_score_as_one(dic_repa, tmp_path):
    options = [*TINY, "--set=train.steps=2", "--set=evaluate.every=2", "--set=evaluate.num=13"]
    untold = {"ACCELERATE_USE_CPU": "false"}
    done = dic_repa("train", "digits-baseline", "--out", "two", *options, processes=2, env=untold)
    assert done.stdout.count("trained 2 steps") == 1
    (session,) = json.loads((tmp_path / "two/environment.json").read_text())
    assert session["machine"]["processes"] == 2
    with pytest.raises(SystemExit):
        main(["train", "digits-baseline", "--out", "one", *options])
    one, two = (records(RunFolder(tmp_path / name))[0]["scores"] for name in ("one", "two"))
    assert two["count"] == 13
    assert two["fd-digits"] == pytest.approx(one["fd-digits"], rel=1e-3)
    assert two["recognised"] == one["recognised"]


def test_mistakes_are_told_before_the_run(mistake, tmp_path):
    tiny = [*TINY, "--out", "run", "--set=train.steps=2", "--set=evaluate.every=1"]
    assert "did you mean fd-digits" in mistake("train", "digits-urepa", *tiny, "--set=evaluate.best=fd-digit")
    assert "reference" in mistake("train", "digits-urepa", *tiny, "--set=evaluate.also=[prec-digits]")
    assert "did you mean fid" in mistake("train", "digits-urepa", *tiny, "--set=evaluate.also=[fidd]")
    write_tree(tmp_path / "tree", {"cat": 2})
    other_size = "--set=evaluate={metric: fd-digits, reference: tree, every: 1}"
    assert "the samples are 16x16, the reference 50x40" in mistake("train", "digits-urepa", *tiny, other_size)
    assert not (tmp_path / "run").exists()


def test_solvers_are_compared_by_any_metric(tmp_path):
    """By one that is measured against a reference too, which gives no share of recognised digits."""
    done = run("run", "evaluate.metric=fd-digits", "evaluate.reference=digits", steps=2)
    points = list(compare_solvers(done.path, ["euler", "heun"], [3], 6))
    assert [(point.solver, point.evaluations, list(point.scores)) for point in points] == [
        ("euler", 3, ["fd-digits"]),
        ("heun", 1, ["fd-digits"]),
    ]
    save_comparison(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
