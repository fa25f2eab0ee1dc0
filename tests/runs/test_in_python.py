"""A run in Python: begun by a recipe's name, its curves as a table, loaded, and as a notebook shows it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import pandas
import pytest
import torch
from small_runs import SMALL

import dic_repa
from dic_repa.errors import UserError
from dic_repa.files.pictures import save_png
from dic_repa.recipe import Recipe
from dic_repa.runs import RunFolder


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    small = "".join(f"{key.replace('=', ': ', 1)}\n" for key in SMALL if "sample_every" not in key)
    (tmp_path / "mine.yaml").write_text(f"base: digits-urepa\n{small}train.sample_every: 8\nsample.steps: 2\n")
    return dic_repa.train("mine.yaml")


def test_a_run_from_a_recipes_name(run, tmp_path):
    assert str(run.path) == "runs/mine"
    table = pandas.DataFrame(run.metrics)
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert table["step"].tolist() == list(range(1, 9))
    assert table["denoising"].tolist() == [line["denoising"] for line in lines]
    assert dic_repa.load(run).sample([3], steps=2)[0].size == (16, 16)
    with pytest.raises(UserError, match="runs/mine exists"):
        dic_repa.train(dic_repa.load_recipe("mine.yaml"))

    shown = run._repr_html_()
    assert "runs/mine</b>, step 8" in shown
    assert shown.count("data:image/png;base64,") == 2  # curves and samples
    (run.samples / "step_00000009.png").write_bytes(b"<svg onload=...>")
    assert run._repr_html_().count("data:image/png;base64,") == 1


def test_what_a_line_lacks_is_nan(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null, "extra": 1}\n{"st')
    columns = RunFolder(tmp_path).metrics
    assert columns["step"] == [1, 2]
    assert columns["loss"][0] == 0.5
    assert math.isnan(columns["loss"][1])
    assert math.isnan(columns["extra"][0])
    assert RunFolder(tmp_path / "none").metrics == {}
    assert "no step yet" in RunFolder(tmp_path / "none")._repr_html_()


def test_a_recipe_made_in_python_has_no_name():
    with pytest.raises(UserError, match="name the run's folder"):
        dic_repa.train(Recipe())


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_what_a_stranger_wrote_is_only_text(tmp_path):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    recipe = Recipe(description=evil, data={"path": evil})
    shown = recipe._repr_html_()
    assert "data.path" in shown
    assert "model.name" in shown
    assert "train.steps" not in shown  # a default
    run = RunFolder(tmp_path / evil.replace("/", "|"))
    run.samples.mkdir(parents=True)
    run.metrics_file.write_text(json.dumps({"step": 3, evil: 1.5}) + "\n")
    save_png(torch.zeros(1, 4, 4), run.samples / "step_1.png")
    (run.samples / "step_1.png").rename(run.samples / f"step_{evil.replace('/', '|')}.png")
    for text in (shown, run._repr_html_()):
        tags = Tags(text).found
        assert not {"script", "x"} & {name for tag, given in tags for name in (tag, given.get("src"))}
        assert not [given for _, given in tags if "onerror" in given]
