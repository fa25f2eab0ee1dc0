"""A folder of photos without classes of their own, from `prepare` or directly: trained, sampled, as a user would."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from pictures import save_vae, write_tree
from PIL import Image
from safetensors.torch import load_file

from dic_repa.cli import main
from dic_repa.data.prepared import Prepared
from dic_repa.models import create_denoiser, forward_on_meta
from dic_repa.recipe import SampleSection
from dic_repa.sampling.load import load

RECIPE = """
model: {name: DiC, width: 8, depths: [1, 1, 1, 1, 1], time_scale: 1000}
data: {name: prepared, path: data, size: 16}
alignments: []
train: {steps: 3, batch_size: 4, log_every: 1, sample_every: 3}
optimizer: {learning_rate: 1.0e-3}
sample: {solver: heun, steps: 2, num: 24}
"""


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The current folder, with photos/ in it and a recipe for what is prepared of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    write_tree(tmp_path, {"photos": 6})
    return tmp_path


def call(*arguments: str) -> None:
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    assert exit.value.code == 0


@pytest.mark.slow
def test_from_a_folder_to_samples(photos, dic_repa, capsys):
    done = dic_repa("prepare", "photos", "data", "--size=16", "--autoencoder=none")
    assert "6 of 6 images, 1 class (images)" in done.stdout
    call("train", "mine.yaml")
    call("sample", "runs/mine")
    assert "24 images, " in capsys.readouterr().out
    width, height = Image.open(photos / "runs/mine/samples/step_00000003.png").size
    assert width < 8 * height  # three rows of ten, twice: raw beside averaged
    assert json.loads((photos / "samples/mine/samples.json").read_text())["labels"] == [0] * 24
    one_row = 480 + 6 * 20
    assert Image.open(photos / "samples/mine/grid.png").height < one_row  # three rows of smaller ones
    call("sample", "runs/mine", "--num=3", "--classes=images", "--scale=1.5", "--out=guided")


def test_without_classes(photos, capsys, mistake):
    call("prepare", "photos", "data", "--size=16", "--autoencoder=none", "--unlabelled")
    assert "6 of 6 images, without classes\n" in capsys.readouterr().out
    assert json.loads((photos / "data/prepare.json").read_text())["class_names"] == []
    assert datasets.load_from_disk("data")["label"] == [0] * 6
    call("train", "mine.yaml")
    call("sample", "runs/mine")
    assert "24 images without classes, " in capsys.readouterr().out
    checkpoint = photos / "runs/mine/checkpoints/step_00000003"
    tables = [t for name, t in load_file(checkpoint / "model.safetensors").items() if name.endswith("label.weight")]
    assert tables
    assert all(len(table) == 1 for table in tables)  # the null class has the only row, and is trained
    said = mistake("sample", "runs/mine", "--scale=2", "--out=guided")
    assert "trained on data without classes, so there is no class to guide towards; sample without guidance" in said
    assert "the model has no classes" in mistake("sample", "runs/mine", "--classes=0", "--out=other")


def test_unlabelled_images_as_they_lie(photos):
    keys = ["--set=data.name=images", "--set=data.path=photos", "--set=data.options={unlabelled: true}"]
    call("train", "mine.yaml", *keys)
    pictures = []
    for options in ([], ["--classes=none"], ["--random-classes"]):
        call("sample", "runs/mine", "--num=4", "--overwrite", *options)
        pictures.append([Path(f"samples/mine/{k:06d}.png").read_bytes() for k in range(4)])
    assert pictures[0] == pictures[1] == pictures[2]  # no class is the only one there is


def test_latents_without_classes(photos):
    save_vae(photos / "photos-vae")
    call("prepare", "photos", "data", "--size=32", "--autoencoder=photos-vae", "--unlabelled", "--flip")
    assert len(Prepared("data", size=16)) == 12
    call("train", "mine.yaml")
    loaded = load("runs/mine")
    assert loaded.condition.names == ()
    assert loaded.sampler(SampleSection(steps=2, num=2)).size() == (32, 32)


@pytest.mark.parametrize("name", ["DiC-S", "SiT-S/2", "U-ViT-S/2"])
def test_denoisers_take_no_classes(name):
    with torch.device("meta"):
        denoiser = create_denoiser(name, in_channels=4, num_classes=0)
    forward_on_meta(denoiser, 32, 32)
