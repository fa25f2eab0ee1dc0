"""What a recipe says of the samples themselves: how their classes are drawn, and how their pixels become levels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from small_samplers import RECIPE

from dic_repa.cli import main
from dic_repa.conditions import ClassLabels, condition_of_data
from dic_repa.data import datasets
from dic_repa.data.saved import SavedData
from dic_repa.errors import UserError
from dic_repa.evaluation.runs import describe_sampling
from dic_repa.files.manifest import write_manifest
from dic_repa.recipe import SampleSection, to_yaml
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


COUNTS = (5, 0, 1, 300, 27, 27, 2, 1, 40, 16)


def test_classes_come_as_often_as_in_the_data():
    """Among any first n, each class has its share of n, rounded up or down."""
    settings = SampleSection(classes="data", num=1000)
    labels = draw_labels(RECIPE, ClassLabels(10, counts=COUNTS), settings)
    so_far = torch.nn.functional.one_hot(labels, 10).cumsum(dim=0)
    quota = torch.arange(1, 1001).unsqueeze(1).double() * torch.tensor(COUNTS) / sum(COUNTS)
    assert ((so_far - quota).abs() < 1).all()
    assert so_far[sum(COUNTS) - 1].tolist() == list(COUNTS)
    few = draw_labels(RECIPE, ClassLabels(10, counts=COUNTS), settings.model_copy(update={"num": 40}))
    assert torch.equal(few, labels[:40])
    some = draw_labels(RECIPE, ClassLabels(10, counts=COUNTS), settings.model_copy(update={"num": 220}), [0, 2, 9])
    assert torch.bincount(some).tolist() == [50, 0, 10, 0, 0, 0, 0, 0, 0, 160]


def test_a_checkpoint_keeps_how_often_each_class_is_in_the_data(checkpoint, run, tmp_path, mistake):
    digits = datasets.create("digits")
    counts = torch.bincount(digits.labels).tolist()
    assert load(checkpoint).condition.counts is None  # of an earlier version
    shutil.copytree(checkpoint, tmp_path / "new")
    SavedData.of(digits, condition_of_data(digits)).write(tmp_path / "new")
    write_manifest(tmp_path / "new")
    assert list(load(tmp_path / "new").condition.counts) == counts
    said = mistake("sample", str(checkpoint), "--data-classes", "--num", "4")
    assert "how often each class is in the training data is not known" in said
    with pytest.raises(SystemExit):
        main(["sample", str(tmp_path / "new"), "--data-classes", "--num", "25", "--out", "out"])
    settings = SampleSection(classes="data", num=25)
    assert labels_in("out") == draw_labels(RECIPE, ClassLabels(10, counts=counts), settings).tolist()
    file = tmp_path / "new/data.json"
    for wrong in ([1, 2], [-1, *counts[1:]], [0] * 10, ["7"] * 10, [2**62] * 10):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"class_counts": wrong}))
        with pytest.raises(UserError, match=r"data\.json is damaged"):
            SavedData.read(tmp_path / "new")


def test_data_that_cannot_be_counted_is_told_before_training(mistake):
    random = ["--set=data={name: random, size: 16, options: {num_classes: 10, channels: 1}}", "--set=alignments=[]"]
    said = mistake("train", "digits-baseline", *TINY, *random, "--set=sample.classes=data", "--out", "run")
    assert "how often each class is in the training data is not known" in said
    assert not Path("run").exists()


def test_a_score_says_how_classes_were_drawn(run):
    options = ["--reference", "digits", "--metrics", "fd-digits", "--num", "20", "--out", "record.json"]
    for given, word in (("--random-classes", "random"), ("--balanced-classes", "balanced")):
        heading, row = run("evaluate", *options, given).splitlines()[:2]
        assert heading.split()[2] == "classes"
        assert row.split()[2] == word
        assert json.loads(Path("record.json").read_text())["samples"]["sampling"]["sample"]["classes"] == word
    both = run("evaluate", *options[:-2], "--both").splitlines()[1:3]
    assert [row.split()[2] for row in both] == ["balanced", "random"]
    apart = [json.loads(file.read_text()) for file in Path("samples").glob("*/metrics.json")]
    assert {r["samples"]["sampling"]["sample"]["classes"]: len(apart) for r in apart} == {"balanced": 2, "random": 2}
    drawn = RECIPE.sample.model_copy(update={"classes": "random"})
    assert describe_sampling(drawn) == describe_sampling(RECIPE.sample) + " random classes"
    internal = {"internal": 1.4}
    assert describe_sampling(SampleSection(num=20, steps=4, guidance=internal)) == "20 heun 4 internal 1.4"
    both = describe_sampling(SampleSection(num=20, steps=4, guidance=internal | {"kind": "cfg++", "scale": 1.0}))
    assert both == "20 heun 4 cfg++ 1.0 0.0 0.7 internal 1.4"  # it guides at 1, too
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
