"""The guidance search: the best cell of a known landscape, resuming, and the command line."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from click.testing import CliRunner
from conftest import TINY

from dic_repa.cli.tune import command
from dic_repa.conditions import ClassLabels
from dic_repa.errors import UserError
from dic_repa.evaluation import Metric, judge_digits, metrics
from dic_repa.evaluation.extractors import extractors
from dic_repa.evaluation.judge import Judge
from dic_repa.evaluation.metrics import MetricSet
from dic_repa.evaluation.report import _tuning
from dic_repa.evaluation.runs import Judgement
from dic_repa.evaluation.tune import Tuner
from dic_repa.models import DiC
from dic_repa.recipe import GuidanceSection, load_recipe, to_yaml
from dic_repa.runs.folder import RunFolder
from dic_repa.sampling.labels import balanced_labels
from dic_repa.sampling.load import Checkpoint, load

SCALES, INTERVALS = (1.0, 1.5, 2.0, 3.0), ((0.0, 0.5), (0.0, 1.0))


class Pixels:
    """An extractor that gives the images as they are."""

    layers, fingerprint, resizing, notes = ("pixels",), "", "", ()

    def to(self, _device):
        return self

    def __call__(self, images):
        return {"pixels": images.float().flatten(1) / 255}


class Loss(Metric):
    """Lowest at a scale of 2, read from images that tell the guidance that they were asked with."""

    needs = ""

    def __call__(self, features, _reference):
        scale, high = round(features[0, 0].item() * 10, 1), round(features[0, 2].item(), 1)
        distance = (scale - 2) ** 2 + 0.005 * (1 - high) * (scale != 1)
        if len(features) < 30 and (scale, high) == (2.0, 0.5):
            distance -= 0.01
        return distance if scale < 3 or self.title == "gain" else math.nan


class Gain(Loss):
    better = "higher"

    def __call__(self, features, reference):
        return -super().__call__(features, reference)


class Landscape:
    """A sampler whose images tell the guidance that they were asked with."""

    def __init__(self):
        self.asked = []

    def sampler(self, settings):
        guidance = settings.guidance
        scale, high = (1.0, 0.0) if guidance is None else (guidance.scale, guidance.interval[1])
        self.asked.append((scale, high, settings.num, settings.seed))

        def sampler(labels):
            pixels = [scale / 10, scale / 10, high, high, 0.0, 1.0]  # two of each channel; of one colour they were bad
            yield torch.tensor(pixels).view(1, 3, 1, 2).expand(len(labels), -1, -1, -1)

        return sampler


@pytest.fixture
def checkpoint(tmp_path):
    tiny = [option.removeprefix("--set=") for option in TINY]
    recipe = load_recipe("digits-urepa", [*tiny, "sample.steps=1", "sample.seed=5"])
    folder = tmp_path / "checkpoint"
    DiC(width=8, depths=(1, 1, 1, 1, 1), in_channels=1, num_classes=10).save_pretrained(folder)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder


@pytest.fixture
def landscape(monkeypatch):
    found = Landscape()
    monkeypatch.setattr(Checkpoint, "sampler", lambda _loaded, settings: found.sampler(settings))
    assert "digits" in metrics  # filed before it is replaced
    monkeypatch.setitem(extractors._entries, "pixels", Pixels)
    parts = {"loss": Loss("pixels.pixels", "loss"), "gain": Gain("pixels.pixels", "gain")}
    for name, part in {**parts, "digits": MetricSet(("loss", "gain"), main="loss")}.items():
        monkeypatch.setitem(metrics._entries, name, lambda part=part: part)
    return found


def tuner(checkpoint, **options) -> Tuner:
    given = {"scales": SCALES, "intervals": INTERVALS, "num": 20, "confirm": 2, "confirm_num": 40}
    return Tuner(load(checkpoint), **given | options)


def test_the_best_is_found_and_confirmed(checkpoint, landscape):
    search = tuner(checkpoint)
    best = search.run()
    assert [(c.scale, c.interval[1]) for c in best] == [(2.0, 1.0), (2.0, 0.5)]  # with few: the other way
    assert best[0].value == pytest.approx(0)
    assert best[0].options == "--scale 2 --interval 0 1"
    assert len(landscape.asked) == 1 + 3 * 2 + 2  # a scale of 1 has no interval
    assert {seed for *_, seed in landscape.asked} == {5}
    assert search.picture.is_file()
    record = json.loads(search.file.read_text())
    assert record["best"][0]["options"] == best[0].options
    assert len(record["cells"]) == len(landscape.asked)


def test_higher_can_be_better(checkpoint, landscape):
    assert tuner(checkpoint, score="gain").run()[0].scale == 2


def test_it_goes_on_where_it_stopped(checkpoint, landscape):
    class Stopped(Exception):
        pass

    def stop_at(asked):
        def stop(cell, _count):
            if cell is not None and len(landscape.asked) == asked:
                raise Stopped

        return stop

    with pytest.raises(Stopped):
        tuner(checkpoint).run(stop_at(4))
    before = list(landscape.asked)
    kept = []
    search = tuner(checkpoint)
    best = search.run(lambda cell, count: cell and kept.append(count))
    assert kept == [20] * 4 + [0] * 5
    assert len(landscape.asked) == len(set(landscape.asked)) == 9  # none was done twice
    assert landscape.asked[:4] == before
    search.picture.unlink()
    (checkpoint / "tune/tune.json").write_text(json.dumps({"cells": []}))
    with pytest.raises(Stopped):  # the grid is drawn, and its best told, before the confirmation
        tuner(checkpoint).run(stop_at(17))
    assert search.picture.is_file()
    assert len(json.loads(search.file.read_text())["best"]) == 2
    landscape.asked[9:] = []
    tuner(checkpoint).run()
    landscape.asked[9:] = []
    assert tuner(checkpoint).run() == best
    assert len(landscape.asked) == 9
    record = json.loads(search.file.read_text())  # as an earlier version has it
    for cell in record["cells"]:
        del cell["search"]
        for key in ("internal", "internal_interval"):
            (cell["sample"]["guidance"] or {}).pop(key, None)
    search.file.write_text(json.dumps(record))
    assert tuner(checkpoint).run() == best
    assert len(landscape.asked) == 9
    tuner(checkpoint, scales=(2.0, 2.5)).run()
    assert [(scale, high) for scale, high, num, _ in landscape.asked[9:] if num == 20] == [(2.5, 0.5), (2.5, 1.0)]
    search.file.write_text(search.file.read_text()[:50])
    with pytest.raises(UserError, match=r"tune.json is damaged .*; move it away to search anew"):
        tuner(checkpoint).run()


def test_what_was_found_of_other_weights_is_not_taken_over(checkpoint, landscape, tmp_path):
    few = {"scales": (1.0, 2.0), "intervals": ((0.0, 1.0),), "confirm": 0}
    for score in ("loss", "gain", "loss"):
        tuner(checkpoint, score=score, **few).run()
    assert len(landscape.asked) == 4  # the other score's cells are kept
    DiC(width=8, depths=(1, 1, 1, 1, 1), in_channels=1, num_classes=10).save_pretrained(checkpoint)
    search = tuner(checkpoint, score="loss", **few)
    search.run()
    assert len(landscape.asked) == 6
    record = json.loads(search.file.read_text())
    record["cells"][0]["scores"]["loss"] = 7  # of the weights that are gone
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune/tune.json").write_text(json.dumps(record))
    assert _tuning(RunFolder(tmp_path), [])["values"] == [[cell.value for cell in search.found]]


def test_the_judge_of_digits_counts(checkpoint):
    """With the real sampler and judge, the search's value is what the judge says of the same samples."""
    search = tuner(checkpoint, scales=(1.0, 2.0), intervals=((0.0, 1.0),), confirm=0)
    (best,) = search.run()
    assert search.score == "fd-digits"
    loaded = load(checkpoint)
    for cell, guidance in zip(search.found, (None, GuidanceSection(scale=2.0, interval=(0.0, 1.0)))):
        settings = loaded.recipe.sample.model_copy(update={"guidance": guidance, "num": 20})
        labels = balanced_labels(loaded.recipe, ClassLabels(10), 20)
        images = torch.cat(list(loaded.sampler(settings)(labels)))
        assert cell.value == pytest.approx(judge_digits((images * 255).round() / 255, labels)["fd-digits"], rel=1e-9)
    assert best.value == min(cell.value for cell in search.found)


def test_judges():
    judge = Judge(["digits"])
    assert (judge.main, judge.better["recognised"]) == ("fd-digits", "higher")
    assert judge.is_better("fd-digits", 1.0, 2.0)
    assert judge.is_better("recognised", 2.0, 1.0)
    assert judge.is_better("fd-digits", 1.0, None)
    assert not judge.is_better("fd-digits", math.nan, 2.0)
    assert judge.is_better("fd-digits", 5.0, math.nan)
    with pytest.raises(UserError, match="did you mean digits"):
        Judge(["digit"])


def test_command_line(checkpoint, landscape, tmp_path):
    line = [str(checkpoint), "--num", "20", "--confirm-num", "40", "--scales", "1,2", "--intervals", "0:0.5,0:1"]
    line += ["--steps", "3", "--seed", "1"]
    done = CliRunner().invoke(command, [*line, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert f"use: dic-repa sample {checkpoint} --scale 2 --interval 0 1 --steps 3 --seed 1\n" in done.output
    assert (tmp_path / "out/tune.png").is_file()
    weak = CliRunner().invoke(command, [*line, "--weak", str(checkpoint), "--out", str(tmp_path / "weak")])
    assert weak.exit_code == 0, weak.output + repr(weak.exception)
    assert f"--scale 2 --interval 0 1 --steps 3 --seed 1 --weak {checkpoint}\n" in weak.output


def test_mistakes(mistake, checkpoint):
    assert "'--scales': 'two' is not a valid float" in mistake("tune", checkpoint, "--scales", "1,two")
    assert "pairs such as" in mistake("tune", checkpoint, "--intervals", "0.7")
    assert "interval 0.9:0.1" in mistake("tune", checkpoint, "--intervals", "0.9:0.1")
    assert "did you mean fd-digits" in mistake("tune", checkpoint, "--metric", "fd-digit")
    assert "reference" in mistake("tune", checkpoint, "--metric", "prec-digits")
    recipe = (checkpoint / "recipe.yaml").read_text().replace("label_dropout: 0.1", "label_dropout: 0.0")
    (checkpoint / "recipe.yaml").write_text(recipe)
    assert "no guidance to search" in mistake("tune", checkpoint)
    loaded = load(checkpoint)
    settings = loaded.recipe.sample.model_copy(update={"guidance": GuidanceSection(scale=2.0, weak=str(checkpoint))})
    assert Tuner(loaded, "fd-digits", sample=settings, num=2).cells()  # a weaker model guides without a null class
    loaded.recipe.train.label_dropout = 0.1
    settings.guidance = GuidanceSection(kind="cfg++", scale=0.5)
    with pytest.raises(UserError, match=r"CFG\+\+ guides at a scale of 1 too"):
        Tuner(loaded, "fd-digits", sample=settings)


def test_records_of_guidance_by_a_weaker_model_know_its_weights(checkpoint, tmp_path):
    """One that was written over makes other samples: neither a search nor a judgement goes on with the earlier ones."""
    weak, loaded = shutil.copytree(checkpoint, tmp_path / "weak"), load(checkpoint)
    sample = loaded.recipe.sample.model_copy(update={"guidance": GuidanceSection(scale=2.0, weak=str(weak))})

    def identities():
        tuner = Tuner(loaded, "fd-digits", sample=sample, num=2, out=tmp_path / "out")
        return tuner.spec, Judgement(tmp_path, 4, loaded.recipe, sample).identity()

    before = identities()
    assert identities() == before
    for parameter in loaded.denoiser.parameters():
        parameter.data += 1
    loaded.denoiser.save_pretrained(weak)
    assert all(new != old for new, old in zip(identities(), before))
