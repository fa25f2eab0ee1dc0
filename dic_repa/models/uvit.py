"""U-ViT: a vision transformer with long skips, all inputs tokens (arXiv 2209.12152).

Time and label are two tokens in front of the patches', not a modulation; each block of the second half takes the output
of its counterpart in the first, concatenated and through a linear layer; the position embeddings are learnt, so the
size of the data is fixed. Taps are `enc.N`, `mid` and `dec.N`; `feature_map` drops the tokens of time and label.
"""

import torch
from timm.layers import Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dic_repa.errors import UserError
from dic_repa.models.layers import (
    RecomputableBlock,
    SpanEmbedding,
    patch_grid,
    split_times,
    timestep_embedding,
    to_map,
    unpatchify,
)
from dic_repa.models.middle import MiddleHeadOption, add_middle_head
from dic_repa.models.pretrained import Blocks, Classes, Pretrained, Size, config_of

EXTRA_TOKENS = 2  # label and time


class Block(RecomputableBlock):
    """A pre-norm transformer block, with `skip` behind a linear layer that takes a second input in.

    x (B, N, C), and with `skip` another (B, N, C), to (B, N, C).
    """

    def __init__(self, width: int, num_heads: int, skip: bool = False):
        super().__init__()
        self.skip = nn.Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def _forward(self, x: Tensor, *skips: Tensor) -> Tensor:
        if self.skip is not None:
            x = self.skip(torch.cat([x, *skips], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(Pretrained):
    """A noise (or velocity, score, data) model: `model(x, t, y)` with x (B, in_channels, size, size), t (B,), y (B,).

    y is int64, `num_classes` the null class. The output has `in_channels` channels, twice as many with `learn_sigma`.

    Args:
        width: channels of a token, a multiple of `num_heads` and even.
        depth: blocks, an odd number: a first half, a middle block, and a second half.
        size: height and width of the data, a multiple of `patch_size`.
        time_scale: multiplies t before its sinusoids. They are the time's token as they are, and vary over hundreds: 1
            for DDPM's steps, 1000 for a t in [0, 1].
        final_conv: a 3x3 convolution after the patches are put together.
        two_times: t may be (t, r) (B, 2), for average velocities between the times r and t; their span's embedding is
            added to the time's token.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        middle_head: the block that a second head sits on, for internal guidance (`add_middle_head`); then the output is
            twice the channels, the head's prediction behind the model's own.
    """

    end_layers = ("linear", "conv")  # which Muon leaves to AdamW

    def __init__(
        self,
        width: Size,
        depth: Blocks,
        num_heads: Size,
        patch_size: Size = 2,
        size: Size = 32,
        in_channels: Size = 4,
        num_classes: Classes = 1000,
        learn_sigma: bool = False,
        time_scale: float = 1.0,
        final_conv: bool = True,
        gradient_checkpointing: bool = False,
        middle_head: MiddleHeadOption = None,
        two_times: bool = False,
    ):
        super().__init__()
        self.config = config_of(locals())
        if num_heads < 1 or width < 2 or width % 2 or width % num_heads:
            raise UserError(f"width must be even and a multiple of num_heads {num_heads}, not {width}")
        if depth < 1 or depth % 2 == 0:
            raise UserError(f"depth must be an odd number, two halves and a middle block, not {depth}")
        self.two_times = two_times
        self.in_channels, self.num_classes = in_channels, num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.size, self.patch_size, self.time_scale = size, patch_size, time_scale
        self.grid = patch_grid("U-ViT", (size, size), patch_size)

        self.patches = PatchEmbed(None, patch_size, in_channels, width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.span = SpanEmbedding(width) if two_times else None
        self.positions = nn.Parameter(torch.empty(1, EXTRA_TOKENS + self.grid[0] * self.grid[1], width))
        self.enc = nn.ModuleList(Block(width, num_heads) for _ in range(depth // 2))
        self.mid = Block(width, num_heads)
        self.dec = nn.ModuleList(Block(width, num_heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, self.out_channels * patch_size**2)
        self.conv = nn.Conv2d(self.out_channels, self.out_channels, 3, padding=1) if final_conv else nn.Identity()
        self.reset_parameters()
        self.set_gradient_checkpointing(gradient_checkpointing)
        add_middle_head(self, middle_head)

    def reset_parameters(self) -> None:
        """The authors' initial values: N(0, 0.02^2) for linears and positions; PyTorch's own for the others."""
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.span is not None:
            self.span.reset_parameters()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != (self.size, self.size):
            raise UserError(
                f"this U-ViT has positions for data of {self.size}x{self.size}, not {x.shape[-2]}x{x.shape[-1]}; "
                f"build it with size {x.shape[-1]}"
            )
        patches = self.patches(x)
        t, span = split_times(t * self.time_scale, self.span is not None)
        time = timestep_embedding(t, patches.shape[-1]).to(patches.dtype)
        time = time if self.span is None else time + self.span(span)
        x = torch.cat([self.label(y)[:, None], time[:, None], patches], dim=1) + self.positions
        skips = []
        for block in self.enc:
            x = block(x)
            skips.append(x)
        x = self.mid(x)
        for block in self.dec:
            x = block(x, skips.pop())
        tokens = self.linear(self.norm(x))[:, EXTRA_TOKENS:]
        return self.conv(unpatchify(tokens, self.grid, self.patch_size))

    def feature_map(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """A block's tokens (B, 2 + N, C) as a map (B, C, h, w), without those of time and label."""
        rows, columns = patch_grid("U-ViT", size, self.patch_size)
        return to_map(tokens[:, -rows * columns :], (rows, columns))

    def resample_positions(self, positions: Tensor, grid: tuple[int, int]) -> Tensor:
        """The positions (1, 2 + h * w, width) of a U-ViT with another `grid` (h, w), for this one's."""
        return resample_abs_pos_embed(positions, list(self.grid), list(grid), num_prefix_tokens=EXTRA_TOKENS)
