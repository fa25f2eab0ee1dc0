"""What a recipe says of the samples themselves: how their classes are drawn, and how their pixels become levels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_samplers import RECIPE

from dic_repa.cli import main
from dic_repa.conditions import ClassLabels
from dic_repa.evaluation.runs import describe_sampling
from dic_repa.recipe import to_yaml
from dic_repa.sampling.labels import draw_labels, random_labels
from dic_repa.sampling.load import load


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    """A verb on the checkpoint in this process, in an empty folder; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def call(verb, *arguments) -> str:
        with pytest.raises(SystemExit) as exit:
            main([verb, str(checkpoint), *map(str, arguments)])
        printed = capsys.readouterr()
        assert exit.value.code == 0, printed.err
        return printed.out

    return call


def labels_in(folder: str) -> list[int]:
    return json.loads(Path(folder, "samples.json").read_text())["labels"]


def test_a_recipe_says_how_classes_are_drawn_and_the_command_overrides_it(run):
    sample = RECIPE.sample.model_copy(update={"classes": "random"})
    Path("random.yaml").write_text(to_yaml(RECIPE.model_copy(update={"sample": sample})))
    drawn = random_labels(RECIPE, ClassLabels(10), 25).tolist()
    in_turn = [i % 10 for i in range(25)]
    for recipe, option, labels in (
        ([], [], in_turn),
        (["--recipe", "random.yaml"], [], drawn),
        (["--recipe", "random.yaml"], ["--balanced-classes"], in_turn),
        ([], ["--random-classes"], drawn),
    ):
        run("sample", "--num", "25", *recipe, *option, "--out", "out", "--overwrite")
        assert labels_in("out") == labels
    assert json.loads(Path("out/samples.json").read_text())["sample"]["classes"] == "random"


def test_a_score_says_how_classes_were_drawn(run):
    options = ["--reference", "digits", "--metrics", "fd-digits", "--num", "20", "--out", "record.json"]
    for given, word in (("--random-classes", "random"), ("--balanced-classes", "balanced")):
        heading, row = run("evaluate", *options, given).splitlines()[:2]
        assert heading.split()[2] == "classes"
        assert row.split()[2] == word
        assert json.loads(Path("record.json").read_text())["samples"]["sampling"]["sample"]["classes"] == word
    drawn = RECIPE.sample.model_copy(update={"classes": "random"})
    assert describe_sampling(drawn) == describe_sampling(RECIPE.sample) + " random classes"
    assert torch.equal(draw_labels(RECIPE, ClassLabels(10), drawn), random_labels(RECIPE, ClassLabels(10), drawn.num))


def test_pixels_are_truncated_as_repa_does_or_rounded_as_dit_does(run, checkpoint):
    settings = RECIPE.sample.model_copy(update={"num": 4})
    (images,) = load(checkpoint).sampler(settings)(torch.arange(4))
    levels = {"round": np.rint(255 * images.numpy()), "truncate": np.floor(255 * images.numpy())}
    assert (levels["round"] != levels["truncate"]).any()
    for pixels, expected in levels.items():
        sample = settings.model_copy(update={"pixels": pixels})
        Path("pixels.yaml").write_text(to_yaml(RECIPE.model_copy(update={"sample": sample})))
        run("sample", "--recipe", "pixels.yaml", "--out", pixels)
        written = np.stack([np.array(Image.open(f"{pixels}/{i:06d}.png")) for i in range(4)])
        assert (written == expected[:, 0]).all()
