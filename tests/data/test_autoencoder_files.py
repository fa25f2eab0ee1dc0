"""Autoencoders in LDM's layout: VA-VAE's and REPA-E's files, read, written and converted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL
from pictures import save_vae
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, interpolate, pad, silu
from torch.testing import assert_close

from dic_repa.data.autoencoders import load_autoencoder, load_spec, write_ldm
from dic_repa.errors import UserError

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FOREIGN = {
    "loss.discriminator.main.0.weight": torch.zeros(2),
    "loss.logvar": torch.zeros(()),
    "foundation_model.model.cls_token": torch.zeros(1, 1, 4),
    "linear_proj.weight": torch.zeros(4, 4, 1, 1),
}


class Resnet(nn.Module):
    """LDM's block, by the names of its tensors."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, channels, eps=1e-6), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, out, eps=1e-6), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all places, with a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5, dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


def level(blocks: list[nn.Module], attention: bool, channels: int, **resize: nn.Module) -> nn.Module:
    made = nn.Module()
    made.block = nn.ModuleList(blocks)
    made.attn = nn.ModuleList(Attention(channels) for _ in blocks if attention)
    for name, conv in resize.items():
        module = nn.Module()
        module.conv = conv
        setattr(made, name, module)
    return made


def run_level(made: nn.Module, x: Tensor) -> Tensor:
    for k, block in enumerate(made.block):
        x = block(x)
        x = made.attn[k](x) if len(made.attn) else x
    return x


class LDM(nn.Module):
    """An autoencoder of two levels, the coarser with attention, as the paper's code runs it."""

    def __init__(self, widths=(32, 64), z: int = 4):
        super().__init__()
        fine, coarse = widths
        self.encoder, self.decoder = nn.Module(), nn.Module()
        encoder, decoder = self.encoder, self.decoder
        encoder.conv_in, decoder.conv_in = nn.Conv2d(3, fine, 3, padding=1), nn.Conv2d(z, coarse, 3, padding=1)
        encoder.down = nn.ModuleList([
            level([Resnet(fine, fine)], False, fine, downsample=nn.Conv2d(fine, fine, 3, 2)),
            level([Resnet(fine, coarse)], True, coarse),
        ])  # fmt: skip
        decoder.up = nn.ModuleList([
            level([Resnet(coarse, fine), Resnet(fine, fine)], False, fine),
            level([Resnet(coarse, coarse)] * 1 + [Resnet(coarse, coarse)], True, coarse,
                  upsample=nn.Conv2d(coarse, coarse, 3, padding=1)),
        ])  # fmt: skip
        for side, out in ((encoder, 2 * z), (decoder, 3)):
            side.mid = nn.Module()
            side.mid.block_1, side.mid.attn_1, side.mid.block_2 = (
                Resnet(coarse, coarse), Attention(coarse), Resnet(coarse, coarse),
            )  # fmt: skip
            last = coarse if side is encoder else fine
            side.norm_out, side.conv_out = nn.GroupNorm(32, last, eps=1e-6), nn.Conv2d(last, out, 3, padding=1)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    def encode(self, x: Tensor) -> Tensor:
        h = run_level(self.encoder.down[0], self.encoder.conv_in(x))
        h = self.encoder.down[0].downsample.conv(pad(h, (0, 1, 0, 1)))
        h = self.middle(self.encoder, run_level(self.encoder.down[1], h))
        return self.quant_conv(self.last(self.encoder, h))

    def decode(self, z: Tensor) -> Tensor:
        h = self.middle(self.decoder, self.decoder.conv_in(self.post_quant_conv(z)))
        h = interpolate(run_level(self.decoder.up[1], h), scale_factor=2.0)
        h = run_level(self.decoder.up[0], self.decoder.up[1].upsample.conv(h))
        return self.last(self.decoder, h)

    def middle(self, side: nn.Module, h: Tensor) -> Tensor:
        return side.mid.block_2(side.mid.attn_1(side.mid.block_1(h)))

    def last(self, side: nn.Module, h: Tensor) -> Tensor:
        norm, conv = side.norm_out, side.conv_out
        return conv2d(silu(group_norm(h, 32, norm.weight, norm.bias, 1e-6)), conv.weight, conv.bias, padding=1)


@pytest.fixture(scope="module")
def ldm():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LDM().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def file(ldm, tmp_path_factory):
    """A file as LightningDiT publishes one, with what training left in it."""
    path = tmp_path_factory.mktemp("ldm") / "vavae.pt"
    torch.save({"state_dict": ldm.state_dict() | FOREIGN}, path)
    return path


def test_outputs_are_those_of_ldm(ldm, file):
    autoencoder = load_autoencoder(str(file))
    spec = autoencoder.spec
    assert (spec.name, spec.channels, spec.downsample, spec.stochastic) == (str(file), 4, 2, True)
    assert (spec.shift, spec.scale) == ((0.0,) * 4, (1.0,) * 4)
    mean, logvar = ldm.encode(IMAGES * 2 - 1).chunk(2, dim=1)
    moments = torch.cat([mean, (0.5 * logvar.clamp(-30, 20)).exp()], dim=1)
    assert_close(autoencoder.encode(IMAGES), moments, atol=1e-5, rtol=1e-5)
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    assert_close(autoencoder.decode(z), (ldm.decode(z) / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "content"), [
    ("latents_stats.pt", {"mean": (0.0, 1, 2, 3), "std": (0.5, 2, 4, 1)}),
    ("vavae-latents-stats.pt", {"latents_bias": (0.0, 1, 2, 3), "latents_scale": (2, 0.5, 0.25, 1)}),
])  # fmt: skip
def test_statistics_beside_it_are_shift_and_scale(file, tmp_path, name, content):
    (tmp_path / "vavae.pt").symlink_to(file)
    torch.save({key: torch.tensor(values).view(1, 4, 1, 1) for key, values in content.items()}, tmp_path / name)
    spec = load_spec(f"{tmp_path}:vavae.pt")
    assert (spec.shift, spec.scale) == ((0, 1, 2, 3), (2, 0.5, 0.25, 1))


def test_a_file_on_the_hub(file, tmp_path, monkeypatch):
    """Its name is OWNER/NAME:FILE; the statistics are fetched with it, whichever file they are in."""
    torch.save({"mean": torch.ones(1, 4, 1, 1), "std": torch.full((1, 4, 1, 1), 2.0)}, tmp_path / "latents_stats.pt")
    (tmp_path / "vavae.pt").symlink_to(file)

    def download(repository, name, subfolder, revision):
        if not (tmp_path / name).exists():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        assert (repository, subfolder) == ("owner/name", "weights")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    spec = load_autoencoder("owner/name:weights/vavae.pt").spec
    assert (spec.name, spec.shift, spec.scale) == ("owner/name:weights/vavae.pt", (1,) * 4, (0.5,) * 4)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("quant", [False, True])
def test_written_and_read_again_bit_for_bit(tmp_path, attention, quant):
    options = {
        "down_block_types": ("DownEncoderBlock2D", "Attn" * attention + "DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D",) * 2 + ("Attn" * attention + "UpDecoderBlock2D",),
        "block_out_channels": (32, 32, 64),
        "norm_num_groups": 32,
        "layers_per_block": 2,
    }
    quants = {"use_quant_conv": quant, "use_post_quant_conv": quant}
    save_vae(tmp_path / "vae", shift_factor=0.25, scaling_factor=0.5, **options, **quants)
    first = load_autoencoder(str(tmp_path / "vae"))
    write_ldm(first, tmp_path / "vae.safetensors")
    again = load_autoencoder(str(tmp_path / "vae.safetensors"))
    assert first.spec.same_weights(again.spec)  # the fingerprint, of all tensors, shift and scale
    assert set(first.model.state_dict()) == set(again.model.state_dict())
    assert torch.equal(first.encode(IMAGES), again.encode(IMAGES))


def test_convert_to_a_folder_of_diffusers_and_back(file, tmp_path, here, mistake):
    (tmp_path / "vavae.pt").symlink_to(file)
    torch.save({"mean": torch.ones(1, 4, 1, 1), "std": torch.full((1, 4, 1, 1), 0.3)}, tmp_path / "latents_stats.pt")
    assert "vae: AutoencoderKL with" in here("convert", tmp_path / "vavae.pt", tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    assert config["latents_mean"] == [1.0] * 4
    folder = load_autoencoder(str(tmp_path / "vae"))
    assert folder.spec.same_weights(load_autoencoder(str(tmp_path / "vavae.pt")).spec)
    assert AutoencoderKL.from_pretrained(tmp_path / "vae").config.scaling_factor == 1
    here("convert", tmp_path / "vae", tmp_path / "back.pt")
    written, original = torch.load(tmp_path / "back.pt"), torch.load(file)["state_dict"]
    assert set(written) == set(original) - set(FOREIGN)
    assert all(torch.equal(written[name], original[name]) for name in written)
    assert_close(torch.tensor(load_spec(str(tmp_path / "back.pt")).scale), torch.full((4,), 1 / 0.3))
    assert "takes --dtype and --overwrite alone" in mistake("convert", file, "x", "--recipe", "dic-xl-ddpm")


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("canary"),)


def test_mistakes_are_one_line(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = torch.load(file)["state_dict"]
    torch.save({name: t for name, t in tensors.items() if name != "decoder.mid.attn_1.k.weight"}, "missing.pt")
    torch.save(tensors | {"decoder.more.weight": torch.zeros(1)}, "left.pt")
    torch.save(tensors | {"quant_conv.bias": torch.zeros(3)}, "shape.pt")
    save_file({"x": torch.zeros(1)}, "other.safetensors")
    Path("cut.pt").write_bytes(file.read_bytes()[:5000])
    Path("evil.pt").write_bytes(pickle.dumps({"encoder.conv_in.weight": Evil()}, protocol=2))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/odd.pt").symlink_to(file)
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3)}, "odd/latents_stats.pt")
    for name, said in {
        "missing.pt": "1 missing: decoder.mid.attn_1.k.weight",
        "left.pt": "1 left over: decoder.more.weight",
        "shape.pt": "1 of another shape: quant_conv.bias",
        "other.safetensors": "no autoencoder in LDM's layout.*diffusers is named by its folder",
        "cut.pt": "cut.pt cannot be read as a file of plain tensors",
        "evil.pt": "evil.pt cannot be read as a file of plain tensors",
        "odd/odd.pt": "odd.pt holds no autoencoder.*channels",
        "nowhere.pt": "no weights at 'nowhere.pt'",
    }.items():
        with pytest.raises(UserError, match=said) as error:
            load_autoencoder(name)
        assert "\n" not in str(error.value)
    assert not Path("canary").exists()
