"""Damaged records of runs and samples: each is one line, no good line is lost, and none is lost in silence."""

from __future__ import annotations

import json

import pytest

from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.evaluation.image_sets import open_images
from dic_repa.evaluation.report import read_run
from dic_repa.files.reading import read_json, read_lines
from dic_repa.recipe import Recipe, to_yaml
from dic_repa.runs import RunFolder
from dic_repa.runs.listing import list_runs
from dic_repa.sampling.folder import SampleFolder
from dic_repa.training.log import save_curves

GOOD = [{"step": step, "denoising": 1.0 / step, "loss": 1.0} for step in (2, 4, 6)]
BAD_LINES = [b"5", b"[]", b"\xff\xfe", b"{", b'{"step": "x"}', b'{"step": true}', b'{"step": -1}', b'{"step": 1e400}',
             b"[" * 10**5, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": ' + b"9" * 100 + b"}", b"\x00"]  # fmt: skip
BAD_FILES = [b"", b"[]", b"5", b"null", b'"a"', b"{", b"\xff", b"[" * 10**5, b"{}", b'{"sample": 5}', b'{"labels": 1}']


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create(Recipe())
    return run


def write(run: RunFolder, *between: bytes) -> None:
    lines = [json.dumps(record).encode() for record in GOOD]
    run.metrics_file.write_bytes(b"\n".join([lines[0], *between, *lines[1:]]) + b"\n")


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_of_metrics(line, run, capsys):
    write(run, line)
    records, damaged = read_lines(run.metrics_file)
    assert [record for _, record in records] == GOOD
    assert damaged == 1
    save_curves(run)
    assert run.curves_file.is_file()
    shown = read_run(run)
    assert shown["metrics"]["steps"][-1] == 6
    assert json.dumps(shown, allow_nan=False)
    assert list_runs(run.path.parent)[0].step == 6
    run._cut_metrics(4)
    assert [json.loads(text) for text in run.metrics_file.read_text().splitlines()] == GOOD[:2]
    assert "has 1 damaged lines, which are left out" in capsys.readouterr().err


def test_values_that_cannot_be_drawn(run):
    strange = {"step": 3, "loss": "x", "denoising": None, "alignment.0.token": [1], "alignment.x": 1, "a": 10**400}
    write(run, json.dumps(strange).encode())
    save_curves(run)
    assert json.dumps(read_run(run), allow_nan=False)


def test_a_line_that_a_kill_has_cut_short_is_no_damage(run, capsys):
    write(run)
    with run.metrics_file.open("ab") as file:
        file.write(b'{"step": 8, "den')
    run._cut_metrics(6)
    assert len(run.metrics_file.read_text().splitlines()) == 3
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize("content", BAD_FILES)
def test_samples_json(content, tmp_path):
    spec = {"sample": {"num": 4, "batch_size": 4, "solver": "heun"}}
    folder = SampleFolder(tmp_path / "samples", spec)
    folder.begin()
    folder.check()
    (tmp_path / "samples/samples.json").write_bytes(content)
    if content != b'{"labels": 1}' and content not in (b"{}", b'{"sample": 5}'):  # these are other samples
        with pytest.raises(UserError, match=r"samples.json is damaged"):
            folder.check()
    with pytest.raises(UserError, match=r"samples.json is damaged"):
        open_images(tmp_path / "samples")


@pytest.mark.parametrize("labels", [5, ["a"], [-1], [1.5], [{}], [[1]], [10**20], "0123"])
def test_labels_in_samples_json(labels, tmp_path):
    SampleFolder(tmp_path / "samples", {"sample": {"num": 1, "batch_size": 4, "solver": "heun"}}).begin()
    (tmp_path / "samples/samples.json").write_text(json.dumps({"sample": {"num": 1}, "labels": labels}))
    with pytest.raises(UserError, match=r"samples.json is damaged"):
        open_images(tmp_path / "samples")


@pytest.mark.parametrize("content", ["train: 5", "train: []", "5", "", "a: &a [*a]", "train: {steps: 1", "\x00"])
def test_the_recipe_of_a_run(content, run):
    run.recipe_file.write_text(content)
    with pytest.raises(UserError):
        run.recipe()
    assert read_run(run)["problems"]
    assert list_runs(run.path.parent)[0].state == "damaged"


@pytest.mark.parametrize("content", [*BAD_FILES, b'{"scores": 1e999, "taps": [1], "times": [1], "step": "x"}'])
def test_records_in_a_report(content, run, tmp_path, capsys):
    write(run)
    for name in ("environment.json", "probe/probe.json", "tune/tune.json", "evaluation/step_00000004-heun.json"):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_bytes(content)
    (run.path / "probe/other.json").write_text(
        '{"scores": {"cka": [[1e999]]}, "taps": ["a"], "times": [0.5], "step": 3}'
    )
    with pytest.raises(SystemExit, match="0"):
        main(["report", str(run.path), "--out", str(tmp_path / "out.html")])
    assert "report: " in capsys.readouterr().out
    assert len(list_runs(run.path.parent)) == 1


def test_read_json_says_what_is_wrong(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match=r"a.json is damaged \(it holds a list, not a mapping\); remove it"):
        read_json(tmp_path / "a.json", "remove it", dict)
    (tmp_path / "a.json").write_text("[" * 200 + "]" * 200)
    with pytest.raises(UserError, match="nested over the limit of 50 levels"):
        read_json(tmp_path / "a.json", "remove it")


def test_recipes_survive(run):
    run.save_recipe(Recipe())
    assert run.recipe_file.read_text() == to_yaml(Recipe())
