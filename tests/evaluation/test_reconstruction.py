"""`dic-repa autoencoders check`: the numbers are those that diffusers' own model and `dic_repa.evaluate` give."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from pictures import picture, save_vae, write_tree
from PIL import Image

from dic_repa import evaluate
from dic_repa.data.autoencoders import AutoencoderSpec, Pixels, autoencoders, load_autoencoder
from dic_repa.errors import UserError
from dic_repa.evaluation import reconstruction
from dic_repa.evaluation.reconstruction import check_autoencoder

COUNT, SIZE = 10, 32


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures of the size, and an autoencoder whose posterior has a deviation of 0.5."""
    folder = tmp_path_factory.mktemp("made")
    write_tree(folder / "tree", {"cat": COUNT}, (SIZE, SIZE))
    save_vae(folder / "vae", std=0.5)
    return folder


@pytest.fixture(scope="module")
def expected(made):
    """By diffusers: what comes back of the pictures, uint8, beside them, and the posterior's mean."""
    from diffusers import AutoencoderKL

    levels = torch.stack([torch.from_numpy(np.array(picture(k, (SIZE, SIZE)))).movedim(-1, 0) for k in range(COUNT)])
    vae = AutoencoderKL.from_pretrained(made / "vae")
    with torch.no_grad():
        mean = vae.encode(levels / 255 * 2 - 1).latent_dist.mean
        decoded = vae.decode(mean).sample.clamp(-1, 1) / 2 + 0.5
    return levels, (decoded * 255).round().to(torch.uint8), mean


@pytest.fixture(scope="module")
def found(made):
    return check_autoencoder(str(made / "vae"), made / "tree", SIZE, batch_size=4)


def test_the_numbers(found, expected):
    levels, decoded, _ = expected
    errors = ((levels.double() - decoded.double()) / 255).square().mean(dim=(1, 2, 3))
    assert found.psnr == pytest.approx(-10 * errors.log10().mean().item(), abs=0.01)
    assert found.count == COUNT
    assert 0 < found.ssim < 1
    assert found.lpips is None
    theirs = evaluate(decoded, levels, "fd-lite2", cache=False)
    assert found.scores == {"fd-lite2": pytest.approx(theirs["fd-lite2"], rel=1e-3)}
    assert any(note.startswith("no LPIPS without the weights of VGG16: fetch") for note in found.notes)
    assert any(note.startswith("no rFID without Inception's weights") for note in found.notes)
    assert any("are no FID" in note for note in found.notes)
    assert found.exact == 0


def test_the_latents(found, expected):
    """What the denoiser is trained on has the posterior's noise in it, and 0.18215 of the size."""
    mean, scale = expected[2].double(), 0.18215
    variance = mean.var(correction=0, dim=(0, 2, 3)) + 0.25
    assert found.latents.shape == (4, 16, 16)
    np.testing.assert_allclose(found.latents.channel_means, mean.mean(dim=(0, 2, 3)) * scale, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.latents.channel_stds, variance.sqrt() * scale, rtol=1e-4)
    whole = mean.var(correction=0) + 0.25
    assert found.latents.std == pytest.approx(whole.sqrt().item() * scale, rel=1e-4)
    assert found.latents.posterior_share == pytest.approx(0.25 / variance.mean().item(), rel=1e-4)
    assert any("look at the autoencoder's scaling factor" in note for note in found.notes)  # untrained, about 0.1


def test_the_picture(found, expected):
    levels, decoded, _ = expected
    same = torch.stack([levels, decoded])[:, [0, 1, 3, 5, 6, 8]].float()
    torch.testing.assert_close(found.shown * 255, same, rtol=0, atol=1.001)  # a value may be halfway between two levels
    sheet = np.array(found.picture())
    cell, gap = 160, 2  # 5 pixels for one
    last = sheet[-gap - cell : -gap, -gap - cell : -gap][2::5, 2::5].astype(int)
    image, returned = found.shown[:, -1]
    difference = (5 * 255 * (image - returned).abs()).clamp(max=255)
    np.testing.assert_allclose(last, difference.movedim(0, -1), atol=1)
    assert last.mean() > 20


def test_drawn_latents_do_not_depend_on_the_batch(made, found):
    drawn = [
        check_autoencoder(str(made / "vae"), made / "tree", SIZE, 3, sample=True, batch_size=size) for size in (2, 3)
    ]
    assert drawn[0].psnr == pytest.approx(drawn[1].psnr, abs=1e-3)
    assert drawn[0].latents.std == pytest.approx(drawn[1].latents.std)
    assert not torch.equal(drawn[0].shown[1, 0], found.shown[1, 0])


def test_fid_where_inceptions_weights_are_at_hand(made, tmp_path, monkeypatch):
    """In torch's hub folder, or named; the network itself takes long to build, and has its own tests."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    asked = []

    def measured(trips, metrics, options, _):
        asked.append((metrics, options))
        return {"fid": float(sum(map(len, trips)))}, []

    monkeypatch.setattr(reconstruction, "_measured", measured)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    check = partial(check_autoencoder, "none", made / "tree", SIZE, 2)
    check()
    check(inception_weights="mine.pth")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]).touch()
    found = check()
    assert asked == [(["fd-lite2"], {}), (["fid"], {"inception": {"weights": "mine.pth"}}), (["fid"], {})]
    assert "rFID" in repr(found)
    assert not any("no rFID" in note for note in found.notes)


def test_the_verb(made, here, tmp_path):
    arguments = ("autoencoders", "check", made / "vae", "--images", made / "tree", "--size", SIZE, "--num", 2)
    lines = here(*arguments, "--out", "vae.png").splitlines()
    assert lines[0].endswith(f"2 images from {made / 'tree'}")
    assert lines[1] == "from 3x32x32 pixels to latents of 4x16x16; decoded: the posterior's mean"
    assert lines[-1] == "picture: vae.png"
    assert {line.split()[0] for line in lines[3:]} >= {"PSNR", "SSIM", "FD-lite2", "latents'", "posterior's"}
    assert Image.open(tmp_path / "vae.png").width > 2 * 160
    record = json.loads(here(*arguments, "--out", "vae.png", "--json"))
    assert record["count"] == 2
    assert record["latents"]["shape"] == [4, 16, 16]


def test_no_autoencoder_gives_all_back(here):
    record = json.loads(here("autoencoders", "check", "none", "--size", 32, "--num", 2, "--json"))
    assert (record["images"], record["exact"], record["psnr"]) == ("emoji:held-out", 2, pytest.approx(120))
    assert record["ssim"] == pytest.approx(1)
    assert "2 of 2 images come back to the bit; each counts as 120 dB of PSNR" in record["notes"]


class Broken(Pixels):
    """Of a 16th of the pixels as it says, and then not."""

    spec = replace(Pixels.spec, name="broken", downsample=4)


class OutOfRange(Pixels):
    spec = replace(Pixels.spec, name="bright")
    decode = lambda self, x: x + 3  # noqa: E731


class Black(Pixels):
    """Without a posterior, and all that comes back is black."""

    spec = AutoencoderSpec("black", 3, 1, (0.5,) * 3, (2.0,) * 3, stochastic=False)
    encode = staticmethod(lambda images: images)
    decode = staticmethod(torch.zeros_like)


def test_what_breaks_the_protocol(made):
    shapes = (
        r"broken: encode gives \(2, 6, 32, 32\) for images \(2, 3, 32, 32\), not \(2, 6, 8, 8\); dic_repa.protocols"
    )
    with pytest.raises(UserError, match=shapes):
        check_autoencoder(Broken(), made / "tree", SIZE, 2)
    with pytest.raises(UserError, match=r"bright: decode gives values from .* to .*, not in \[0, 1\]"):
        check_autoencoder(OutOfRange(), made / "tree", SIZE, 2)
    with pytest.raises(UserError, match="black has no posterior to draw from"):
        check_autoencoder(Black(), made / "tree", SIZE, 2, sample=True)


def test_black_images_still_have_numbers(made):
    found = check_autoencoder(Black(), made / "tree", SIZE, 2)
    assert found.scores == {}
    assert "no FD-lite2: all 2 images are of a single colour each; look at what made them" in found.notes
    assert found.latents.posterior_share is None
    assert "decoded" not in repr(found)
    assert check_autoencoder(Black(), made / "tree", SIZE, 1).scores == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nane"], "there is no autoencoder 'nane': name a local folder or a hub id"),
        (["VAE", "--size", "33"], "33 px are not a multiple of 2, the reduction of"),
        (["VAE", "--size", "33"], "vae; take 32 or 34"),
        (["none", "--images", "absent"], "there is no folder, zip or tar absent"),
        (["none", "--images", "EMPTY"], "holds no images"),
        (["none", "--metrics", "fd-lite3"], "unknown metric 'fd-lite3'; did you mean fd-lite2"),
        (["none", "--lpips-weights", "absent.pth"], "no weights at 'absent.pth'"),
        (["none", "--out", "x.txt"], "x.txt is not a picture; end it in .png, .jpg, .webp"),
        (["none", "--size", "8"], "takes whole numbers from 16, not '8'"),
    ],
)
def test_mistakes(mistake, arguments, message, made, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    arguments = [str(made / "vae") if word == "VAE" else word for word in arguments]
    assert message in mistake("autoencoders", "check", *arguments, "--num", "2")


def test_the_list(plugin_folder, here):
    (plugin_folder / "my_codecs.py").write_text(
        "from dic_repa.data.autoencoders import AutoencoderCard, autoencoders\n"
        "card = AutoencoderCard(16, 128, 83.8, 'MIT', 'nobody/deep')\n"
        "@autoencoders.register('my-deep', card=card)\nclass Deep: ...\n"
        "@autoencoders.register('my-fourteenth', card=AutoencoderCard(8, 14, 1, 'MIT', 'nobody/odd'))\nclass Odd: ...\n"
        "@autoencoders.register('my-broken')\ndef broken(): return 1 / 0\n"
        "@autoencoders.register('mine:')\ndef family(name):\n    'Any of mine.'\n"
    )
    lines = here("autoencoders", "--plugin", "my_codecs").splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert lines[0].split() == "autoencoder channels factor 256 px 512 px params (M) licence source".split()
    assert rows["my-deep"] == ["16", "128", "16x2x2", "16x4x4", "83.8", "MIT", "nobody/deep"]
    assert rows["my-fourteenth"][2:4] == ["-", "-"]
    assert rows["none"][:4] == ["3", "1", "3x256x256", "3x512x512"]
    assert " ".join(rows["my-broken"]) == "cannot be built without options (division by zero)"
    assert rows["mine:"] == ["Any", "of", "mine"]


def test_the_list_in_a_process_of_its_own(dic_repa):
    lines = dic_repa("autoencoders").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == autoencoders.names()


def test_an_autoencoder_that_is_loaded(made, found):
    loaded = load_autoencoder(str(made / "vae"))
    assert check_autoencoder(loaded, made / "tree", SIZE, batch_size=4).psnr == pytest.approx(found.psnr, abs=1e-3)
