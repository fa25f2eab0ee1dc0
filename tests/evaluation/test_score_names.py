"""A score has one name and one unit, whoever gives it, in options, records, tables and pictures."""

from __future__ import annotations

import json

import pytest
from small_runs import small_run

from dic_repa.cli import main
from dic_repa.data.digits import load_digits, resize
from dic_repa.evaluation import judge_digits, measure
from dic_repa.evaluation.judge import Judge, judge_of_score
from dic_repa.evaluation.metrics import find_metric, metrics, title
from dic_repa.evaluation.report import read_run, write_report
from dic_repa.evaluation.runs import evaluate_run
from dic_repa.recipe import load_recipe

QUICK = ["sample.num=20", "sample.steps=1", "train.steps=2", "train.checkpoint_every=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return small_run(tmp_path_factory.mktemp("runs") / "run", *QUICK, "evaluate={metric: digits}")


@pytest.fixture
def called(capsys):
    """Call `dic-repa` in this process: what it prints."""

    def call(*arguments) -> str:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert exit.value.code == 0, shown.err
        return shown.out

    return call


def digits(count: int):
    images, labels = load_digits("train")
    return (resize(images[:count], 16) * 255).round() / 255, labels[:count]


def test_the_judge_gives_what_the_metric_of_that_name_measures():
    images, labels = digits(200)
    judged = judge_digits(images, labels)
    measured = measure([images], "digits", ["fd-digits"])
    assert judged["fd-digits"] == pytest.approx(measured["fd-digits"], rel=1e-4)


def test_a_metric_that_the_judge_gives_needs_no_reference():
    images, labels = digits(100)
    assert Judge(["digits", "fd-digits"])(images, labels) == judge_digits(images, labels)
    assert judge_of_score(load_recipe("digits-urepa"), "fd-digits", None, "cpu").measure is None
    assert judge_of_score(load_recipe("digits-urepa"), "fd-digits", "digits", "cpu").measure is not None


def test_shown_by_its_title_and_kept_by_its_name(run, called):
    heading, row, real, _ = (line.split() for line in called("evaluate", run.path).splitlines()[-4:])
    assert heading[-2:] == ["recognised", "FD-digits"]
    measured = called("evaluate", run.path, "--reference", "digits", "--metrics", "fd-digits").splitlines()
    assert measured[0].split()[-1] == "FD-digits"
    assert float(row[-1]) == pytest.approx(float(measured[1].split()[-1]), rel=1e-3)  # of the same samples
    (record,) = (run.path / "evaluation").glob("*heun-1.json")
    scores = json.loads(record.read_text())["scores"]
    shares = [scores["recognised"], scores["reference"]["recognised"]]
    assert [float(row[-2]), float(real[-2])] == pytest.approx(shares, abs=5e-4)  # not percentages
    page = write_report([run.path], run.path / "report.html").read_text()
    assert '"fd-digits": {"title": "FD-digits", "better": "lower"' in page
    assert "Fréchet" not in page


def test_no_two_scores_have_one_title():
    names = [name for name in metrics.names() if find_metric(name)]
    assert len({title(name) for name in names}) == len(names)
    assert {"fdr6", "mind", "coverage-digits", "density-lite2", "fd-clip", "mind-siglip"} <= set(names)


def test_records_of_earlier_versions_are_read(run):
    first = evaluate_run(run.path)
    record = json.loads(first.record.read_text())
    for scores in (record["scores"], record["scores"]["reference"]):
        scores["frechet"] = scores.pop("fd-digits")
    first.record.write_text(json.dumps(record))
    assert evaluate_run(run.path).scores == first.scores
    found = next(e for e in read_run(run)["evaluations"] if e["reference"])
    assert found["scores"]["fd-digits"] == first.scores["fd-digits"]
    assert found["reference"]["fd-digits"] == first.scores["reference"]["fd-digits"]


def test_solvers_are_compared_by_whatever_the_recipe_is_judged_by(tmp_path, called, mistake, capsys):
    section = "evaluate={metric: fd-digits, also: [prec-digits], reference: digits}"
    small_run(tmp_path / "measured", *QUICK, section)
    options = ["--solvers", "euler", "--evaluations", "1,2", "--num", "20"]
    rows = called("solvers", "compare", "measured", *options).splitlines()
    assert all("FD-digits" in row and "precision (digits)" in row for row in rows[:2])
    small_run(tmp_path / "unjudged", *QUICK)
    capsys.readouterr()
    message = mistake("solvers", "compare", "unjudged", *options)
    assert "no `evaluate` section" in message
    assert "--reference" not in message
