"""fd-encoder and its like: own pictures scored by the run's own encoder, without network, and said to be no FID."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from click.testing import CliRunner
from pictures import save_vae, write_tree
from PIL import Image

from dic_repa.cli import cli
from dic_repa.data.prepared import Prepared
from dic_repa.encoders import create_encoder
from dic_repa.errors import UserError

PLUGIN = '''
import torch
from torch import nn
from dic_repa.encoders import register_encoder

@register_encoder("colours")
class Colours(nn.Module):
    """8x8 patches to 6 numbers, by random weights."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.embed_dim = 6
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.project = nn.Conv2d(3, 6, 8, stride=8)

    def token_grid(self, size):
        return size[0] // 8, size[1] // 8

    def forward(self, images):
        return self.project(images).tanh().flatten(2).mT
'''
RECIPE = """
plugins: [colours]
model: {name: DiC, width: 8, depths: [1, 1, 1, 1, 1], time_scale: 1000}
data: {name: prepared, path: data, size: 16}
alignments: [{encoder: colours, encoder_options: {seed: 3}, tap: mid.0, head_options: {hidden: 8}}]
train: {steps: 2, batch_size: 4, log_every: 1, sample_every: 0}
optimizer: {learning_rate: 1.0e-3}
sample: {solver: heun, steps: 2, num: 12}
"""


def call(*arguments, fails: bool = False) -> str:
    """What `dic-repa` prints, or the error where it `fails`."""
    result = CliRunner().invoke(cli, ["--trust-code", *map(str, arguments)])
    assert isinstance(result.exception, UserError) == fails, result.output + repr(result.exception)
    assert fails or result.exit_code == 0, result.output
    return str(result.exception) if fails else result.output


@pytest.fixture
def mine(plugin_folder, monkeypatch) -> Path:
    """The current folder: pictures that were prepared as latents, an encoder of one's own, a recipe for both."""
    monkeypatch.setenv("DIC_REPA_STATISTICS", str(plugin_folder / "statistics"))
    (plugin_folder / "colours.py").write_text(PLUGIN)
    (plugin_folder / "mine.yaml").write_text(RECIPE)
    write_tree(plugin_folder, {"photos": 10})
    save_vae(plugin_folder / "mine-vae")
    call("prepare", "photos", "data", "--size=32", "--autoencoder=mine-vae")
    return plugin_folder


@torch.no_grad()
def pooled(images: np.ndarray, **options) -> np.ndarray:
    """The mean tokens of images (N, H, W, 3)."""
    encoder = create_encoder("colours", **options)
    return encoder(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).mean(dim=1).double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root))


def test_a_run_is_measured_by_its_own_encoder(mine):
    call("train", "mine.yaml")
    said = call("evaluate", "runs/mine", "--reference=data", "--metrics=fd-encoder,prec-encoder,recall-encoder")
    assert "FD-encoder" in said
    assert "are no FID" in said
    assert "judged by its own teacher" in said
    (file,) = Path("runs/mine/evaluation").rglob("metrics.json")
    record = json.loads(file.read_text())
    samples = np.stack([np.asarray(Image.open(f)) for f in sorted(file.parent.glob("0*.png"))])
    real = np.stack([sample["image"].permute(1, 2, 0).numpy() for sample in Prepared("data", size=16)])
    assert (len(samples), len(real)) == (12, 10)
    assert record["metrics"]["fd-encoder"] == pytest.approx(
        frechet(pooled(samples, seed=3), pooled(real, seed=3)), rel=1e-4
    )
    assert all(0 <= record["metrics"][name] <= 1 for name in ("prec-encoder", "recall-encoder"))
    described = record["extractors"]["encoder"]
    assert (described["encoder"], described["options"]) == ("colours", {"seed": 3})
    assert "no FID" in described["notes"][0]

    folder = ["evaluate", file.parent, "--reference=data", "--metrics=fd-encoder"]
    assert "name one with --encoder" in call(*folder, fails=True)
    call(*folder, "--encoder=colours", "--encoder-option=seed=3", "--out=same.json")
    call(*folder, "--encoder=colours", "--out=other.json")
    same, other = (json.loads(Path(f"{name}.json").read_text()) for name in ("same", "other"))
    assert same["metrics"]["fd-encoder"] == record["metrics"]["fd-encoder"]
    assert other["metrics"]["fd-encoder"] == pytest.approx(frechet(pooled(samples), pooled(real)), rel=1e-4)
    assert same["extractors"]["encoder"]["weights"] != other["extractors"]["encoder"]["weights"]
    assert "go with --encoder" in call(*folder, "--encoder-option=seed=3", fails=True)


def test_runs_of_one_encoder_are_compared_by_it(mine):
    call("train", "mine.yaml")
    call("train", "mine.yaml", "--set=alignments=[]", "--out=runs/without")
    call("train", "mine.yaml", "--set=alignments.0.encoder_options={}", "--out=runs/other")
    command = ["evaluate", "--reference=data", "--metrics=fd-encoder", "runs/without"]
    assert call(*command, "runs/mine").count("runs/") >= 2
    assert "aligned to another encoder" in call(*command, "runs/mine", "runs/other", fails=True)
    assert "name one with --encoder" in call(*command, fails=True)


def test_a_recipe_may_name_it(mine):
    judge = ["--set=evaluate={metric: fd-encoder, also: [recall-encoder], reference: data, every: 1, num: 8}"]
    said = call("train", "mine.yaml", *judge)
    assert "FD-encoder" in said
    assert "note: scores by the tokens of colours are no FID" in said
    steps = {json.loads(file.read_text())["step"] for file in Path("runs/mine/evaluation").glob("*.json")}
    assert steps == {1, 2}
    error = call("train", "mine.yaml", *judge, "--set=alignments=[]", "--out=runs/without", fails=True)
    assert "fd-encoder, recall-encoder needs the encoder of an alignment, and the recipe has none" in error
    assert not Path("runs/without").exists()


def test_the_metrics_are_listed_and_explained():
    assert "encoder.pooled" in call("evaluate", "--list-metrics")
    assert "They are no FID" in " ".join(call("evaluate", "--help").split())
