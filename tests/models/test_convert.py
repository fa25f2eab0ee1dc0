"""`dic-repa convert`: there and back without a bit lost, and what cannot be converted said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file
from small_runs import full_disk

from dic_repa.cli import main
from dic_repa.files.manifest import write_manifest
from dic_repa.models import DiC, create_denoiser
from dic_repa.recipe import load_recipe, to_yaml
from dic_repa.sampling.convert import load_any

AUTHORS = DATA / "authors_dic_tiny.safetensors"


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as exit:
            main(["convert", *map(str, arguments)])
        assert exit.value.code == 0
        return capsys.readouterr().out

    return run


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_authors_to_ours_and_back(convert, tmp_path):
    convert(AUTHORS, "ours")
    reference = load_file(DATA / "authors_dic_tiny_io.safetensors")
    with torch.no_grad():
        out = DiC.from_pretrained("ours")(reference["x"], reference["t"], reference["y"])
    assert (out - reference["out"]).norm() <= 1e-5 * reference["out"].norm()

    convert("ours", "theirs.safetensors")
    assert equal(load_file("theirs.safetensors"), load_file(AUTHORS))
    convert("ours", "theirs.pt")
    assert equal(torch.load("theirs.pt", weights_only=True)["ema"], load_file(AUTHORS))
    convert("theirs.pt", "again")
    assert equal(load_file("again/model.safetensors"), load_file("ours/model.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "ours", "theirs.pt", "theirs.safetensors"]


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision(convert, dtype, torch_dtype):
    said = convert(AUTHORS, "whole")
    assert "float32" in said
    convert(AUTHORS, "half", "--dtype", dtype)
    whole, half = load_file("whole/model.safetensors"), load_file("half/model.safetensors")
    assert equal(half, {key: value.to(torch_dtype) for key, value in whole.items()})
    assert next(DiC.from_pretrained("half").parameters()).dtype == torch.float32  # rounded, and computed with as ever


@pytest.fixture
def checkpoint(tmp_path):
    """A training checkpoint as a run leaves it, with weights that tell the averages apart."""
    folder = tmp_path / "run" / "checkpoints" / "step_00000004"
    recipe = load_recipe("digits-baseline", ["model.width=8", "model.depths=[1,1,1,1,1]"])
    model = DiC(8, (1, 1, 1, 1, 1), in_channels=1, num_classes=10)
    raw = {f"denoiser.{key}": torch.randn(value.shape) for key, value in model.state_dict().items()}
    for name in ("ema", "ema-0.9"):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / name)
        (folder / name / "recipe.yaml").write_text(to_yaml(recipe))
    (folder.parent.parent / "recipe.yaml").write_text(to_yaml(recipe))
    save_file(raw | {"alignments.0.head.weight": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "state.json").write_text("{}")
    write_manifest(folder)
    return folder


def test_training_checkpoint_to_inference(convert, checkpoint):
    for weights in ("ema", "ema-0.9"):
        convert(checkpoint, weights, "--weights", weights)
        ours = load_file(checkpoint / weights / "model.safetensors")
        assert equal(load_file(f"{weights}/model.safetensors"), ours)
        assert load_recipe(f"{weights}/recipe.yaml") == load_recipe(checkpoint / weights / "recipe.yaml")
    convert(checkpoint, "raw", "--weights", "raw")
    raw = load_file(checkpoint / "model.safetensors")
    raw.pop("alignments.0.head.weight")
    ours = load_file("raw/model.safetensors")
    assert equal({f"denoiser.{key}": value for key, value in ours.items()}, raw)
    assert json.loads(Path("raw/config.json").read_text())["width"] == 8


def test_recipe_beside_the_authors_weights(convert):
    convert(AUTHORS, "ours", "--recipe", "dic-s-ddpm")
    assert load_recipe("ours/recipe.yaml") == load_recipe("dic-s-ddpm")
    convert("ours", "again")
    assert load_recipe("again/recipe.yaml") == load_recipe("dic-s-ddpm")


def test_mistakes(mistake, checkpoint, tmp_path):
    assert "is not a saved model, so it is not overwritten" in mistake("convert", AUTHORS, "run", "--overwrite")
    said = mistake("convert", checkpoint, "out", "--weights", "ema-0.5")
    assert "has no weights 'ema-0.5'; did you mean ema-0.9 or ema?" in said
    assert "no run or checkpoint folder nowhere" in mistake("convert", "./nowhere", "out")
    DiC(8, (1, 1, 1, 1, 1), skips="dense", block="gated").save_pretrained(tmp_path / "rung")
    assert "rung exists; pass --overwrite" in mistake("convert", AUTHORS, "rung")
    assert "has no DiC with another skips or block" in mistake("convert", "rung", "out.pt")
    assert "did you mean dic-s-ddpm" in mistake("convert", AUTHORS, "out", "--recipe", "dic-s-dpm")
    assert not list(tmp_path.glob("*out*"))


def test_a_recipe_that_is_not_the_model_s(mistake):
    DiC(8, (1, 1, 1, 1, 1), in_channels=1, num_classes=10).save_pretrained("digits")
    DiC(8, (1, 1, 1, 1, 1), in_channels=1, num_classes=7).save_pretrained("others")
    assert "has 4 channels, the model is for 1" in mistake("convert", "digits", "out", "--recipe", "dic-s")
    assert "has 10 classes, the model is for 7" in mistake("convert", "others", "out", "--recipe", "digits-baseline")
    create_denoiser("SiT", 1, 10, width=32, depth=1, num_heads=1, patch_size=3).save_pretrained("patches")
    assert "divisible by its patch size 3, not 16x16" in mistake(
        "convert", "patches", "out", "--recipe", "digits-baseline"
    )
    assert not Path("out").exists()


def test_targets_that_cannot_be(mistake):
    assert "px.foo: convert writes no .foo files" in mistake("convert", AUTHORS, "px.foo")
    for target in ("/proc/x", "/proc/x.pt", "/proc/x.safetensors"):
        said = mistake("convert", AUTHORS, target)
        assert f"{target} could not be written" in said
        assert ".writing" not in said


@pytest.mark.parametrize("target", ["new", "new.pt", "new.safetensors", "old"])
def test_a_full_disk_leaves_what_was_there(convert, mistake, tmp_path, target):
    convert(AUTHORS, "old")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    with full_disk():
        assert f"{target} could not be written" in mistake("convert", AUTHORS, target, "--overwrite")
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before
    assert sorted(tmp_path.glob("*")) == [tmp_path / "old"]


def test_load_reads_every_kind(checkpoint, tmp_path):
    assert load_any(checkpoint)[1] == checkpoint / "ema" / "recipe.yaml"
    assert load_any(AUTHORS)[1] is None
    assert load_any(checkpoint / "ema")[0].config == load_any(checkpoint)[0].config
