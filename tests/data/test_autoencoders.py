"""Autoencoders of diffusers by class and place, and published ones by name: tiny ones with random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from pictures import save_vae, write_tree
from safetensors.torch import save_file
from tiny_autoencoders import save_kind
from torch.testing import assert_close

from dic_repa.data.autoencoders import autoencoder_card, list_autoencoders, load_autoencoder, load_spec
from dic_repa.data.autoencoders import diffusers_models as models
from dic_repa.data.autoencoders.load import _loaded, is_from_hub
from dic_repa.data.autoencoders.published import PUBLISHED
from dic_repa.errors import UserError
from dic_repa.publish.paths import without_paths
from dic_repa.trust import names_code

MEAN, STD = [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.5, 1.0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind, by name."""
    folder = tmp_path_factory.mktemp("autoencoders")
    save_vae(folder / "kl")
    save_vae(folder / "shifted", scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    save_vae(folder / "per-channel", scaling_factor=0.5, latents_mean=MEAN, latents_std=STD)
    for name, kind in {"flux2": "AutoencoderKLFlux2", "dc": "AutoencoderDC"}.items():
        save_kind(folder / name, kind)
    if find_spec("transformers"):
        save_kind(folder / "rae", "AutoencoderRAE")
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "vae").symlink_to(folder / "kl")
    return folder


@pytest.fixture
def open_as(folders):
    def opened(name: str):
        if not (folders / name).is_dir():
            pytest.skip("this diffusers does not have it")
        return load_autoencoder(str(folders / name))

    return opened


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def decoded(model, z: torch.Tensor) -> torch.Tensor:
    return (model.decode(z).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("name", "shift", "scale"), [
    ("kl", [0.0] * 4, [0.18215] * 4),
    ("shifted", [0.06] * 4, [1.5] * 4),
    ("per-channel", MEAN, [0.5 / std for std in STD]),
])  # fmt: skip
@torch.no_grad()
def test_kl(folders, open_as, name, shift, scale):
    """As the pipelines of diffusers scale latents: (z - shift) * factor, or (z - mean) / std * factor."""
    autoencoder, model = open_as(name), AutoencoderKL.from_pretrained(folders / name)
    posterior = model.encode(IMAGES * 2 - 1).latent_dist
    assert_close(autoencoder.encode(IMAGES), torch.cat([posterior.mean, posterior.std], 1), atol=1e-6, rtol=0)
    spec = autoencoder.spec
    assert (spec.channels, spec.downsample, spec.stochastic) == (4, 2, True)
    assert_close(torch.tensor([spec.shift, spec.scale]), torch.tensor([shift, scale]))
    x, columns = noise(2, 4, 4, 4), (torch.tensor(scale).view(-1, 1, 1), torch.tensor(shift).view(-1, 1, 1))
    assert_close(autoencoder.decode(x), decoded(model, x / columns[0] + columns[1]), atol=1e-6, rtol=0)
    assert replace(spec, fingerprint="") == load_spec(str(folders / name))


@torch.no_grad()
def test_flux2(folders, open_as):
    """FLUX.2's pipeline: 2x2 latents packed with the channel slowest, then the batch norm with running statistics."""
    autoencoder = open_as("flux2")
    model = diffusers.AutoencoderKLFlux2.from_pretrained(folders / "flux2")
    posterior = model.encode(IMAGES * 2 - 1).latent_dist
    packed = [rearrange(each, "b c (h y) (w x) -> b (c y x) h w", y=2, x=2) for each in (posterior.mean, posterior.std)]
    moments = autoencoder.encode(IMAGES)
    assert_close(moments, torch.cat(packed, dim=1), atol=1e-6, rtol=0)
    spec = autoencoder.spec
    assert (spec.channels, spec.downsample, spec.stochastic) == (16, 4, True)
    assert_close(spec.normalise(spec.mean(moments)), model.bn.eval()(packed[0]), atol=1e-5, rtol=1e-5)
    x = noise(2, 16, 2, 2)
    z = x * (model.bn.running_var + 1e-4).sqrt().view(-1, 1, 1) + model.bn.running_mean.view(-1, 1, 1)
    z = rearrange(z, "b (c y x) h w -> b c (h y) (w x)", y=2, x=2)
    assert_close(autoencoder.decode(x), decoded(model, z), atol=1e-5, rtol=0)
    assert load_spec(str(folders / "flux2")) == replace(spec, fingerprint="")


@torch.no_grad()
def test_dc(folders, open_as):
    """As SANA's pipeline: latents times the factor, no posterior."""
    autoencoder = open_as("dc")
    model = diffusers.AutoencoderDC.from_pretrained(folders / "dc")
    latents, spec = autoencoder.encode(IMAGES), autoencoder.spec
    assert_close(latents, model.encode(IMAGES * 2 - 1).latent, atol=1e-6, rtol=0)
    assert (spec.channels, spec.downsample, spec.stochastic, spec.moments) == (4, 4, False, 4)
    assert_close(spec.normalise(latents), latents * 0.4)
    assert_close(autoencoder.decode(latents * 0.4), decoded(model, latents), atol=1e-6, rtol=0)


@torch.no_grad()
def test_rae(folders, open_as, monkeypatch, mistake, tmp_path):
    autoencoder = open_as("rae")
    model = diffusers.AutoencoderRAE.from_pretrained(folders / "rae")
    latents, spec = autoencoder.encode(IMAGES), autoencoder.spec
    assert_close(latents, model.encode(IMAGES).latent, atol=1e-6, rtol=0)
    assert (spec.channels, spec.downsample, spec.stochastic) == (64, 4, False)
    assert_close(spec.normalise(latents), latents)
    assert_close(autoencoder.decode(latents), model.decode(latents).sample.clamp(0, 1), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=r"takes images of 8x8, not 16x16; prepare them with --size 8"):
        autoencoder.encode(torch.rand(1, 3, 16, 16))
    with pytest.raises(UserError, match=r"latents of 2x2, not 4x4"):
        autoencoder.decode(noise(1, 64, 4, 4))
    write_tree(tmp_path / "tree", {"cat": 1})
    said = mistake("prepare", "tree", "out", "--size=16", f"--autoencoder={folders / 'rae'}")
    assert "takes images of 8x8 alone; take --size 8" in said
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package transformers.*pip install transformers$"):
        load_spec(str(folders / "rae"))


def test_a_config_that_leaves_the_factor_out_means_that_of_the_class(folders, tmp_path):
    """Stable Diffusion's own autoencoders have such a config."""
    config = json.loads((folders / "kl/config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_spec(str(tmp_path)).scale == (AutoencoderKL().config.scaling_factor,) * 4


def test_names_of_a_class_and_a_place(folders, monkeypatch):
    monkeypatch.chdir(folders)
    for name, full in {
        "kl": f"{folders}/kl",
        "diffusers:AutoencoderKL:kl": f"diffusers:AutoencoderKL:{folders}/kl",
        "diffusers:AutoencoderKL:pipeline:vae": f"diffusers:AutoencoderKL:{folders}/pipeline:vae",
        "pipeline:vae": f"{folders}/pipeline:vae",
    }.items():
        _loaded.cache_clear()
        assert load_autoencoder(name).spec.name == load_spec(name).name == full
        assert load_autoencoder(name).spec.same_weights(load_autoencoder(full).spec)
    name = "diffusers:AutoencoderKL:/home/someone/vae"
    assert without_paths(name) == "diffusers:AutoencoderKL:vae"
    assert is_from_hub("diffusers:AutoencoderDC:org/name")
    assert not is_from_hub(name)
    assert not names_code({"data": {"autoencoder": "diffusers:AutoencoderKL"}})
    assert names_code({"data": {"autoencoder": "timm:create"}, "tracker": {"name": "diffusers:AutoencoderKL"}})


@pytest.mark.parametrize(("name", "said"), [
    ("diffusers:AutoencoderKL", "does not say where the weights are; .* such as diffusers:AutoencoderKL:FOLDER"),
    ("diffusers:AutoencoderTiny:kl", "AutoencoderTiny' is none of .* AutoencoderKL, AutoencoderKLFlux2, AutoencoderDC"),
    ("diffusers:AutoencoderDC:kl", "kl holds diffusers' AutoencoderKL, not its AutoencoderDC; name it as|has no "),
    ("diffusers:AutoencoderNew:kl", r"has no AutoencoderNew; it came with 0.37: pip install 'diffusers>=0.37'"),
    ("sd-vae-ft-emma", "there is no autoencoder 'sd-vae-ft-emma'.*did you mean sd-vae-ft-ema or "),
    ("./nowhere", "there is no autoencoder './nowhere': name a local folder or a hub id$"),
    ("without weights", "holds no autoencoder: it takes config.json and diffusion_pytorch_model.safetensors"),
    ("without a decoder", r"its weights lack \d+ tensors, such as decoder.conv_in.bias|Cannot load"),
    ("odd statistics", "holds no autoencoder: .*channels"),
    ("odd class", "'3' is none of the autoencoders"),
])  # fmt: skip
def test_mistakes_are_one_line(folders, tmp_path, monkeypatch, name, said):
    monkeypatch.setitem(models.KINDS, "AutoencoderNew", models.RAEAutoencoder)
    for made, change in {
        "kl": {}, "without weights": {}, "without a decoder": {}, "odd statistics": {"latents_mean": [0.0] * 3,
        "latents_std": [1.0] * 3}, "odd class": {"_class_name": [3]},
    }.items():  # fmt: skip
        (tmp_path / made).mkdir()
        config = json.loads((folders / "kl/config.json").read_text()) | change
        config["_class_name"] = 3 if made == "odd class" else "AutoencoderKL"
        (tmp_path / made / "config.json").write_text(json.dumps(config))
    weights = {"encoder.conv_in.bias": torch.zeros(8)}
    save_file(weights, tmp_path / "without a decoder/diffusion_pytorch_model.safetensors", {"format": "pt"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        load_autoencoder(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ones_without_a_network(name, monkeypatch, tmp_path):
    """Channels and factor are known; to build one, a line says what to fetch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    spec, card = load_spec(name), autoencoder_card(name)
    assert (spec.name, spec.channels, spec.downsample) == (name, card.channels, card.downsample)
    assert name in list_autoencoders()
    assert 0.1 < spec.scale[0] < 2
    assert card.licence
    place = card.source.partition(":")[0]
    if not hasattr(diffusers, card.kind):
        return
    with pytest.raises(UserError, match=rf"^{name}: .*{place}.*; download .*https://huggingface.co/{place}/tree/main"):
        load_autoencoder(name)


def test_a_published_one_from_its_files(folders, open_as, monkeypatch):
    """As from the hub: the table's factor counts, whatever the config says; its name stays. A folder of that name in
    the current one is taken as a folder."""
    open_as("dc")
    row = PUBLISHED["dc-ae-f32c32"]
    monkeypatch.setitem(PUBLISHED, "dc-ae-f32c32", replace(row, source=str(folders / "dc"), channels=4, downsample=4))
    _loaded.cache_clear()
    spec = load_autoencoder("dc-ae-f32c32").spec
    assert (spec.scale, spec.name) == ((0.3189,) * 4, "dc-ae-f32c32")
    assert replace(spec, fingerprint="") == load_spec("dc-ae-f32c32")
    monkeypatch.chdir(folders)
    (folders / "sdxl-vae").symlink_to(folders / "kl")
    assert load_spec("sdxl-vae").name == str(folders / "kl")
    _loaded.cache_clear()
