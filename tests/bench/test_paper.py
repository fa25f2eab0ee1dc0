"""`bench paper`: its order, its budget, and that a case that fails or does not fit any more costs its own row."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image
from places import HELPERS

from dic_repa.bench import paper, peaks
from dic_repa.bench.budget import Budget
from dic_repa.bench.paper import PARTS, SMALL, Paper, measure_paper
from dic_repa.cli import bench_paper as verb
from dic_repa.cli import main
from dic_repa.errors import UserError

CPU = torch.device("cpu")
PLAIN = f"{HELPERS / 'oracle.py'}:PlainDiC"
TINY = dataclasses.replace(
    SMALL,
    options=({"width": 8, "depths": (1, 1, 1, 1, 1)}, {"depth": 1, "width": 16, "num_heads": 2}),
    width=8,
    size=8,
    recipes=("digits-urepa", "digits-urepa"),
    overrides=("model.width=8", "model.depths=[1,1,1,1,1]"),
    train_batches=(2,),
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(paper, "SMALL", TINY)
    monkeypatch.setattr(paper, "CompiledDenoiser", lambda model, _mode: model)  # no minutes of a compiler
    monkeypatch.setattr(paper, "measure_peak", lambda *_: {"matrix": 1.0, "convolution": 2.0})
    monkeypatch.setitem(peaks.COPIED, "cpu", 1 << 20)
    monkeypatch.setitem(peaks.WARMING, "cpu", 0.0)


class Time:
    """A clock that passes `step` seconds each time it is read."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def test_budget_measures_leaves_out_and_reports_failures():
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    budget = Budget(10, Time(2.0))
    assert budget.row({"label": "a"}, 8, lambda: {"tflops": 1.0}) == {"label": "a", "tflops": 1.0}  # at 4 s
    assert budget.row({}, 0, fails) == {"failed": "OutOfMemoryError: CUDA out of memory."}
    assert budget.row({}, 5, dict) == {"failed": "left out: 4 s left of the budget, it takes about 5"}
    assert Budget(0).row({}, 1e9, lambda: {"ran": True}) == Budget(None).row({}, 1e9, lambda: {"ran": True})


def test_what_matters_most_comes_first(monkeypatch):
    monkeypatch.setattr(paper, "free_memory", lambda _device: None)
    for part in PARTS:
        monkeypatch.setattr(Paper, part, lambda self, kind, part=part: iter([(part, kind)]))
    asked = [(name, *rows) for name, rows in measure_paper(CPU, TINY, PARTS, ("bf16", "fp32"), PLAIN)]
    assert [name for name, _ in asked] == [
        "ceilings-bf16", "check", "forward-bf16", "train-bf16", "flags", "one-bf16", "sample-bf16", "whole-bf16",
        "ceilings-fp32", "forward-fp32", "train-fp32", "one-fp32", "sample-fp32", "whole-fp32",
    ]  # fmt: skip
    assert [*PARTS] == [*verb._PARTS.one.choices]
    assert [name for name, _ in measure_paper(CPU, TINY, ("one", "check"), ("bf16",), PLAIN)] == ["check", "one-bf16"]


def test_every_case_is_a_row():
    parts = ("ceilings", "check", "forward", "flags")
    found = {name: [*rows] for name, rows in measure_paper(CPU, TINY, parts, ("bf16",), PLAIN, rounds=1)}
    assert found["ceilings-bf16"][0]["gb_per_second"] > 0.1
    assert len(found["ceilings-bf16"]) == 2 + 3 * 3
    assert all(row["tflops"] > 0 for row in found["ceilings-bf16"][1:])
    assert [row["label"] for row in found["check"]] == ["DiC-S fp32 compiled by block", "DiC-S fp32 by PlainDiC"]
    assert all(row["difference"] < 1e-5 for row in found["check"])
    forward = found["forward-bf16"]
    assert [row["label"] for row in forward] == [
        "DiC-S bf16 by PlainDiC", "DiC-S bf16 eager", "DiC-S bf16 compiled by block",
        "SiT-S/2 bf16 eager", "SiT-S/2 bf16 compiled by block",
    ]  # fmt: skip
    for row in forward:
        assert row["tflops"] == pytest.approx(2 * row["gmacs"] * row["images_per_second"] / 1000)
        assert row["matrix_share"] == pytest.approx(2 * row["convolution_share"])
        assert 1e-4 < row["difference"] < 0.1
    assert all("is a precision of NVIDIA GPUs" in row["failed"] for row in found["flags"])  # of a CPU that has none


def test_sampling_takes_fewer_steps_only_by_name(monkeypatch):
    def sampled(_names, _settings, overrides, ways):
        asked.append((overrides[-1], *ways))
        return {"rows": [{"label": "theirs", "evaluations": 7}]}

    def rows_within(seconds):
        plan = dataclasses.replace(TINY, needs=1.0, steps=(250, 50))
        return [*Paper(CPU, plan, PLAIN, 1, Budget(seconds, Time(0.0))).sample("fp32")]

    asked = []
    monkeypatch.setattr(paper, "bench_sample", sampled)
    many, few, none = (rows_within(seconds)[0] for seconds in (120, 119, 59))
    assert many["label"] == "digits-urepa fp32 doubled compiled by block, 250 steps"
    assert few["label"] == "digits-urepa fp32 doubled compiled by block, 50 steps, not 250"
    assert none["failed"] == "left out: 59 s left of the budget, it takes about 60"
    assert asked == [(f"sample.steps={n}", way) for n in (250, 50) for way in ("doubled", "one-by-one")]
    step = Paper(CPU, TINY, PLAIN, 1, Budget())._step("digits-urepa", "fp32", 2, "off")
    assert (step["label"], step["batch"]) == ("digits-urepa fp32 eager", 2)
    assert sum(step["phases"].values()) == pytest.approx(1)


def test_rows_are_saved_at_once(tmp_path, monkeypatch, capsys, mistake):
    monkeypatch.chdir(tmp_path)

    def forward(_self, kind):
        yield {"label": f"a {kind}", "batch": 1, "images_per_second": 2.0, "spread": [1.0, 3.0], "tflops": 1.0}
        yield {"label": "b", "batch": 1, "failed": "left out: 3 s left of the budget, it takes about 15"}
        assert len(json.loads((tmp_path / "some/forward-fp32.json").read_text())["rows"]) == 2
        raise UserError("the machine is gone")  # what is measured is kept

    monkeypatch.setattr(Paper, "forward", forward)
    words = ["bench", "paper", "--small", "--device=cpu", "--precision=fp32", "--out=some"]
    assert "the machine is gone" in mistake(*words, "--only=forward")
    monkeypatch.setattr(Paper, "one", lambda self, kind: two_of(forward(self, kind)))
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--only=one", "--budget=1"])
    printed = capsys.readouterr().out
    assert "a fp32, batch 1: 2 images/s, 1 TFLOP/s" in printed
    assert "b, batch 1: left out: 3 s left of the budget, it takes about 15" in printed
    assert Image.open(tmp_path / "some/one-fp32.png").width > 500
    assert "is not one of 'ceilings', 'check', 'forward', 'train'" in mistake("bench", "paper", "--only=trian")
    assert "'fp16' is not one of 'bf16', 'tf32', 'fp32'" in mistake("bench", "paper", "--small", "--precision=fp16")


def two_of(rows):
    return iter([next(rows), next(rows)])
