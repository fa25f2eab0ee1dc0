"""SiT↓ against a network written with torch's operations, and what its three parts give as feature maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from dic_repa.alignment import AlignedDenoiser, Alignment
from dic_repa.errors import UserError
from dic_repa.models import create_denoiser, load_denoiser, measure_cost
from dic_repa.models.presets import PRESETS
from dic_repa.models.registry import preset_heads
from dic_repa.models.sit_down import SiTDown

HEADS, SIZE = 2, (8, 12)


def small(**options) -> SiTDown:
    torch.manual_seed(0)
    model = SiTDown(16, (2, 1, 2), HEADS, in_channels=3, num_classes=5, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def model() -> SiTDown:
    return small()


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, *SIZE), torch.rand(2), torch.tensor([1, 5])


def sinusoids(count: int, pairs: int) -> Tensor:
    """Angles (count, pairs): the place times 10000^(-i / pairs)."""
    return torch.arange(count)[:, None] * 10_000 ** (-torch.arange(pairs) / pairs)


def turned(x: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens of one head (B, N, C) as complex numbers, every second of them turned by the column, the others by the
    row."""
    pairs = x.shape[-1] // 4
    by_column, by_row = sinusoids(columns, pairs).repeat(rows, 1), sinusoids(rows, pairs).repeat_interleave(columns, 0)
    angles = torch.stack([by_column, by_row], dim=-1).flatten(1)
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def plain_sit_down(state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """From the paper's words and those of what it names: DiT's blocks with RoPE and SwiGLU, U-DiT's way down and up,
    U-ViT's skips."""
    width = state["patches.proj.weight"].shape[0]

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def condition(name: str) -> Tensor:
        angles = t[:, None] * 10_000 ** (-torch.arange(128) / 128)
        time = linear(f"{name}.time1", torch.cat([angles.cos(), angles.sin()], dim=1))
        return F.silu(linear(f"{name}.time2", F.silu(time)) + state[f"{name}.label.weight"][y])

    def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = h - h.mean(dim=-1, keepdim=True)
        normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return normed * (1 + scale[:, None]) + shift[:, None]

    def attention(name: str, h: Tensor, grid: tuple[int, int]) -> Tensor:
        heads = []
        for q, k, v in zip(*(part.chunk(HEADS, dim=-1) for part in linear(f"{name}.qkv", h).chunk(3, dim=-1))):
            q, k = turned(q, *grid), turned(k, *grid)
            heads.append((q @ k.mT / (width / HEADS) ** 0.5).softmax(dim=-1) @ v)
        return linear(f"{name}.proj", torch.cat(heads, dim=-1))

    def block(name: str, h: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.modulation", c).chunk(6, dim=1)
        h = h + gate1[:, None] * attention(f"{name}.attn", modulated(h, shift1, scale1), grid)
        z = modulated(h, shift2, scale2)
        gated = F.silu(linear(f"{name}.mlp.fc1_g", z)) * linear(f"{name}.mlp.fc1_x", z)
        return h + gate2[:, None] * linear(f"{name}.mlp.fc2", gated)

    c, middle_c = condition("condition.0"), condition("condition.1")
    feature = F.conv2d(x, state["patches.proj.weight"], state["patches.proj.bias"], stride=2)
    rows, columns = grid = feature.shape[-2], feature.shape[-1]
    row, column = (sinusoids(count, width // 4) for count in grid)
    row, column = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (row, column))
    h = feature.flatten(2).mT + torch.cat([column.repeat(rows, 1), row.repeat_interleave(columns, 0)], dim=1)
    skips = []
    for i in range(2):
        h = block(f"enc.{i}", h, c, grid)
        skips.append(h)
    fewer = F.conv2d(h.mT.unflatten(2, grid), state["down.conv.weight"], padding=1)
    corners = [fewer[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]  # of each square of four tokens
    h = torch.stack(corners, dim=2).flatten(1, 2).flatten(2).mT
    half = rows // 2, columns // 2
    h = block("mid.0", h, middle_c, half)
    more = F.conv2d(h.mT.unflatten(2, half), state["up.conv.weight"], padding=1).unflatten(1, (width, 4))
    whole = torch.empty(len(x), width, rows, columns, dtype=h.dtype)
    for corner in range(4):
        whole[:, :, corner // 2 :: 2, corner % 2 :: 2] = more[:, :, corner]
    h = whole.flatten(2).mT
    for i in range(2):
        h = linear(f"dec.{i}.skip", torch.cat([h, skips.pop()], dim=-1))
        h = block(f"dec.{i}", h, c, grid)
    pixels = linear("output.linear", modulated(h, *linear("output.modulation", c).chunk(2, dim=1)))
    return F.fold(pixels.mT, x.shape[-2:], kernel_size=2, stride=2)


def test_it_is_the_network_of_the_docstring_with_its_gradients(inputs):
    """In float64, but for the angles of times and places, which are float32 in ours; for data that are not square."""
    x, t, y = inputs
    model = small().double()
    state = {name: tensor.detach().requires_grad_() for name, tensor in model.state_dict().items()}
    expected = plain_sit_down(state, x.double(), t.double(), y)
    ours = model(x.double(), t.double(), y)
    assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
    weights = torch.randn_like(expected)
    theirs = dict(zip(state, torch.autograd.grad((expected * weights).sum(), list(state.values()))))
    (ours * weights).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, theirs[name], rtol=0, atol=1e-5 * float(theirs[name].abs().max()))


def test_the_paper_s_parameters_to_the_last_digit():
    """With REPA's projector (2048 wide, to 768) and fixed positions of 16x16 tokens; MACs without attention's products,
    with the projector on 8x8 tokens; in tables 1 and 3 XL has 108.8 without it."""
    for size, parameters, gmacs in (("B", 199.7, 24.1), ("L", 686.6, 79.3), ("XL", 954.4, 109.3)):
        counts, options = PRESETS[f"SiT-down-{size}/2"].counts, PRESETS[f"SiT-down-{size}/2"].options
        assert (counts.parameters, counts.gmacs) == (parameters, {32: gmacs})
        width, (encoder, middle, decoder) = options["width"], options["depths"]
        weights = width * 2048 + 2048**2 + 2048 * 768
        attention = 2 * width * ((encoder + decoder) * 256**2 + middle * 64**2)
        beside = (weights + 2 * 2048 + 768 + 256 * width) / 1e6, (64 * weights - attention) / 1e9
        assert counts.beside == pytest.approx(beside, abs=0.005)
        with torch.device("meta"):
            cost = measure_cost(create_denoiser(f"SiT-down-{size}/2"), 32)
        assert round(cost.parameters / 1e6 + beside[0], 1) == parameters
        assert round(cost.macs / 1e9 + beside[1], 1) == gmacs
    assert round(cost.macs / 1e9 - attention / 1e9, 1) == 108.8


def test_size_s_has_about_sit_s_macs():
    with torch.device("meta"):
        ours, sit = (measure_cost(create_denoiser(name), 32).macs for name in ("SiT-down-S/2", "SiT-S/2"))
    assert ours == pytest.approx(sit, rel=0.07)


@pytest.mark.parametrize(
    ("tap", "grid"), [("enc.1", (4, 6)), ("mid.0", (2, 3)), ("dec.0", (4, 6)), ("patches", (4, 6))]
)
def test_feature_maps_have_the_grid_of_their_part(model, inputs, tap, grid):
    seen = []
    handle = model.get_submodule(tap).register_forward_hook(lambda _m, _i, output: seen.append(output))
    model(*inputs)
    handle.remove()
    feature = model.feature_map(seen[0], SIZE)
    assert feature.shape == (2, 16, *grid)
    assert torch.equal(feature[:, :, 1, 2], seen[0][:, grid[1] + 2])


def test_u_repas_head_takes_the_middle_to_the_encoders_grid(model, inputs):
    aligned = AlignedDenoiser(model, [Alignment.build(model, "mid.0", 7, (4, 6), SIZE, hidden=6)])
    (projection,) = aligned(*inputs).projections
    seen = []
    handle = model.mid[0].register_forward_hook(lambda _m, _i, output: seen.append(output))
    model(*inputs)
    handle.remove()
    each = aligned.alignments[0].head.layers(seen[0])
    expected = F.interpolate(each.mT.unflatten(2, (2, 3)), (4, 6), mode="bilinear").flatten(2).mT
    assert_close(projection, expected)


def test_blocks_are_in_the_papers_order():
    with torch.device("meta"):
        model = create_denoiser("SiT-down-XL/2")
    names = {block: name for name, block in model.named_modules()}
    assert [names[model.blocks()[depth - 1]] for depth in (4, 18, 32)] == ["enc.3", "mid.7", "dec.5"]
    assert len(model.blocks()) == 36


def test_recomputed_and_saved_it_is_the_same(model, inputs, tmp_path):
    recomputing = small(gradient_checkpointing=True)
    gradients = [
        torch.autograd.grad(net(*inputs).square().sum(), list(net.parameters())) for net in (model, recomputing)
    ]
    for plain, recomputed in zip(*gradients):
        assert_close(plain, recomputed)
    with torch.no_grad():
        expected = model(*inputs)
        model.save_pretrained(tmp_path)
        again = load_denoiser(tmp_path)
        assert (type(again), again.config) == (SiTDown, model.config)
        assert torch.equal(again(*inputs), expected)


def test_options_of_the_other_denoisers(inputs):
    x, t, y = inputs
    two = small(two_times=True)
    assert not torch.allclose(two(x, torch.stack([t, t], 1), y), two(x, torch.stack([t, 0 * t], 1), y))
    assert small(learn_sigma=True)(*inputs).shape == (2, 6, *SIZE)
    assert small(middle_head="mid.0")(*inputs).shape == (2, 6, *SIZE)
    fresh = SiTDown(16, (1, 1, 1), HEADS, in_channels=3, num_classes=5)
    assert not fresh(*inputs).any()  # a zero output
    assert preset_heads("SiT", 1152, 28) == 16


def test_what_does_not_fit_is_one_line(model):
    with pytest.raises(
        UserError, match="SiT-down takes heights and widths divisible by 4, twice its patch size, not 8x6"
    ):
        model(torch.randn(1, 3, 8, 6), torch.rand(1), torch.tensor([0]))
    with pytest.raises(UserError, match="a decoder of 3 blocks needs 3 skips, and an encoder of 2 blocks gives 2"):
        SiTDown(16, (2, 1, 3), HEADS)
    with pytest.raises(UserError, match="width must be a multiple of 4 num_heads, 8, not 20"):
        SiTDown(20, (1, 1, 1), HEADS)
    with pytest.raises(UserError, match="depths"):
        SiTDown(16, (1, 1, 1, 1, 1), HEADS)
    with pytest.raises(UserError, match="depths; or name a preset: SiT-down-S/2, SiT-down-B/2"):
        create_denoiser("SiT-down", width=16, num_heads=2)
    with pytest.raises(UserError, match=r"SiT-XL/8$"):
        create_denoiser("SiT", width=16, num_heads=2)
