"""The blocks of SiT, by name: what a token's vector goes through, how it is conditioned and told its place.

`adaln` is DiT's and SiT's. `llama` is VisionLLaMA's (arXiv 2403.00522): rotary position embeddings and a gated MLP in
place of position embeddings and a plain one. `diffit` is DiffiT's (arXiv 2312.02139): no modulation; the condition goes
into the queries, keys and values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.layers import Mlp, SwiGLU
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.errors import UserError
from dic_repa.models.layers import RecomputableBlock

EPS = 1e-6  # of all norms

_gelu: Any = partial(nn.GELU, approximate="tanh")  # timm asks for a class by its annotation, and takes any factory


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters, of the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters, of the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens (B, N, C) by shift and scale (B, 1, C)."""
    return x * (1 + scale) + shift


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, heads, N, C / heads) in what one linear layer gave, (B, N, 3 C)."""
    q, k, v = rearrange(qkv, "b n (three heads c) -> three b heads n c", three=3, heads=num_heads).unbind()
    return q, k, v


class TransformerBlock(RecomputableBlock):
    """x (B, N, C), c (B, C) and the `places` to (B, N, C), for tokens of `width` C.

    `grid`, rows and columns of tokens, is None but for a block that is made for one of them.
    """

    sinusoids = True  # whether the tokens come with position embeddings
    modulated = True  # whether c is SiLU(c), which modulates, the last layer too; otherwise c itself, which does not
    one_size = False  # whether it is made for one grid

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int] | None = None):
        super().__init__()

    def reset_parameters(self) -> None:
        """Initial values of its own, after Xavier's of all linear layers."""

    @staticmethod
    def places(width: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
        """What a block, whose heads are `width` wide, is told of the tokens' places beside x and c, alike for all."""
        return ()


class AdaLNBlock(TransformerBlock):
    """adaLN-Zero: LayerNorm, modulate, attention, gate, plus the input; the same with the MLP."""

    norm = staticmethod(layer_norm)

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int] | None = None):
        super().__init__(width, num_heads, grid)
        self.attn, self.mlp = self.layers(width, num_heads)
        self.modulation = nn.Linear(width, 6 * width)

    @staticmethod
    def layers(width: int, num_heads: int) -> tuple[nn.Module, nn.Module]:
        return Attention(width, num_heads, qkv_bias=True), Mlp(width, 4 * width, act_layer=_gelu)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.modulation.weight)

    def _forward(self, x: Tensor, c: Tensor, *places: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm(x), shift1, scale1), *places)
        return x + gate2 * self.mlp(modulate(self.norm(x), shift2, scale2))


class LlamaLayerNormBlock(AdaLNBlock):
    """VisionLLaMA's block as its code has it: adaLN-Zero with rotary position embeddings and a SwiGLU MLP of 2/3 of
    4 C channels, rounded up to a multiple of 256, without biases."""

    sinusoids = False

    @staticmethod
    def layers(width: int, num_heads: int) -> tuple[nn.Module, nn.Module]:
        hidden = -(int(8 * width / 3) // -256) * 256
        return RotaryAttention(width, num_heads), SwiGLU(width, hidden, bias=False)

    @staticmethod
    def places(width: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
        angles = rotary_angles(width, grid, device)
        return angles.cos(), angles.sin()


class LlamaBlock(LlamaLayerNormBlock):
    """The same with LLaMA's RMSNorm, without parameters since it is modulated."""

    norm = staticmethod(rms_norm)


def rotary_angles(width: int, grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """The angles by which the pairs of a head's `width` channels are turned at each place, (h * w, width / 2), float32.

    Of pair 2 i the angle is column * f, of pair 2 i + 1 row * f, with f = 10000^(-4 i / width).
    """
    pairs = width // 4
    f = 10_000.0 ** (-torch.arange(pairs, dtype=torch.float32, device=device) / pairs)
    row, column = (torch.arange(count, dtype=torch.float32, device=device)[:, None] * f for count in grid)
    angles = torch.stack(torch.broadcast_tensors(column[None, :], row[:, None]), dim=-1)
    return rearrange(angles, "h w pairs two -> (h w) (pairs two)")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., N, C) with each pair of neighbouring channels turned by the angle of `cos` and `sin` (N, C / 2)."""
    a, b = rearrange(x, "... (pairs two) -> two ... pairs", two=2).unbind()
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return rearrange(turned, "... pairs two -> ... (pairs two)").to(x.dtype)


class RotaryAttention(nn.Module):
    """Self-attention whose queries and keys are turned by their token's place, so that their inner product depends on
    the distance in rows and in columns alone."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        if width // num_heads % 4:
            raise UserError(
                "rotary position embeddings turn pairs of channels, half of them by row and half by column: width / "
                f"num_heads must be a multiple of 4, not {width // num_heads}"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        x = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj(rearrange(x, "b heads n c -> b n (heads c)"))


class TimeDependentAttention(nn.Module):
    """DiffiT's TMSA: queries, keys and values are each the sum of a linear map of a token and one of the condition
    (equations 3 to 5), and each head has a learnt bias for each distance in rows and columns (equation 6)."""

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int]):
        super().__init__()
        self.num_heads, self.grid = num_heads, grid
        self.qkv = nn.Linear(width, 3 * width)
        self.condition_qkv = nn.Linear(width, 3 * width)
        rows, columns = grid
        self.distances = nn.Embedding((2 * rows - 1) * (2 * columns - 1), num_heads)
        self.proj = nn.Linear(width, width)

    def bias(self) -> Tensor:
        """What is added to the logit of each head, query and key, (heads, h * w, h * w)."""
        device = self.distances.weight.device
        rows, columns = (torch.arange(count, device=device) for count in self.grid)
        row = rows[:, None] - rows + len(rows) - 1  # from 0 on
        column = columns[:, None] - columns + len(columns) - 1
        index = row[:, None, :, None] * (2 * len(columns) - 1) + column[None, :, None, :]
        return rearrange(self.distances(index), "h w i j heads -> heads (h w) (i j)")

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x) + self.condition_qkv(c)[:, None], self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias().to(q.dtype))
        return self.proj(rearrange(x, "b heads n c -> b n (heads c)"))


class DiffiTBlock(TransformerBlock):
    """DiffiT's block: LayerNorm, TMSA, plus the input (equation 7); LayerNorm, MLP, plus the input (equation 8).

    What the paper leaves open is as in its authors' code (NVlabs/DiffiT), whose XL/2 has DiT's width, depth, heads,
    embeddings and so the poster's GMACs: norms without parameters, fixed position embeddings beside the bias, the sum
    of the time's and the label's embedding as the condition, without SiLU, and a last layer that is LayerNorm, SiLU and
    a linear layer. The bias is for one size of data.
    """

    modulated, one_size = False, True

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int] | None = None):
        super().__init__(width, num_heads, grid)
        assert grid is not None  # SiT sees to it
        self.attn = TimeDependentAttention(width, num_heads, grid)
        self.mlp = Mlp(width, 4 * width, act_layer=_gelu)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.attn.distances.weight, std=0.02)

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.attn(layer_norm(x), c)
        return x + self.mlp(layer_norm(x))


BLOCKS: dict[str, type[TransformerBlock]] = {
    "adaln": AdaLNBlock,
    "llama": LlamaBlock,
    "llama-layer-norm": LlamaLayerNormBlock,
    "diffit": DiffiTBlock,
}
