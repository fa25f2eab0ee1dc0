"""SiT, DiT and U-ViT against diffusers, the papers' equations and tables; denoisers by name; tokens as taps."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dic_repa.alignment import AlignedDenoiser, Alignment
from dic_repa.conditions import ClassLabels
from dic_repa.errors import UserError
from dic_repa.models import (
    create_denoiser,
    denoisers,
    list_denoisers,
    load_authors_checkpoint,
    load_denoiser,
)
from dic_repa.models.authors_sit import authors_heads, infer_config
from dic_repa.models.sit import position_embedding
from dic_repa.models.uvit import UViT
from dic_repa.objectives import DDPM
from dic_repa.recipe import list_recipes, load_recipe
from dic_repa.recipe.build import build_denoiser
from dic_repa.sampling.load import load
from dic_repa.training import train

WIDTH, DEPTH, HEADS, CLASSES = 32, 3, 2, 10


@pytest.fixture(scope="module")
def peer():
    """diffusers' DiT with random weights: 2x2 patches of 4x8x8, 8 channels out."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=DEPTH,
        sample_size=8,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,  # of the norm before the MLP; the one before the attention has it anyway
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    shared = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:  # in DiT one embedding serves all blocks
        block.norm1.emb.load_state_dict(shared.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # DiT's frequencies end before 1/10000, diffusers' on it
    return model


@pytest.fixture(scope="module")
def public(peer):
    """The same weights in the key layout of the public code of DiT, SiT and REPA."""
    theirs = peer.state_dict()
    embedding = "transformer_blocks.0.norm1.emb."
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": embedding + "timestep_embedder.linear_1",
        "t_embedder.mlp.2": embedding + "timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for i in range(DEPTH):
        block = f"transformer_blocks.{i}."
        names[f"blocks.{i}.adaLN_modulation.1"] = block + "norm1.linear"
        names[f"blocks.{i}.attn.proj"] = block + "attn1.to_out.0"
        names[f"blocks.{i}.mlp.fc1"] = block + "ff.net.0.proj"
        names[f"blocks.{i}.mlp.fc2"] = block + "ff.net.2"
    state = {f"{ours}.{kind}": theirs[f"{name}.{kind}"] for ours, name in names.items() for kind in ("weight", "bias")}
    for i in range(DEPTH):
        for kind in ("weight", "bias"):
            parts = [theirs[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] for part in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    state["y_embedder.embedding_table.weight"] = theirs[embedding + "class_embedder.embedding_table.weight"]
    state["pos_embed"] = theirs.get("pos_embed.pos_embed", peer.pos_embed.pos_embed)
    return state


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8), torch.tensor([0.05, 0.5, 1.0]), torch.tensor([0, 9, CLASSES])


def assert_close(value, expected):
    assert value.shape == expected.shape
    assert (value - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_dit_is_diffusers_dit(peer, public, inputs):
    x, _, y = inputs
    steps = torch.tensor([0.0, 417.0, 999.0])
    model = load_authors_checkpoint(public, family="DiT", num_heads=HEADS)
    assert model.config["learn_sigma"]
    expected = peer(x, steps, y).sample
    assert_close(model(x, steps, y), expected)
    # The samplers' noise model counts time in (0, 1].
    assert_close(DDPM().noise_model(model)(x, (steps + 1) / 1000, y), expected)


@torch.no_grad()
def test_sit_checkpoint_turns_time_and_velocity_round(peer, public, inputs, tmp_path):
    """Its code: data at 1, velocity towards the data, the second half of the output dropped."""
    x, t, y = inputs
    torch.save({"model": {}, "ema": public, "opt": {}}, tmp_path / "SiT-XL-2-256x256.pt")
    model = load_authors_checkpoint(tmp_path / "SiT-XL-2-256x256.pt", num_heads=HEADS)
    assert not model.config["learn_sigma"]
    assert_close(model(x, t, y), -peer(x, 1 - t, y).sample[:, :4])


@torch.no_grad()
def test_repa_checkpoint_with_its_heads(peer, public, inputs):
    x, t, y = inputs
    kept = torch.arange(32).view(4, 8)[:, :4].flatten()  # REPA learns no variance: of each pixel's 8 channels, 4
    final = {key: public[key][kept] for key in ("final_layer.linear.weight", "final_layer.linear.bias")}
    sizes = {"0": (6, WIDTH), "2": (6, 6), "4": (5, 6)}
    heads = {f"projectors.0.{i}.weight": torch.randn(size) for i, size in sizes.items()}
    heads |= {f"projectors.0.{i}.bias": torch.randn(size[0]) for i, size in sizes.items()}
    state = {**public, **final, **heads}
    model = load_authors_checkpoint(state, num_heads=HEADS)
    assert_close(model(x, t, y), peer(x, t, y).sample[:, :4])

    alignment = Alignment.build(model, "blocks.1", embed_dim=5, grid=(4, 4), size=(8, 8), hidden=6)
    (weights,) = authors_heads(state)
    alignment.head.load_state_dict(weights)
    hidden = []
    peer.transformer_blocks[1].register_forward_hook(lambda _m, _i, output: hidden.append(output))
    out = AlignedDenoiser(model, [alignment])(x, t, y)
    peer(x, t, y)
    h = hidden[0]  # REPA: the MLP on each of the 4x4 tokens, which are the encoder's already
    for i in ("0", "2", "4"):
        h = F.linear(h if i == "0" else F.silu(h), heads[f"projectors.0.{i}.weight"], heads[f"projectors.0.{i}.bias"])
    assert_close(out.projections[0], h)

    legacy = {key.replace("blocks.2.", "decoder_blocks.0."): value for key, value in state.items()}
    assert_close(load_authors_checkpoint(legacy, num_heads=HEADS)(x, t, y), out.prediction)


def test_checkpoints_that_cannot_be_told_or_are_others(public):
    with pytest.raises(UserError, match="say which of them it is, by family"):
        load_authors_checkpoint(public)
    with pytest.raises(UserError, match="did you mean DiT"):
        load_authors_checkpoint(public, family="Dit2")
    with pytest.raises(UserError, match="learnt position embeddings"):
        load_authors_checkpoint({**public, "pos_embed": torch.randn(1, 16, WIDTH)}, family="DiT")
    with pytest.raises(UserError, match=r"has no final_layer\.linear\.weight"):
        load_authors_checkpoint({k: v for k, v in public.items() if k != "final_layer.linear.weight"}, family="DiT")
    with pytest.raises(UserError, match=r"missing: blocks\.1\.attn\.qkv\.weight"):
        load_authors_checkpoint({k: v for k, v in public.items() if k != "blocks.1.attn.qkv.weight"}, family="DiT")


@pytest.mark.parametrize(("name", "shape"), [("DiT-XL/2", (1152, 28)), ("SiT-B/4", (768, 12)), ("SiT-S/8", (384, 12))])
def test_the_heads_of_a_published_size_are_its_presets(name, shape):
    """The tensors don't show the number of heads: 72 channels each in XL, 64 in the others."""
    with torch.device("meta"):
        model = create_denoiser(name)
        (width, depth), patch = shape, model.patch_size
        state = {f"blocks.{i}.attn.proj.bias": torch.empty(width) for i in range(depth)}
        state["x_embedder.proj.weight"] = torch.empty(width, 4, patch, patch)
        state["y_embedder.embedding_table.weight"] = torch.empty(1001, width)
        state["final_layer.linear.weight"] = torch.empty(model.out_channels * patch**2, width)
    assert {**infer_config(state), "time_scale": 1.0} == model.config


def test_positions_of_any_grid():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    square = get_2d_sincos_pos_embed(24, 6, base_size=6, output_type="pt").float().view(6, 6, 24)
    torch.testing.assert_close(position_embedding((4, 6), 24), square[:4].flatten(0, 1), rtol=0, atol=2e-6)


def plain_uvit(state: dict, heads: int, x, t, y):
    """U-ViT as its paper says: all inputs are tokens, long skips join by concatenation and a linear layer."""
    width = state["label.weight"].shape[1]

    def linear(name, h):
        return F.linear(h, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name, h):
        return F.layer_norm(h, (width,), state[f"{name}.weight"], state[f"{name}.bias"])

    def block(name, h, skip=None):
        if skip is not None:
            h = linear(f"{name}.skip", torch.cat([h, skip], dim=-1))
        q, k, v = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", h)).chunk(3, dim=-1)
        attended = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            weights = (q[..., part] @ k[..., part].mT / (width / heads) ** 0.5).softmax(dim=-1)
            attended.append(weights @ v[..., part])
        h = h + linear(f"{name}.attn.proj", torch.cat(attended, dim=-1))
        return h + linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", h))))

    angles = 1000 * t[:, None] * 10_000 ** (-torch.arange(width // 2) / (width // 2))
    tokens = [state["label.weight"][y], torch.cat([angles.cos(), angles.sin()], dim=1)]
    kernel, bias = state["patches.proj.weight"], state["patches.proj.bias"]
    for row in range(0, 8, 2):
        for column in range(0, 8, 2):
            patch = x[:, :, row : row + 2, column : column + 2]
            tokens.append(torch.einsum("bcij,dcij->bd", patch, kernel) + bias)
    h = torch.stack(tokens, dim=1) + state["positions"]
    skips = []
    for i in range(2):
        h = block(f"enc.{i}", h)
        skips.append(h)
    h = block("mid", h)
    for i in range(2):
        h = block(f"dec.{i}", h, skips.pop())
    pixels = linear("linear", norm("norm", h))[:, 2:]
    image = torch.zeros(len(x), 3, 8, 8)
    for n in range(16):
        row, column = 2 * (n // 4), 2 * (n % 4)
        image[:, :, row : row + 2, column : column + 2] = pixels[:, n].view(-1, 3, 2, 2)
    return F.conv2d(image, state["conv.weight"], state["conv.bias"], padding=1)


@torch.no_grad()
def test_uvit_is_the_papers():
    torch.manual_seed(2)
    model = UViT(24, 5, 2, size=8, in_channels=3, num_classes=7, time_scale=1000)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, t, y = torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([0, 6, 7])
    assert_close(model(x, t, y), plain_uvit(model.state_dict(), 2, x, t, y))
    with pytest.raises(UserError, match="build it with size 16"):
        model(torch.randn(1, 3, 16, 16), t[:1], y[:1])


def small(name: str):
    if name == "U-ViT":
        return create_denoiser(name, in_channels=3, num_classes=5, width=16, depth=3, num_heads=2, size=8)
    return create_denoiser(name, in_channels=3, num_classes=5, width=16, depth=2, num_heads=2)


@pytest.mark.parametrize(("name", "kind"), [("SiT", "SiT"), ("DiT", "SiT"), ("U-ViT", "UViT")])
def test_saved_models_are_found_by_their_config(name, kind, tmp_path):
    model = small(name)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"] == kind
    again = load_denoiser(tmp_path)
    assert type(again) is type(model)
    assert again.config == model.config
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 5])
    assert torch.equal(again(x, t, y), model(x, t, y))


def test_a_config_cannot_name_what_to_import(tmp_path):
    small("SiT").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": "os:system"}))
    with pytest.raises(UserError, match="names code to run: model os:system"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(("name", "tap"), [("SiT", "blocks.0"), ("U-ViT", "enc.0")])
def test_gradient_checkpointing_changes_nothing(name, tap):
    torch.manual_seed(3)
    model = small(name)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    aligned = AlignedDenoiser(model, [Alignment.build(model, tap, 4, (4, 4), (8, 8), hidden=8)])
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 5])
    gradients = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        out = aligned(x, t, y)
        loss = out.prediction.square().sum() + out.projections[0].square().sum()
        gradients.append(torch.autograd.grad(loss, list(aligned.parameters())))
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("name", ["SiT", "U-ViT"])
def test_tokens_become_a_map_with_each_patch_in_its_place(name):
    """The tap behind the patch embedding is a convolution, whose map is known."""
    model, size = small(name), (8, 8) if name == "U-ViT" else (8, 12)
    x = torch.randn(2, 3, *size)
    aligned = AlignedDenoiser(model, [Alignment("patches", GivesItsInput())])
    (tapped,) = aligned(x, torch.rand(2), torch.tensor([0, 5])).projections
    torch.testing.assert_close(tapped, model.patches.proj(x))


class GivesItsInput(nn.Module):
    def forward(self, feature, t):
        return feature


def test_uvit_taps_leave_time_and_label_out():
    model = small("U-ViT")
    tokens = torch.randn(2, 2 + 16, 16)
    torch.testing.assert_close(model.feature_map(tokens, (8, 8)).flatten(2).mT, tokens[:, 2:])


def test_irepa_on_a_sit():
    """iREPA's head is a 3x3 convolution over the tokens laid out in their grid."""
    model = small("SiT")
    alignment = Alignment.build(model, "blocks.1", 6, (4, 4), (8, 8), head="conv", target="spatial-norm")
    hidden = []
    model.blocks[1].register_forward_hook(lambda _m, _i, output: hidden.append(output))
    out = AlignedDenoiser(model, [alignment])(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 5]))
    expected = alignment.head.layer(hidden[0].mT.reshape(2, 16, 4, 4)).flatten(2).mT
    torch.testing.assert_close(out.projections[0], expected)


def test_a_tap_that_is_no_map_is_refused():
    with pytest.raises(UserError, match=r"tap 'condition' gives a tensor of shape \(1, 16\)"):
        Alignment.build(small("SiT"), "condition", 4, (4, 4), (8, 8))


def test_names_and_options_of_denoisers():
    assert {"DiC-XL", "SiT-XL/2", "DiT-S/8", "U-ViT-H/4"} <= set(list_denoisers())
    assert "SiT" not in list_denoisers()  # has no size of its own
    assert denoisers.describe("DiC-XL") == "DiC: width=384, depths=(7, 7, 8, 7, 7)"
    with pytest.raises(UserError, match="did you mean SiT-XL/"):
        create_denoiser("SIT-XL")
    with pytest.raises(UserError, match="unknown option of denoiser 'SiT-S/2': 'widht'; did you mean width"):
        create_denoiser("SiT-S/2", widht=8)
    with pytest.raises(
        UserError, match="denoiser 'SiT' needs width and depth and num_heads; or name a preset: SiT-S/2"
    ):
        create_denoiser("SiT")
    with pytest.raises(UserError, match=r"model\.options: learn_sigma is a key of its own"):
        build_denoiser(load_recipe("digits-sit", ["model.options.learn_sigma=true"]).model, 1, ClassLabels(10))
    with pytest.raises(UserError, match="divisible by its patch size 2, not 7x8"):
        small("SiT")(torch.randn(1, 3, 7, 8), torch.rand(1), torch.tensor([0]))


BASELINES = [
    name for name in list_recipes() if name.startswith(("sit-xl", "sit-b", "dit-", "diffit-", "u-vit-", "digits-sit"))
]


@pytest.mark.parametrize("name", BASELINES)
def test_recipes_build(name):
    recipe = load_recipe(name)
    size = recipe.data.size
    with torch.device("meta"):
        denoiser = build_denoiser(recipe.model, 4, ClassLabels(1000))
        for section in recipe.alignments:
            options = section.model_dump(include={"head", "weight", "manifold_weight"}) | section.head_options
            alignment = Alignment.build(denoiser, section.tap, 768, (16, 16), (size, size), **options)
            assert alignment.compare.manifold_weight == 0  # REPA has no such term
    ddpm = recipe.objective.name == "ddpm"
    assert denoiser.config["learn_sigma"] == (ddpm and recipe.objective.options.get("learned_variance", True))


@pytest.mark.slow
def test_digits_sit_trains_and_samples(here, tmp_path):
    changes = ["train.steps=3", "train.batch_size=8", "train.log_every=1", "train.sample_every=0", "evaluate=null"]
    changes += ["model.width=16", "model.options.depth=2", "model.options.num_heads=2", "alignments.0.tap=blocks.0"]
    here("train", "digits-sit-repa", "--out", "run", *(f"--set={change}" for change in changes))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert "alignment.0.token" in lines[-1]
    checkpoint = load(tmp_path / "run")
    assert type(checkpoint.denoiser).__name__ == "SiT"
    settings = checkpoint.recipe.sample.model_copy(update={"steps": 2})
    images = torch.cat(list(checkpoint.sampler(settings)(torch.arange(4))))
    assert images.shape == (4, 1, 16, 16)
    assert images.isfinite().all()


MINE = """
import torch
from torch import nn

from dic_repa.models import Pretrained


class OneConv(Pretrained, nn.Module):
    def __init__(self, in_channels, num_classes, width=8):
        super().__init__()
        self.config = {"in_channels": in_channels, "num_classes": num_classes, "width": width}
        self.in_channels, self.num_classes = in_channels, num_classes
        self.label = nn.Embedding(num_classes + 1, width)
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.last = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x, t, y):
        return self.last((self.first(x) + self.label(y)[:, :, None, None] * (1 - t)[:, None, None, None]).relu())
"""


def test_a_denoiser_of_ones_own_trains_and_samples(dic_repa, tmp_path, monkeypatch):
    (tmp_path / "my_denoiser.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    changes = ["model={name: 'my_denoiser:OneConv', width: 6}", "alignments.0.tap=first", "evaluate=null"]
    changes += ["train.steps=2", "train.batch_size=8", "train.sample_every=0"]
    train(load_recipe("digits-urepa", changes), tmp_path / "run")
    sampled = ("--num", "2", "--steps", "2", "--out", "samples", "--trust-code")
    dic_repa("sample", "run", *sampled)  # where nobody has imported it yet
    assert len(list((tmp_path / "samples").rglob("*.png"))) >= 2
