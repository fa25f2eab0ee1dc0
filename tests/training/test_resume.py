"""`dic-repa train --resume`: by which recipe a run goes on, what is said of differences, and when it is finished."""

from __future__ import annotations

import shutil

import pytest
from methods import METHODS, method_run
from small_runs import SMALL, metrics, small_recipe, small_run

from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.runs import RunFolder

GIVEN = [f"--set={key}" for key in SMALL]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return small_run(tmp_path_factory.mktemp("runs") / "four", "train.steps=4", "train.seed=5")


@pytest.fixture
def run(four, tmp_path, monkeypatch):
    """A run of four steps, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shutil.copytree(four.path, tmp_path / "runs/four")
    return RunFolder("runs/four")


@pytest.fixture
def train(run, capsys):
    """`dic-repa train ARGUMENTS` in this process: standard output and error."""

    def call(*arguments: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as exit:
            main(["train", *arguments])
        said = capsys.readouterr()
        assert exit.value.code == 0, said.err
        return said

    return call


@pytest.mark.parametrize("named", [["runs/four"], ["--out", "runs/four"], ["runs/four", "--out", "runs/four"]])
def test_a_run_goes_on_by_its_own_recipe(run, train, named):
    _, err = train("--resume", *named, "--set=train.steps=6")
    assert metrics(run)[-1]["step"] == 6
    assert run.recipe() == small_recipe("train.steps=6", "train.seed=5")
    assert [line for line in err.splitlines() if "->" in line] == [
        "note: changed since the run began: train.steps: 4 -> 6"
    ]


def test_a_finished_run_says_so_and_loads_no_data(run, train, monkeypatch):
    monkeypatch.setattr("dic_repa.training.loop.build_parts", lambda *_: pytest.fail("was built"))
    for named in (
        ["runs/four"],
        ["digits-urepa", "--out", "runs/four", *GIVEN, "--set=train.steps=4", "--set=train.seed=5"],
    ):
        before = run.environment_file.read_text()
        out, err = train("--resume", *named)
        assert out.splitlines()[0] == "runs/four is finished: 4 of 4 steps"
        assert "to sample from it: dic-repa sample runs/four" in out
        assert run.environment_file.read_text() == before
        assert err == ""


def test_a_run_that_was_cut_off_before_its_judgement_is_judged(run, train):
    judged = small_recipe("train.steps=4", "train.seed=5", "sample.steps=1", "sample.num=20", base=SMALL[:-1])
    run.save_recipe(judged)
    out, _ = train("--resume", "runs/four")
    assert "is finished" in out
    assert "recognised" in out
    assert len(list(run.path.glob("evaluation/step_00000004-*.json"))) == 1


def test_differences_are_named_with_both_values_before_anything_runs(run, train, mistake, monkeypatch):
    order = []
    monkeypatch.setattr("dic_repa.training.loop.say", order.append)
    monkeypatch.setattr("dic_repa.training.loop.build_parts", lambda *_: order.append("built") or 1 / 0)
    more = ["--set=train.steps=1000", "--set=train.seed=5", "--set=sample.num=7"]
    with pytest.raises(ZeroDivisionError):
        main(["train", "digits-urepa", "--resume", "--out=runs/four", *GIVEN, *more])
    assert order == [
        "note: changed since the run began: train.steps: 4 -> 1000",
        "note: changed since the run began: sample.num: 500 -> 7",
        "built",
    ]
    changing = ["--set=train.seed=6", "--set=model.width=16", "--set=train.steps=9"]
    error = mistake("train", "--resume", "runs/four", *changing)
    assert "these keys differ: model.width: 8 -> 16, train.seed: 5 -> 6; set them back, or pass --allow" in error
    order.clear()
    with pytest.raises(ZeroDivisionError):
        main(["train", "--resume", "runs/four", "--allow-change", *changing])
    assert "note: changed since the run began: train.seed: 5 -> 6" in order


def test_what_leaves_the_weights_as_they_are_may_differ(run):
    assert run.check_resume(small_recipe("train.steps=4", "train.seed=5", "description=other")) == []
    harmless = small_recipe("train.steps=4", "train.seed=5", "data.workers=2", "sample.guidance.scale=2")
    assert len(run.check_resume(harmless)) > 2
    alignment = small_recipe("train.steps=4", "train.seed=5", base=[key for key in SMALL if "alignments" not in key])
    with pytest.raises(UserError, match=r"alignments.0.encoder: - -> \"digits-vit\""):
        run.check_resume(alignment)


def test_what_names_no_run(run, mistake):
    assert "--resume without a recipe takes the run" in mistake("train", "--resume")
    assert "names two runs, runs/four and runs/five" in mistake("train", "--resume", "runs/four", "--out=runs/five")
    assert "runs/nowhere is not a run: it does not exist" in mistake("train", "--resume", "runs/nowhere")
    assert "Missing argument 'RECIPE'" in mistake("train")
    assert "has done 4 steps already, more than train.steps 3" in mistake(
        "train", "--resume", "runs/four", "--set=train.steps=3"
    )


@pytest.mark.parametrize("name", METHODS)
def test_methods_resume_to_the_bit(tmp_path, name):
    whole = method_run(tmp_path / "whole", name)
    part = RunFolder(shutil.copytree(whole.path, tmp_path / "part"))
    shutil.rmtree(part.checkpoint_path(4))
    method_run(part.path, name, resume=True)
    trained = {file.relative_to(whole.checkpoint_path(4)) for file in whole.checkpoint_path(4).rglob("*.safetensors")}
    assert len(trained) == (3 if name == "end-to-end" else 2)
    for file in trained:
        ends = [(run.checkpoint_path(4) / file).read_bytes() for run in (whole, part)]
        assert ends[0] == ends[1], file
