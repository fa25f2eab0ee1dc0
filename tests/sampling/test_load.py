"""`dic_repa.load` and `.sample` give, as PIL images, what `dic-repa sample` writes."""

import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY
from fake_hub import serving
from huggingface_hub import constants
from PIL import Image

from dic_repa import DiC, load
from dic_repa.cli import main
from dic_repa.cli.convert import command as convert
from dic_repa.cli.sample import command
from dic_repa.errors import UserError
from dic_repa.files import hub
from dic_repa.files.manifest import write_manifest
from dic_repa.recipe import load_recipe, to_yaml


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    recipe = load_recipe("digits-urepa", [*(option.removeprefix("--set=") for option in TINY), "sample.seed=3"])
    folder = tmp_path_factory.mktemp("load") / "checkpoint"
    model = DiC(width=8, depths=(1, 1, 1, 1, 1), in_channels=1, num_classes=10)
    for parameter in model.parameters():  # no zero gate hides the label
        parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder


def test_images_are_those_of_the_command(checkpoint, tmp_path):
    options = ["--classes", "3,7", "--num", "2", "--solver", "ab2", "--steps", "3", "--scale", "2"]
    result = CliRunner().invoke(command, [str(checkpoint), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    images = load(checkpoint).sample(classes=["3", 7], solver="ab2", steps=3, guidance=2)
    for i, image in enumerate(images):
        with Image.open(tmp_path / "out" / f"{i:06d}.png") as written:
            assert np.array_equal(np.array(image), np.array(written))
    assert not np.array_equal(np.array(images[0]), np.array(images[1]))


def test_classes_go_in_turn_and_a_seed_counts(checkpoint):
    loaded = load(checkpoint)
    first, again, other = (loaded.sample(num=2, steps=2, seed=seed, guidance={"scale": 1.0}) for seed in (1, 1, 2))
    named = loaded.sample(["0", "1"], steps=2, seed=1, guidance=1)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    assert [image.tobytes() for image in first] == [image.tobytes() for image in named]
    assert first[0].tobytes() != other[0].tobytes()
    assert (first[0].size, first[0].mode) == ((16, 16), "L")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": ["cat"]}, "unknown class 'cat'"),
        ({"classes": [11]}, "11"),
        ({"solver": "hein"}, "heun"),
        ({"steeps": 3}, "steeps"),
        ({"output": "jpeg"}, "unknown output 'jpeg'; known: pil, pt"),
    ],
)
def test_what_does_not_fit_is_one_line(checkpoint, given, message):
    with pytest.raises(UserError, match=message):
        load(checkpoint).sample(**given)


def test_images_as_a_tensor(checkpoint):
    given = {"classes": ["3", 7, 1], "steps": 2, "batch_size": 2}
    images, tensor = load(checkpoint).sample(**given), load(checkpoint).sample(**given, output="pt")
    assert (tensor.shape, tensor.dtype) == ((3, 1, 16, 16), torch.float32)
    levels = np.stack([np.array(image) for image in images])
    assert np.array_equal((tensor[:, 0] * 255).round().byte().numpy(), levels)


def test_a_model_on_the_hub(checkpoint, tmp_path, monkeypatch):
    """It is downloaded once; what of the repository is no part of the model is left there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "published")
    write_manifest(tmp_path / "published")
    files = {file.name: file.read_bytes() for file in (tmp_path / "published").iterdir()}
    expected = load(checkpoint).sample([3], steps=2)[0].tobytes()
    with serving(monkeypatch, tmp_path) as served:
        served.repositories["someone/digits"] = {"main": files | {"large.bin": b"0"}, "two": files}
        served.repositories["someone/other"] = {"main": {"model.bin": b""}}
        commit = served.commit("someone/digits", "main")
        for name in ("someone/digits", "someone/digits@two", f"someone/digits@{commit}"):
            assert load(name).sample([3], steps=2)[0].tobytes() == expected
        with pytest.raises(UserError, match=r"someone/other on the hub is no model of dic-repa"):
            load("someone/other")
        with pytest.raises(UserError, match="no folder someone/gone, and the hub does not give it"):
            load("someone/gone")
    cached = tmp_path / "cache" / "models--someone--digits" / "snapshots" / commit
    assert not (cached / "large.bin").exists()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "PINS", {})
    assert load("someone/digits").sample([3], steps=2)[0].tobytes() == expected
    assert main_exit(["sample", "someone/digits", "--num=2", "--steps=1"]) == 0
    assert (tmp_path / "samples" / "digits" / "000001.png").is_file()
    (cached / "model.safetensors").unlink()
    (cached / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"damaged: model\.safetensors has 3 bytes"):
        load("someone/digits")
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=r"the hub does not give it .*; did you mean runs/digits\?"):
        load("rnus/digits")
    for local in ("runs/digit", "./digits", "published/other"):
        with pytest.raises(UserError, match="no run or checkpoint folder"):
            load(local)


def main_exit(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    return exit.value.code


def test_a_file_of_the_authors(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("DiC.pt", "DiC.safetensors"):
        assert CliRunner().invoke(convert, [str(checkpoint), name]).exit_code == 0
        recipe = load_recipe("digits-urepa", ["sample.seed=3"])
        for given in ("digits-urepa", str(checkpoint / "recipe.yaml"), recipe):
            found = load(name, recipe=given)
            images = [model.sample([3], steps=2, seed=3)[0].tobytes() for model in (found, load(checkpoint))]
            assert images[0] == images[1]
    for given, message in [
        ({}, "does not say what it was trained by: name that"),
        ({"recipe": "dic-xll"}, "unknown recipe 'dic-xll'"),
        ({"recipe": "sit-xl-2-repa"}, "4 channels, the model is for 1; name its own recipe"),
    ]:
        with pytest.raises(UserError, match=message):
            load("DiC.pt", **given)
    sample = ["sample", "DiC.pt", "--recipe=digits-urepa", "--num=2", "--steps=2", "--out=made"]
    assert main_exit(sample) == 0
    with Image.open("made/000001.png") as made:
        expected = load("DiC.pt", recipe="digits-urepa").sample(num=2, steps=2)[1]
        assert np.array_equal(np.array(made), np.array(expected))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"notes\.txt is a file; name the folder"):
        load("notes.txt")
