"""SiT and DiT, one architecture: a transformer on patches with adaLN-Zero blocks (arXiv 2212.09748, 2401.08740).

DiT is trained as a DDPM with a learned variance (`learn_sigma`), SiT by flow matching; REPA aligns SiT. Attention, MLP
and patch embedding are timm's, whose attention is F.scaled_dot_product_attention. The position embeddings are fixed
sinusoids, made for the size of the data, which is any that the patch divides. REPA's tap is `blocks.7`, the eighth
block: its output is tokens, which `feature_map` makes a map of.
"""

import math
from functools import partial
from typing import Any

import torch
from einops import repeat
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.errors import UserError
from dic_repa.models.layers import Condition, Modules, RecomputableBlock, patch_grid, to_map, unpatchify
from dic_repa.models.middle import MiddleHeadOption, add_middle_head
from dic_repa.models.pretrained import Blocks, Classes, Pretrained, Size, config_of


def position_embedding(grid: tuple[int, int], width: int, device: torch.device | str | None = None) -> Tensor:
    """Sinusoids of a token's column in the first half of the channels and of its row in the second, (h * w, width).

    Each half is sines, then cosines, of the frequencies 10000^(-i / (width / 4)), i = 0 ... width / 4 - 1; float32.
    """
    quarter = width // 4
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(quarter, dtype=torch.float32, device=device) / quarter)

    def axis(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float32, device=device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = grid
    column = repeat(axis(columns), "w c -> (h w) c", h=rows)
    row = repeat(axis(rows), "h c -> (h w) c", w=columns)
    return torch.cat([column, row], dim=1)


_gelu: Any = partial(nn.GELU, approximate="tanh")  # timm asks for a class by its annotation, and takes any factory


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters of tokens (B, N, C), modulated by shift and scale (B, 1, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class AdaLNBlock(RecomputableBlock):
    """adaLN-Zero: LayerNorm, modulate, attention, gate, plus the input; the same with the MLP.

    x (B, N, C) and SiLU(c) (B, C) to (B, N, C).
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attn = Attention(width, num_heads, qkv_bias=True)
        self.mlp = Mlp(width, 4 * width, act_layer=_gelu)
        self.modulation = nn.Linear(width, 6 * width)

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulated_norm(x, shift1, scale1))
        return x + gate2 * self.mlp(modulated_norm(x, shift2, scale2))


class Output(nn.Module):
    """LayerNorm, modulation, and a linear layer to the pixels of each patch."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))


class SiT(Pretrained):
    """A velocity (or noise, score, data) model: `model(x, t, y)` with x (B, in_channels, H, W), t (B,), y (B,) int64.

    H and W are any multiples of `patch_size`. `y == num_classes` is the null class. The output has `in_channels`
    channels, twice as many with `learn_sigma` (the second half is the variance of a DDPM-trained model).

    Args:
        width: channels of a token, a multiple of 4 and of `num_heads`.
        depth: blocks.
        time_scale: multiplies t before its embedding; 1 takes t as it is.
        two_times: t may be (t, r) (B, 2), for average velocities between the times r and t.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        middle_head: the block that a second head sits on, for internal guidance (`add_middle_head`); then the output is
            twice the channels, the head's prediction behind the model's own.
    """

    def __init__(
        self,
        width: Size,
        depth: Blocks,
        num_heads: Size,
        patch_size: Size = 2,
        in_channels: Size = 4,
        num_classes: Classes = 1000,
        learn_sigma: bool = False,
        time_scale: float = 1.0,
        gradient_checkpointing: bool = False,
        middle_head: MiddleHeadOption = None,
        two_times: bool = False,
    ):
        super().__init__()
        self.config = config_of(locals())
        if num_heads < 1 or width < 4 or width % 4 or width % num_heads:
            raise UserError(f"width must be a multiple of 4 and of num_heads {num_heads}, not {width}")
        self.two_times = two_times
        self.in_channels, self.num_classes, self.patch_size = in_channels, num_classes, patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.patches = PatchEmbed(None, patch_size, in_channels, width)
        self.condition = Condition(width, num_classes, time_scale, two_times=two_times)
        self.blocks = Modules(AdaLNBlock(width, num_heads) for _ in range(depth))
        self.output = Output(width, self.out_channels * patch_size**2)
        self.reset_parameters()
        self.set_gradient_checkpointing(gradient_checkpointing)
        add_middle_head(self, middle_head)

    def reset_parameters(self) -> None:
        """DiT's initial values: Xavier uniform, N(0, 0.02^2) for the embeddings, zero modulations and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # the patches' conv as the linear layer that it is
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.condition.reset_parameters()
        for layer in (*(block.modulation for block in self.blocks), self.output.modulation, self.output.linear):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        grid = patch_grid("SiT", (x.shape[-2], x.shape[-1]), self.patch_size)
        c = self.condition(t, y)
        x = self.patches(x)
        x = x + position_embedding(grid, x.shape[-1], x.device).to(x.dtype)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.output(x, c), grid, self.patch_size)

    def feature_map(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """A block's tokens (B, N, C) as a map (B, C, h, w), for data of `size` (H, W)."""
        return to_map(tokens, patch_grid("SiT", size, self.patch_size))
