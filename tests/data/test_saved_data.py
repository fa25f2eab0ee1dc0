"""A checkpoint is sampled without the data that it was trained on: its autoencoder and class names are beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pictures import save_vae, write_tree
from small_runs import SMALL

from dic_repa.cli import main
from dic_repa.data.autoencoders.load import _loaded
from dic_repa.files.pictures import load_png
from dic_repa.runs.folder import RunFolder
from dic_repa.sampling.load import load
from dic_repa.training.posthoc import save_reconstruction

SETTINGS = [*SMALL, "data.name=prepared", "data.path=data", "train.steps=2", "sample.steps=2", "sample.num=4"]
SETTINGS += ["train.power_ema=[0.1]", "train.snapshot_every=1", "data.options={}"]


def call(*arguments) -> None:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code == 0


@pytest.fixture
def run(request, tmp_path, monkeypatch) -> RunFolder:
    """A run on prepared pixels or latents, whose data is gone by now; the working folder is another one."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _loaded.cache_clear()  # of another test's folder of the same name
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    write_tree(Path("tree"), {"cat": 3, "dog": 3})
    save_vae(Path("vae"), scaling_factor=0.5, shift_factor=0.1)
    settings = SETTINGS
    if request.param in ("pixels", "latents"):
        size, autoencoder = {"pixels": (16, "none"), "latents": (32, "vae")}[request.param]
        call("prepare", "tree", "data", f"--size={size}", f"--autoencoder={autoencoder}")
    else:
        Path("tree").rename("data")
        autoencoder = {"images": "none", "encoded images": "vae"}[request.param]
        settings = [*SETTINGS, "data.name=images", f"data.autoencoder={autoencoder}"]
    call("train", "digits-urepa", "--out=run", *(f"--set={key}" for key in settings))
    shutil.rmtree("data")
    monkeypatch.chdir(tmp_path)
    return RunFolder(tmp_path / "there" / "run")


def images(folder: str) -> torch.Tensor:
    return torch.stack([load_png(Path(folder) / f"{i:06d}.png") for i in range(4)])


@pytest.mark.parametrize("run", ["pixels", "latents", "images", "encoded images"], indirect=True)
def test_sampled_without_the_data(run):
    ema = run.checkpoint_path(2) / "ema"
    call("convert", run.path, "converted")
    save_reconstruction(run, 0.1, Path("made"))
    shutil.copytree(ema, "moved")
    for source in (run.path, ema, "converted", "made", "moved"):
        assert load(source).condition.names == ("cat", "dog")
    for source in (run.path, "converted", "moved"):
        out = Path("samples") / Path(source).name
        call("sample", source, "--out", out)
        assert torch.equal(images(out), images("samples/run"))
    assert len(images("samples/run").unique()) > 100
    call("sample", "moved", "--classes", "dog", "--out", "dogs")
    assert json.loads(Path("dogs/samples.json").read_text())["labels"] == [1] * 4


@pytest.mark.parametrize("run", ["latents"], indirect=True)
def test_an_autoencoder_that_has_moved(run, mistake, tmp_path, capsys):
    call("sample", run.path, "--out", "before")
    _loaded.cache_clear()
    capsys.readouterr()
    (tmp_path / "there" / "vae").rename(tmp_path / "moved-vae")
    said = mistake("sample", run.path, "--out", "after")
    assert "trained behind the autoencoder" in said
    assert "--autoencoder" in said
    call("sample", run.path, "--out", "after", "--autoencoder", "moved-vae")
    assert torch.equal(images("after"), images("before"))
    capsys.readouterr()
    save_vae(tmp_path / "another", seed=1, scaling_factor=0.5, shift_factor=0.1)
    assert "are not those of the autoencoder" in mistake("sample", run.path, "--out", "x", "--autoencoder", "another")


@pytest.mark.parametrize("run", ["latents"], indirect=True)
def test_an_older_checkpoint_needs_its_data(run, mistake, capsys):
    capsys.readouterr()
    shutil.copytree(run.checkpoint_path(2) / "ema", "old")
    (Path("old") / "data.json").unlink()
    assert "is not a prepared data set" in mistake("sample", "old")
    shutil.copytree(run.checkpoint_path(2) / "ema", "damaged")
    (Path("damaged") / "data.json").write_text(json.dumps({"autoencoder": "x"}))
    assert "data.json is damaged" in mistake("sample", "damaged")
