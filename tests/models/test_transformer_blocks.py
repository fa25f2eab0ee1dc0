"""SiT's blocks by name, DiT, DiT-LLaMA, U-ViT: against the numbers of their authors' code and the papers' equations."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file
from torch import nn

from dic_repa.alignment import AlignedDenoiser, Alignment
from dic_repa.errors import UserError
from dic_repa.models import create_denoiser, load_authors_checkpoint, load_denoiser
from dic_repa.models.authors_sit import infer_config
from dic_repa.models.sit import SiT
from dic_repa.models.transformer_blocks import TimeDependentAttention, rotary_angles, rotate

AUTHORS = {
    "dit": {"family": "DiT", "num_heads": 2},
    "dit_llama": {"family": "DiT", "num_heads": 2},
    "uvit": {"num_heads": 2, "time_scale": 1.0},
}
KINDS = {"llama": {}, "llama-layer-norm": {}, "diffit": {"size": 8}}


def assert_close(value, expected):
    assert value.shape == expected.shape
    assert (value - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", AUTHORS)
def test_outputs_and_gradients_are_those_of_the_authors_code(name):
    reference = load_file(DATA / f"authors_{name}_tiny.safetensors")

    def part(prefix):
        return {key.removeprefix(prefix): value for key, value in reference.items() if key.startswith(prefix)}

    weights, theirs = part("model."), part("gradient.model.")
    model = load_authors_checkpoint(weights, **AUTHORS[name])
    x = reference["x"].requires_grad_()
    out = model(x, reference["t"], reference["y"])
    assert_close(out, reference["out"])
    (out * reference["weight"]).sum().backward()
    assert_close(x.grad, reference["gradient.x"])
    # Their gradients under our names: loaded as if they were weights. The positions that DiT fixes have none.
    fixed = {key: value for key, value in weights.items() if key not in theirs}
    assert set(fixed) <= {"pos_embed"}
    expected = load_authors_checkpoint({**theirs, **fixed}, **AUTHORS[name])
    for ours, gradient in zip(model.parameters(), expected.parameters(), strict=True):
        assert_close(ours.grad, gradient)


def test_visionllamas_published_sizes_are_dits_with_other_blocks():
    with torch.device("meta"):
        state = {f"blocks.{i}.mlp.c_fc1.weight": torch.empty(3072, 1152) for i in range(28)}
        state["x_embedder.proj.weight"] = torch.empty(1152, 4, 2, 2)
        state["y_embedder.embedding_table.weight"] = torch.empty(1001, 1152)
        state["final_layer.linear.weight"] = torch.empty(32, 1152)
        preset = create_denoiser("DiT-LLaMA-XL/2", block="llama-layer-norm", learn_sigma=True)
    assert {**infer_config(state), "time_scale": 1.0} == preset.config
    assert preset.blocks[0].mlp.fc1_g.weight.shape == (3072, 1152)


def test_rotated_products_depend_on_the_distance_alone():
    grid, width = (4, 5), 12
    angles = rotary_angles(width, grid)
    f = [1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)]  # of the three pairs for columns, and of those for rows
    at = angles[2 * grid[1] + 3]  # row 2, column 3
    torch.testing.assert_close(at, torch.tensor([a * place for a in f for place in (3, 2)]))
    torch.manual_seed(0)
    q, k = torch.randn(width), torch.randn(width)
    turned = [rotate(each.expand(len(angles), width), angles.cos(), angles.sin()) for each in (q, k)]
    products = (turned[0] @ turned[1].T).view(*grid, *grid)
    # Each pair of channels as a complex number: the inner product is the real part of q conj(k) e^(i distance f).
    pairs = torch.view_as_complex(q.view(-1, 2)) * torch.view_as_complex(k.view(-1, 2)).conj()
    for row, column, i, j in [(0, 0, 0, 0), (3, 1, 0, 4), (2, 2, 3, 0), (1, 4, 3, 0)]:
        distance = torch.tensor([a * d for a in f for d in (column - j, row - i)])
        expected = (pairs * torch.exp(1j * distance)).real.sum()
        torch.testing.assert_close(products[row, column, i, j], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products[1:, 1:, 1:, 1:], products[:-1, :-1, :-1, :-1], rtol=1e-4, atol=1e-5)


def test_norms_of_the_llama_blocks():
    """RMSNorm, and LayerNorm, before they are modulated; the residuals are gated by what begins at zero."""
    x, c = torch.randn(2, 4, 16) * 3 + 1, torch.randn(2, 16)
    models = {kind: small(kind) for kind in ("llama", "llama-layer-norm")}
    for kind, model in models.items():
        block, places = model.blocks[0], model.kind.places(8, (2, 2), x.device)
        for parameter in block.modulation.parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(block(x, c, *places), x)
        normed = nn.RMSNorm(16, eps=1e-6)(x) if kind == "llama" else nn.LayerNorm(16, eps=1e-6)(x)
        torch.testing.assert_close(block.norm(x), normed)


@torch.no_grad()
def test_tmsa_is_the_papers():
    torch.manual_seed(0)
    width, heads, grid = 12, 3, (2, 3)
    attention = TimeDependentAttention(width, heads, grid)
    nn.init.normal_(attention.distances.weight)
    x, c = torch.randn(2, 6, width), torch.randn(2, width)
    head = width // heads
    out = torch.zeros(2, 6, width)
    space, time = attention.qkv, attention.condition_qkv
    for n in range(heads):
        parts = []
        for kind in range(3):  # equations 3, 4 and 5
            rows = slice(kind * width + n * head, kind * width + (n + 1) * head)
            of_time = c @ time.weight[rows].T + time.bias[rows]
            parts.append(x @ space.weight[rows].T + space.bias[rows] + of_time[:, None])
        q, k, v = parts
        logits = q @ k.mT / head**0.5
        for i in range(6):
            for j in range(6):
                row, column = i // 3 - j // 3, i % 3 - j % 3
                logits[:, i, j] += attention.distances.weight[(row + 1) * 5 + column + 2, n]
        out[..., n * head : (n + 1) * head] = logits.softmax(dim=-1) @ v  # equation 6
    assert_close(attention(x, c), attention.proj(out))


@torch.no_grad()
def test_diffit_is_made_of_its_blocks():
    """Equations 7 and 8, the unmodulated last layer, and a condition that no SiLU goes over."""
    torch.manual_seed(1)
    model = small("diffit")
    x, t, y = inputs()
    norm = nn.LayerNorm(16, eps=1e-6)
    seen = []
    model.condition.register_forward_hook(lambda _m, _i, output: seen.append(output))
    hidden = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, given, output: hidden.append((given[0], output)))
    out = model(x, t, y)
    c = seen[0]
    assert (c < -0.3).any()  # which is below SiLU's minimum
    for block, (h, output) in zip(model.blocks, hidden, strict=True):
        h = h + block.attn(norm(h), c)
        assert_close(output, h + block.mlp(norm(h)))
    patches = model.output.linear(nn.functional.silu(norm(hidden[-1][1])))
    assert_close(out, patches.view(2, 4, 4, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 8, 8))


def small(kind: str, **options) -> SiT:
    """Two blocks of random weights, for 3x8x8."""
    torch.manual_seed(2)
    options = {"width": 16, "depth": 2, "num_heads": 2, "block": kind, **KINDS.get(kind, {}), **options}
    model = create_denoiser("SiT", in_channels=3, num_classes=5, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs(height: int = 8, width: int = 8):
    return torch.randn(2, 3, height, width), torch.rand(2), torch.tensor([1, 5])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_block_is_saved_tapped_and_recomputed(kind, tmp_path):
    model, (x, t, y) = small(kind), inputs()
    out = model(x, t, y)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["block"] == kind
    assert torch.equal(load_denoiser(tmp_path)(x, t, y), out)

    aligned = AlignedDenoiser(model, [Alignment.build(model, "blocks.0", 4, (4, 4), (8, 8), hidden=8)])
    gradients = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        result = aligned(x, t, y)
        loss = result.prediction.square().sum() + result.projections[0].square().sum()
        gradients.append(torch.autograd.grad(loss, list(aligned.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
    torch.testing.assert_close(model.feature_map(x.flatten(2).mT, (16, 16)), x)  # tokens row by row


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "diffit"])
def test_a_kind_of_block_is_compiled(kind):
    model, given = small(kind, depth=1), inputs()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(*given), model(*given))


def test_without_the_option_a_sit_is_as_before():
    model = SiT(16, 1, 2)
    assert not {"block", "size"} & set(model.config)
    assert SiT(**model.config).config == model.config  # as in a folder that was saved before there were others


@torch.no_grad()
def test_llama_takes_rectangles_and_has_no_position_embeddings():
    """All tokens of a picture of one colour are alike, whatever their distances; those of an adaLN block are not."""
    x, t, y = inputs(4, 12)
    model = small("llama")
    assert not torch.allclose(model(x, t, y).mT, model(x.mT, t, y))
    plain = x[..., :1, :1].expand_as(x)
    for kind, alike in (("llama", True), ("adaln", False)):
        patches = small(kind)(plain, t, y).unfold(2, 2, 2).unfold(3, 2, 2)
        assert torch.allclose(patches, patches[:, :, :1, :1], atol=1e-4) == alike


def test_mistakes_with_blocks():
    with pytest.raises(UserError, match="unknown block 'lama'; did you mean llama"):
        small("lama")
    with pytest.raises(UserError, match="block 'diffit' learns biases for one size of data: give size"):
        SiT(16, 1, 2, block="diffit")
    with pytest.raises(UserError, match="block 'llama' takes data of any size: leave size out"):
        SiT(16, 1, 2, block="llama", size=8)
    with pytest.raises(UserError, match="width / num_heads must be a multiple of 4, not 6"):
        SiT(12, 1, 2, block="llama")
    with pytest.raises(UserError, match="divisible by its patch size 2, not 7x7"):
        SiT(16, 1, 2, block="diffit", size=7)
    x, t, y = inputs(16, 16)
    with pytest.raises(UserError, match="biases for data of 8x8, not 16x16; build it with size 16"):
        small("diffit")(x, t, y)
    with pytest.raises(UserError, match="divisible by its patch size 2, not 8x7"):
        small("llama")(x[..., :8, :7], t, y)
