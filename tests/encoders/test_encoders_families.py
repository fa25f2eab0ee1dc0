"""The table of encoders: its facts against timm's, and the tokens of each family against a direct timm computation."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from dic_repa.encoders import create_encoder
from dic_repa.encoders.families import FAMILIES
from dic_repa.errors import UserError

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# name, timm's architecture, normalisation, size that 256 px are resized to, whether the final norm is applied
PREPROCESSING = [
    ("dinov2-vit-b", "vit_base_patch14_dinov2", IMAGENET, 224, True),
    ("dinov2reg-vit-b", "vit_base_patch14_reg4_dinov2", IMAGENET, 224, True),
    ("dinov3-vit-b", "vit_base_patch16_dinov3", IMAGENET, 256, True),
    ("dino-vit-b", "vit_base_patch16_224", IMAGENET, 256, True),
    ("clip-vit-l", "vit_large_patch14_clip_quickgelu_224", CLIP, 224, False),
    ("siglip2-vit-b", "vit_base_patch16_siglip_256", HALF, 256, True),
    ("mae-vit-l", "vit_large_patch16_224", IMAGENET, 256, False),
    ("mocov3-vit-b", "vit_base_patch16_224", IMAGENET, 256, True),
    ("ijepa-vit-h", "vit_huge_patch14_gap_224", IMAGENET, 224, True),
    ("pe-core-l", "vit_pe_core_large_patch14_336", HALF, 224, True),
    ("pe-spatial-b", "vit_pe_spatial_base_patch16_512", HALF, 256, True),
]


def build(model, **options):
    torch.manual_seed(0)
    return timm.create_model(model, num_classes=0, dynamic_img_size=True, **options).eval()


def direct(model, images, norm):
    """The patch tokens by timm's own functions, without what the encoder is made of."""
    if norm:
        return model.forward_features(images)[:, model.num_prefix_tokens :]
    hidden = model.patch_embed(images)
    hidden = model.norm_pre(model._pos_embed(hidden))
    for block in model.blocks:
        hidden = block(hidden)
    return hidden[:, model.num_prefix_tokens :]


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize(("name", "architecture", "statistics", "resized", "norm"), PREPROCESSING)
def test_tokens_equal_a_direct_timm_computation(name, architecture, statistics, resized, norm, size, tmp_path):
    model = build(architecture, **SMALL)
    with torch.no_grad():  # initial norms are the identity, which would hide whether they are applied
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    encoder = create_encoder(name, weights=tmp_path / "weights.pth", **SMALL)

    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    side = resized * size // 256
    inputs = (images - mean) / std
    inputs = inputs if side == size else F.interpolate(inputs, (side, side), mode="bicubic")
    with torch.no_grad():
        expected = direct(model, inputs, norm)
    assert encoder.token_grid((size, size)) == (size // 16, size // 16)
    assert encoder(images).shape == (1, (size // 16) ** 2, 48)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_says_what_timm_builds(name):
    family = FAMILIES[name]
    with torch.device("meta"):
        model = build(family.model, **family.model_args)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert (model.embed_dim, model.patch_embed.patch_size[0]) == (family.width, family.patch)
    assert parameters == pytest.approx(family.parameters, abs=0.06)
    config = timm.get_pretrained_cfg(family.model)
    if family.in_timm:
        assert family.source in (f"hub:{config.hf_hub_id}", config.url)
        assert family.statistics == (config.mean, config.std)


def test_weights_in_moco_v3s_layout(tmp_path):
    options = SMALL | {"depth": 15}
    model = build("vit_small_patch16_224", **options)
    state = {f"module.base_encoder.{key}": value for key, value in model.state_dict().items()}
    for right, wrong in [("13.norm1.", "13.norm13."), ("14.mlp.fc2.", "14.mlp.fc14.")]:  # as RCG's ViT-L has them
        state = {key.replace(f"blocks.{right}", f"blocks.{wrong}"): value for key, value in state.items()}
    state["module.base_encoder.head.0.weight"] = torch.zeros(3, 3)
    state["module.momentum_encoder.cls_token"] = state["module.predictor.0.weight"] = torch.zeros(1)
    torch.save({"epoch": 300, "state_dict": state}, tmp_path / "moco.pth.tar")
    encoder = create_encoder("mocov3-vit-s", weights=tmp_path / "moco.pth.tar", **options)
    assert {key: value.sum() for key, value in encoder.model.state_dict().items()} == {
        key: value.sum() for key, value in model.state_dict().items()
    }


def test_weights_in_ijepas_layout(tmp_path):
    model = build("vit_huge_patch14_gap_224", **SMALL)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "ijepa.pth.tar")
    encoder = create_encoder("ijepa-vit-h", weights=tmp_path / "ijepa.pth.tar", **SMALL)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in encoder.model.state_dict().items())


def test_mocos_small_vit_has_twelve_heads():
    assert create_encoder("mocov3-vit-s", pretrained=False, depth=1).model.blocks[0].attn.num_heads == 12


def test_weights_that_timm_does_not_have_are_asked_for():
    with pytest.raises(UserError, match=r"fetch them from https://.*vit-b-300ep\.pth\.tar and give --weights FILE"):
        create_encoder("mocov3-vit-b")
    with pytest.raises(UserError, match=r"'dinov2-vit-x'; did you mean dinov2-vit"):
        create_encoder("dinov2-vit-x")


def test_an_unreachable_hub_names_repository_and_file(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"model\.safetensors of 'timm/vit_small_patch14_dinov2\.lvd142m'.*--weights FILE"
    ):
        create_encoder("dinov2-vit-s")


class OpenAIBlock(nn.Module):
    """A block of CLIP with OpenAI's names: torch's attention, and the quick GELU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


def test_clip_in_openais_layout_gives_the_tokens_that_repa_takes(tmp_path):
    width, heads, depth, patch, grid = 48, 3, 2, 14, 16
    torch.manual_seed(0)
    blocks = nn.ModuleList(OpenAIBlock(width, heads) for _ in range(depth))
    conv, norm = nn.Conv2d(3, width, patch, stride=patch, bias=False), nn.LayerNorm(width)
    nn.init.normal_(norm.weight, mean=1, std=0.2)
    class_embedding, positions = torch.randn(width), torch.randn(grid * grid + 1, width) * 0.1
    state = {f"visual.transformer.resblocks.{key}": value for key, value in blocks.state_dict().items()}
    state |= {"visual.conv1.weight": conv.weight, "visual.class_embedding": class_embedding}
    state |= {"visual.positional_embedding": positions, "visual.proj": torch.randn(width, 8)}
    state |= {f"visual.ln_pre.{key}": value for key, value in norm.state_dict().items()}
    state |= {f"visual.ln_post.{key}": value + 5 for key, value in norm.state_dict().items()}
    state |= {"text_projection": torch.zeros(4, 4), "logit_scale": torch.zeros(())}  # of the other half
    torch.save({key: value.detach() for key, value in state.items()}, tmp_path / "clip.pt")
    encoder = create_encoder("clip-vit-l", weights=tmp_path / "clip.pt", **SMALL)

    images = torch.rand(2, 3, 256, 256)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CLIP)
    inputs = (F.interpolate(images, 224, mode="bicubic") - mean) / std
    with torch.no_grad():
        hidden = conv(inputs).flatten(2).mT
        hidden = norm(torch.cat([class_embedding.expand(2, 1, -1), hidden], dim=1) + positions)
        for block in blocks:
            hidden = block(hidden)
    torch.testing.assert_close(encoder(images), hidden[:, 1:], rtol=1e-4, atol=1e-4)


def test_an_unreachable_server_names_the_file(monkeypatch):
    def fail(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", fail)
    with pytest.raises(UserError, match=r"fetch https://.*IN1K-vit\.h\.14-300e\.pth\.tar, .*--weights FILE"):
        create_encoder("ijepa-vit-h", **SMALL)
