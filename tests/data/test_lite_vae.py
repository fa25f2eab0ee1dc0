"""`lite-vae`, the autoencoder in the package: how well it gives pictures back, its training, and the whole path of a
latent model without a network."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY
from PIL import Image

from dic_repa.data import Digits, Emoji
from dic_repa.data import digits as digits_module
from dic_repa.data.autoencoders import load_autoencoder, load_spec
from dic_repa.data.latents import denoiser_data
from dic_repa.data.sources import open_source
from dic_repa.errors import UserError
from dic_repa.training import train_autoencoder

FOLDER = Path(digits_module.__file__).parent / "assets/lite-vae"


@pytest.fixture(scope="module")
def pictures():
    """Held-out digits and emoji, (60, 3, 32, 32) in [0, 1] each."""
    digits = Digits("held-out", size=8, autoencoder="lite-vae")
    emoji = Emoji("held-out", size=8, autoencoder="lite-vae")
    return {
        name: torch.stack([data[k]["image"] for k in range(60)]).float() / scale
        for name, data, scale in (("digits", digits, 1), ("emoji", emoji, 255))
    }


@pytest.fixture(scope="module")
def vae():
    return load_autoencoder("lite-vae")


def moments(vae, images):
    return torch.cat([vae.encode(part) for part in images.split(30)])


@pytest.mark.parametrize(("name", "bound"), [("digits", 33), ("emoji", 26)])
def test_held_out_pictures_come_back(vae, pictures, name, bound):
    images = pictures[name]
    mean, _ = moments(vae, images).chunk(2, dim=1)
    assert mean.shape == (60, 4, 8, 8)
    decoded = torch.cat([vae.decode(part) for part in vae.spec.normalise(mean).split(30)])
    psnr = 10 * torch.log10(1 / (images - decoded).square().mean(dim=(1, 2, 3)))
    assert psnr.mean() > bound


def test_the_denoisers_data_is_of_unit_spread(vae, pictures):
    x = torch.cat([vae.spec.normalise(moments(vae, images).chunk(2, dim=1)[0]) for images in pictures.values()])
    assert x.std().item() == pytest.approx(1, abs=0.1)


@torch.no_grad()
def test_it_is_diffusers_own_and_takes_other_sizes(vae):
    from diffusers import AutoencoderKL

    peer = AutoencoderKL.from_pretrained(FOLDER)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    posterior = peer.encode(images * 2 - 1).latent_dist
    found = vae.encode(images)
    assert found.shape == (2, 8, 16, 16)
    torch.testing.assert_close(found, torch.cat([posterior.mean, posterior.std], dim=1))
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = peer.decode(x / peer.config.scaling_factor).sample.clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(vae.decode(x), expected, atol=1e-5, rtol=1e-4)


def test_its_name_is_no_place_of_this_machine_and_its_files_are_small():
    spec = load_spec("lite-vae")
    assert (spec.name, spec.channels, spec.downsample) == ("lite-vae", 4, 4)
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 3e6


def test_data_sets_of_the_package_are_encoded_in_the_step(vae):
    for data in (Digits(size=8, autoencoder="lite-vae"), Emoji(size=8, autoencoder="lite-vae", flip=True)):
        batch = {"image": torch.stack([data[k]["image"] for k in (0, 7)])}
        assert (data.channels, batch["image"].shape[1:]) == (4, (3, 32, 32))
        x = denoiser_data(data, batch, torch.zeros_like)
        images = batch["image"].float() / (255 if isinstance(data, Emoji) else 1)
        torch.testing.assert_close(x, vae.encode(images)[:, :4] * vae.spec.scale[0])
    with pytest.raises(UserError, match=r"data.size is 32, but the emoji of the package have 32 px; set data.size=8,"):
        Emoji(size=32, autoencoder="lite-vae")


def test_sources_in_the_package():
    source = open_source("emoji:held-out")
    assert np.array_equal(np.asarray(source.load(5)), Emoji("held-out")[5]["image"].permute(1, 2, 0).numpy())
    assert source.labels == Emoji("held-out").labels
    digits = open_source("digits")
    assert (len(digits), digits.class_names, digits.labels[:3]) == (
        8000,
        Digits.class_names,
        Digits().labels[:3].tolist(),
    )
    assert open_source("digits:held-out", unlabelled=True).class_names == ()
    with pytest.raises(UserError, match="emoji has its own labels"):
        open_source("emoji", labels="labels.csv")
    with pytest.raises(UserError, match="unknown split 'test'"):
        open_source("digits:test")


def test_the_script_trains_and_writes_what_diffusers_reads(tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    monkeypatch.setattr(train_autoencoder, "WIDTHS", (8, 8, 8))
    digits, emoji = train_autoencoder.rgb_digits("held-out")[:40], Emoji("held-out")
    torch.manual_seed(0)
    model = train_autoencoder.build_autoencoder()
    _, losses = train_autoencoder.fit(model, digits, emoji, 40, 4, 1e-2, perceptual=0.1, kl=1e-6, seed=0)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])

    monkeypatch.setattr(train_autoencoder, "rgb_digits", lambda split: digits)
    few = {split: Emoji("held-out") for split in ("train", "held-out")}
    for each in few.values():
        each.images = each.images[:40]
    monkeypatch.setattr(train_autoencoder, "Emoji", lambda split, **_: few[split])
    monkeypatch.setattr(Emoji, "__len__", lambda self: 40)
    out = tmp_path / "mine"
    arguments = ["--steps", "2", "--batch-size", "4", "--out", str(out)]
    result = CliRunner().invoke(train_autoencoder.main, arguments, catch_exceptions=False)
    assert "PSNR of held-out pictures: digits" in result.output
    written = AutoencoderKL.from_pretrained(out)
    assert load_autoencoder(str(out)).spec.scale == (written.config.scaling_factor,) * 4
    images = torch.cat([digits, few["train"].images / 255])
    with torch.no_grad():
        latents = written.encode(images * 2 - 1).latent_dist.mean
    assert latents.std().item() * written.config.scaling_factor == pytest.approx(1, rel=0.05)


def test_from_pictures_to_a_score_without_a_network(here, tmp_path, monkeypatch):
    few = {"train": slice(0, 60), "held-out": slice(8000, 8030)}
    monkeypatch.setattr(digits_module, "_SPLITS", few)
    monkeypatch.setenv("DIC_REPA_CACHE", str(tmp_path / "cache"))
    printed = here("prepare", "digits:train", "data", "--size=32", "--autoencoder=lite-vae", "--shard-size=50")
    assert "60 of 60 images, 10 classes" in printed
    assert json.loads((tmp_path / "data/prepare.json").read_text())["autoencoder"]["name"] == "lite-vae"
    assert len(datasets.load_from_disk("data")) == 60
    tiny = [*TINY, "--set=train.steps=2", "--set=evaluate=null", "--set=sample.num=4"]
    here("train", "digits-latent", "--out=run", *tiny, "--set=data={name: prepared, path: data, size: 8}")
    here("sample", "run", "--num=4", "--out=samples")
    assert Image.open("samples/000000.png").size == (32, 32)
    printed = here("evaluate", "samples", "--reference=data", "--metrics=fd-digits")
    assert "fd-digits" in printed.lower()


def test_the_recipe_trains_samples_and_is_judged(here, tmp_path):
    here("train", "digits-latent", "--out=run", *TINY, "--set=train.steps=2", "--set=evaluate=null")
    for file in ("recipe.yaml", *(path.relative_to(tmp_path) for path in tmp_path.rglob("data.json"))):
        text = (tmp_path / ("run" if file == "recipe.yaml" else "") / file).read_text()
        assert "lite-vae" in text
        assert str(FOLDER.parent) not in text
    printed = here("evaluate", "run", "--reference=digits", "--metrics=fd-digits", "--num=20")
    assert "FD-digits" in printed
