"""`dic-repa report`: the page holds all that the runs have, fetches nothing, and works in a browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from report_runs import NASTY, report_run

from dic_repa.cli.report import command
from dic_repa.evaluation import report
from dic_repa.evaluation.report import MOST_GRIDS, MOST_POINTS, distinct_names, write_report
from dic_repa.evaluation.runs import describe_sampling
from dic_repa.recipe import load_recipe
from dic_repa.runs.folder import RunFolder


@pytest.fixture
def make_run(tmp_path):
    return lambda name, *overrides, **options: report_run(tmp_path / name, *overrides, **options)


class Page(HTMLParser):
    """The elements with their attributes, and the text in the element with the id `data`."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.data, self._inside = [], "", False
        self.feed(path.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = dict(attributes).get("id") == "data"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.data += data


def read(path: Path) -> tuple[Page, list[dict]]:
    page = Page(path)
    strict = json.loads(page.data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return page, strict["runs"]


def test_the_page_holds_what_the_runs_have(make_run, tmp_path):
    runs = [make_run("a"), make_run("b", "train.seed=7", done=25)]
    page, (first, second) = read(write_report([run.path for run in runs], tmp_path / "out/page.html"))
    assert [tag for tag, _ in page.elements if tag in ("script", "style", "meta")] == [
        *["meta"] * 4,
        "style",
        *["script"] * 2,
    ]
    assert first["metrics"]["steps"] == list(range(1, 41))
    assert first["metrics"]["series"]["denoising"][9] == 0.1
    assert [sample["step"] for sample in first["samples"]] == [10, 20]
    kind, _, content = first["samples"][1]["src"].partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).getpixel((0, 0)) == (20, 0, 0)
    (judged,) = first["evaluations"]
    assert (judged["scores"], judged["reference"]) == ({"recognised": 0.9, "fd-digits": 1.5}, {"fd-digits": 1.25})
    assert first["probe"]["scores"]["cka"] == [[0.1, 0.2], [0.3, None]]
    assert first["environment"][0]["packages.torch"] == "2.5"
    assert (first["recipe"]["train.seed"], second["recipe"]["train.seed"]) == ("0", "7")
    assert first["recipe"]["alignments.0.encoder"] == "digits-vit"
    assert (first["finished"], second["finished"], second["step"]) == (True, False, 25)
    assert first["problems"] == []


def test_nothing_is_fetched(make_run, tmp_path):
    page = write_report([make_run("a", f"description={json.dumps(NASTY)}").path], tmp_path / "page.html")
    parsed, (run,) = read(page)
    assert run["description"] == NASTY
    text = page.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    outside_data = text.replace(parsed.data, "")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", outside_data)
    for tag, attributes in parsed.elements:
        assert not {"src", "srcset", "poster", "action"} & set(attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith(("#", "data:"))
    (policy,) = [a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


def test_what_is_missing_or_damaged_is_left_out(make_run, tmp_path):
    run = make_run("going-on", done=7)
    with run.metrics_file.open("a") as file:
        file.write('{"step": 8, "denoising": NaN}\n{"st\n{"step": 9, "deno')
    (run.samples / "step_00000010.png").write_bytes(b"\x89PNG cut short")
    (run.path / "evaluation/a.json").write_text('{"step":')
    (run.path / "probe/probe.json").write_text("[]")
    run.environment_file.unlink()
    bare = RunFolder(tmp_path / "bare")
    bare.create(load_recipe("digits-baseline"))
    other = make_run("other-version")
    other.recipe_file.write_text("description: from another version\nwings: {feathers: 3}\n")
    _, runs = read(write_report([run.path, bare.path, other.path], tmp_path / "page.html"))
    broken, empty, foreign = runs
    assert broken["metrics"]["steps"] == [*range(1, 8), 8]
    assert broken["metrics"]["series"]["denoising"][-1] is None
    assert [s["step"] for s in broken["samples"]] == [20]
    assert (broken["evaluations"], broken["probe"], broken["environment"]) == ([], None, [])
    assert len(broken["problems"]) == len(set(broken["problems"]))
    named = " ".join(broken["problems"])
    assert all(word in named for word in ("metrics.jsonl", "step_00000010.png", "a.json", "probe", "environment.json"))
    assert (empty["step"], empty["samples"], empty["metrics"]["series"]) == (0, [], {})
    assert foreign["recipe"]["wings.feathers"] == "3"
    assert "wings" in foreign["problems"][0]


def test_long_runs_are_thinned(make_run, tmp_path):
    run = make_run("long", steps=4000, done=4000)
    for step in range(30, 30 + 2 * MOST_GRIDS):
        Image.new("L", (4, 4), 0).save(run.samples / f"step_{step:08d}.png")
    _, (shown,) = read(write_report([run.path], tmp_path / "page.html"))
    steps, losses = shown["metrics"]["steps"], shown["metrics"]["series"]["denoising"]
    assert len(steps) == len(losses) <= MOST_POINTS
    assert steps[-1] == 4000
    assert losses[0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, rel=1e-5)
    kept = [s["step"] for s in shown["samples"]]
    assert (len(kept), kept[0], kept[-1]) == (MOST_GRIDS, 10, 29 + 2 * MOST_GRIDS)


def test_a_large_picture_is_made_smaller(make_run, tmp_path):
    run = make_run("a")
    Image.effect_noise((2400, 600), 90).save(run.samples / "step_00000030.png")
    _, (shown,) = read(write_report([run.path], tmp_path / "page.html"))
    assert (shown["samples"][-1]["width"], shown["samples"][-1]["height"]) == (1100, 275)


def test_names_that_tell_runs_apart():
    paths = ["x/a/run", "x/b/run", "x/b/other"]
    assert distinct_names([RunFolder(path) for path in paths]) == ["a/run", "b/run", "b/other"]


def test_command_line(make_run):
    run = make_run("a")
    done = CliRunner().invoke(command, [str(run.path)])
    assert done.exit_code == 0, done.output
    assert str(run.path / "report.html") in done.output
    assert (run.path / "report.html").is_file()


def test_without_a_browser_one_line_says_where_the_page_is(make_run, tmp_path, monkeypatch, capfd):
    run = make_run("a")
    opener = tmp_path / "xdg-open"
    opener.write_text("#!/bin/sh\nfor i in 1 2 3 4 5 6; do echo w3m: not found >&2; done\nexit 3\n")
    opener.chmod(0o755)
    for path in (f"{tmp_path}:{os.environ['PATH']}", str(tmp_path / "nowhere")):
        monkeypatch.setenv("PATH", path)
        command.main([str(run.path), "--open"], standalone_mode=False)
        (line,) = capfd.readouterr().err.splitlines()
        assert (run.path / "report.html").as_uri() in line


def test_mistakes(mistake, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "folder is not a run" in mistake("report", "folder")
    assert "nowhere is not a run: it does not exist" in mistake("report", "nowhere")
    (tmp_path / "folder/recipe.yaml").write_text("")
    assert "recipe.yaml is not a run: it is a file; name the folder" in mistake("report", "folder/recipe.yaml")


def test_measured_and_tuned_runs(make_run, tmp_path):
    run = make_run("a")
    measured = run.path / "evaluation/step_00000040-9-heun-2-random-classes"
    measured.mkdir()
    (measured / "metrics.json").write_text(json.dumps({"metrics": {"fid": 12.5}, "warnings": []}))
    guided = [({"scale": s, "interval": [0.0, h]}, 9, s * h) for s in (1.5, 2.0) for h in (0.5, 1.0)]
    cells = [
        {"score": "fd-digits", "sample": {"guidance": guidance, "num": num}, "scores": {"fd-digits": value}}
        for guidance, num, value in [(None, 9, 7.0), *guided, ({"scale": 2.0, "interval": [0.0, 1.0]}, 99, 8.0)]
    ]
    best = [{"options": "--scale 1.5 --interval 0 0.5", "num": 99, "value": 0.75}]
    (run.path / "tune").mkdir()
    record = {"score": "fd-digits", "better": "lower", "best": best, "cells": cells}
    (run.path / "tune/tune.json").write_text(json.dumps(record))
    _, (shown,) = read(write_report([run.path], tmp_path / "page.html"))
    assert {"random": {"fid": 12.5}}.items() <= {e["classes"]: e["scores"] for e in shown["evaluations"]}.items()
    tuning = shown["tuning"]
    assert (tuning["scales"], tuning["intervals"]) == ([1, 1.5, 2.0], ["0 to 0.5", "0 to 1"])
    assert tuning["values"] == [[7.0, 0.75, 1.0], [7.0, 1.5, 2.0]]  # of few samples, also where there are many
    (run.path / "tune/tune.json").write_text('{"cells": [{}]}')
    _, (shown,) = read(write_report([run.path], tmp_path / "page.html"))
    assert shown["tuning"] is None
    assert "tune.json" in shown["problems"][0]


def test_samples_that_are_judged_and_measured_are_shown_once(make_run, tmp_path):
    run = make_run("a", "sample.solver=dpmpp-2m", "sample.num=9")
    sample = run.recipe().sample
    record = json.loads((run.path / "evaluation/a.json").read_text()) | {"sample": sample.model_dump(mode="json")}
    measured = run.path / "evaluation" / f"step_00000040-{describe_sampling(sample).replace(' ', '-')}"
    measured.mkdir()
    (run.path / "evaluation/a.json").unlink()
    measured.with_name(f"{measured.name}.json").write_text(json.dumps(record))
    (measured / "metrics.json").write_text(json.dumps({"metrics": {"fd-digits": 1.4999, "prec-digits": 0.75}}))
    _, (shown,) = read(write_report([run.path], tmp_path / "page.html"))
    (entry,) = shown["evaluations"]
    assert (entry["own"], entry["sampling"], entry["classes"]) == (True, describe_sampling(sample), "balanced")
    assert list(entry["scores"].items()) == [("recognised", 0.9), ("fd-digits", 1.5), ("prec-digits", 0.75)]


def test_colours_can_be_told_from_their_background():
    """WCAG's contrast: 4.5 to 1 for text and curves, on the surfaces of both themes."""
    css = Path(report.__file__).with_name("assets").joinpath("report.css").read_text()
    pairs = dict(re.findall(r"--([\w-]+): light-dark\((#\w{6}, #\w{6})\)", css))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for name in ["text", "muted", "accent", "warn", *(f"run-{i}" for i in range(8))]:
        for surface in ("surface", "bg", "raised"):
            for colour, behind in zip(pairs[name].split(", "), pairs[surface].split(", ")):
                assert contrast(colour, behind) >= 4.5, (name, surface)
    for colour, behind in zip(pairs["text"].split(", "), pairs["mark"].split(", ")):
        assert contrast(colour, behind) >= 4.5
