"""`evaluate --epochs-to`: when runs reached a score, from records whose scores are known."""

from __future__ import annotations

import functools
import json

import pytest
from small_runs import small_run
from verbs import invoke

from dic_repa.cli.evaluate import command
from dic_repa.data.digits import load_digits
from dic_repa.errors import UserError
from dic_repa.evaluation.epochs import epochs_to
from dic_repa.runs.folder import RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        options = [
            "train.steps=2",
            "train.checkpoint_every=1",
            "sample.num=20",
            "sample.steps=1",
            "train.batch_size=100",
        ]
        return small_run(tmp_path_factory.mktemp("runs") / "trained", *options, "evaluate={metric: digits}")


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """Makes runs with these scores by step, as evaluations in training record them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def make(name: str, scores: dict[int, float], score: str = "fd-digits", **sample) -> str:
        folder = tmp_path / name / "evaluation"
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "recipe.yaml").write_text(trained.recipe_file.read_text())
        settings = trained.recipe().sample.model_copy(update=sample).model_dump(mode="json")
        for step, value in scores.items():
            record = {"step": step, "sample": settings, "evaluations": 1, "scores": {score: value}}
            (folder / f"step_{step:08d}-{score}-{len(sample)}.json").write_text(json.dumps(record))
        return name

    return make


show = functools.partial(invoke, command)


def test_the_first_step_that_reaches_it(runs):
    """Not the last above it: scores are noisy. An epoch is the training digits, 100 to a step."""
    runs("slow", {100: 9.0, 200: 5.0, 300: 5.2, 400: 4.0})
    (found,) = epochs_to(5.0, ["slow"])
    assert (found.step, found.before, found.known, found.best) == (200, 100, "", 4.0)
    assert found.epoch == len(load_digits("train")[0])
    assert found.images == 200 * 100
    assert epochs_to(4.99, ["slow"])[0].step == 400


def test_higher_can_be_better(runs):
    runs("shares", {10: 0.2, 20: 0.5, 30: 0.9}, "recognised")
    (found,) = epochs_to(0.5, ["shares"], "recognised")
    assert (found.step, found.before, found.best) == (20, 10, 0.9)
    assert epochs_to(0.95, ["shares"], "recognised")[0].known == "more than "
    assert epochs_to(0.1, ["shares"], "recognised")[0].known == "at most "


def test_runs_in_one_table(runs):
    slow, fast = runs("slow", {100: 9.0, 200: 8.0, 400: 4.0}), runs("fast", {50: 9.0, 100: 4.5})
    never, early = runs("never", {100: 9.0, 800: 7.0}), runs("early", {50: 3.0})
    heading, *rows = show(slow, fast, never, early, "--epochs-to", "5").splitlines()
    assert heading.split("  ")[-1].strip() == "times fewer"
    assert "best FD-digits" in heading
    images = len(load_digits("train")[0])
    cells = [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in rows]
    assert [row[0] for row in cells] == ["slow", "fast", "never", "early"]
    assert float(cells[1][3]) == pytest.approx(100 * 100 / images, rel=1e-2)
    assert cells[0][4:] == ["400", "200"]  # steps, and where it was not yet reached
    assert cells[1][4:] == ["100", "50", "4"]
    assert cells[2][4:] == ["more than 800", "less than 0.5"]
    assert cells[3][4:] == ["at most 50", "at least 8"]
    assert show(never, slow, "--epochs-to", "5").splitlines()[2].endswith("more than 2")


def test_samples_drawn_in_other_ways_are_other_series(runs):
    runs("run", {100: 9.0, 200: 4.0})
    runs("run", {100: 3.0, 200: 2.0}, num=50)
    found = {one.sampling: one.step for one in epochs_to(5.0, ["run"])}
    assert sorted(found.values()) == [100, 200]
    rows = [row.split() for row in show("run", "--epochs-to", "5").splitlines()[1:]]
    assert [row[-1] for row in rows] == ["100", "100"]  # one at most at 100, one not yet at 100: neither has a ratio


def test_data_that_is_not_here_leaves_the_steps(runs, monkeypatch):
    runs("run", {100: 9.0, 200: 4.0})

    def gone(section):
        raise UserError("there is no folder data/latents")

    monkeypatch.setattr("dic_repa.evaluation.epochs.build_dataset", gone)
    shown = show("run", "--epochs-to", "5")
    assert "200" in shown
    assert "see the steps" in shown


def test_scores_that_are_missing_are_asked_for(runs, trained, monkeypatch):
    runs("run", {100: 9.0})
    assert "did you mean fd-digits" in show("run", "--epochs-to", "5", "--metrics", "fd-digit", fails=True)
    message = show("run", "--epochs-to", "5", "--metrics", "coverage-digits", fails=True)
    assert "dic-repa evaluate run/checkpoints/step_* --metrics coverage-digits --reference ..." in message
    assert "leave --reference out" in show("run", "--epochs-to", "5", "--reference", "digits", fails=True)
    assert "asks for one score" in show("run", "--epochs-to", "5", "--metrics", "fid,kid", fails=True)
    assert "is not a run" in show("nowhere", "--epochs-to", "5", fails=True)
    # What the message says gives the scores: of each checkpoint that was kept, in the run's own folder.
    monkeypatch.chdir(trained.path.parent)
    kept = sorted(f"trained/checkpoints/{folder.name}" for folder in RunFolder("trained").list_checkpoints())
    assert len(kept) == 2
    show(*kept, "--metrics", "coverage-digits", "--reference", "digits")
    (found,) = epochs_to(2.0, ["trained"], "coverage-digits")
    assert (found.step, found.before, found.known) == (2, 1, "more than ")
