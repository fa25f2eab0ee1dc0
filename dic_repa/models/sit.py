"""SiT and DiT, one architecture: a transformer on patches with adaLN-Zero blocks (arXiv 2212.09748, 2401.08740).

DiT is trained as a DDPM with a learned variance (`learn_sigma`), SiT by flow matching; REPA aligns SiT. Attention, MLP
and patch embedding are timm's, whose attention is F.scaled_dot_product_attention. The position embeddings are fixed
sinusoids, made for the size of the data, which is any that the patch divides. REPA's tap is `blocks.7`, the eighth
block: its output is tokens, which `feature_map` makes a map of. Other blocks make of it VisionLLaMA's DiT-LLaMA, which
has no position embeddings, and DiffiT (`transformer_blocks.py`).
"""

import math

import torch
from einops import repeat
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.errors import UserError, unknown_name
from dic_repa.models.layers import Condition, Modules, patch_grid, to_map, unpatchify
from dic_repa.models.middle import MiddleHeadOption, add_middle_head
from dic_repa.models.pretrained import Blocks, Classes, Pretrained, Size, config_of
from dic_repa.models.transformer_blocks import BLOCKS, TransformerBlock, layer_norm, modulate


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


class Output(nn.Module):
    """LayerNorm, modulation, and a linear layer to the pixels of each patch."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(layer_norm(x), shift, scale))


class PlainOutput(nn.Module):
    """LayerNorm, SiLU, and a linear layer to the pixels of each patch; no condition."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.linear = nn.Linear(width, features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(F.silu(layer_norm(x)))


class SiT(Pretrained):
    """A velocity (or noise, score, data) model: `model(x, t, y)` with x (B, in_channels, H, W), t (B,), y (B,) int64.

    H and W are any multiples of `patch_size`, or `size` for blocks of one size. `y == num_classes` is the null class.
    The output has `in_channels` channels, twice as many with `learn_sigma` (the second half is the variance of a
    DDPM-trained model).

    Args:
        width: channels of a token, a multiple of 4 and of `num_heads`.
        depth: blocks.
        time_scale: multiplies t before its embedding; 1 takes t as it is.
        two_times: t may be (t, r) (B, 2), for average velocities between the times r and t.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        middle_head: the block that a second head sits on, for internal guidance (`add_middle_head`); then the output is
            twice the channels, the head's prediction behind the model's own.
        block: 'adaln', DiT's and SiT's; 'llama', VisionLLaMA's with LLaMA's RMSNorm, or 'llama-layer-norm', as its code
            and checkpoints have it; 'diffit', DiffiT's.
        size: height and width of the data, a multiple of `patch_size`, for blocks of one size: 'diffit'.
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
        block: str = "adaln",
        size: Size | None = None,
    ):
        super().__init__()
        self.config = config_of(locals())
        if block == "adaln":
            del self.config["block"]
        if num_heads < 1 or width < 4 or width % 4 or width % num_heads:
            raise UserError(f"width must be a multiple of 4 and of num_heads {num_heads}, not {width}")
        if block not in BLOCKS:
            raise unknown_name("block", block, BLOCKS)
        self.kind = BLOCKS[block]
        if self.kind.one_size != (size is not None):
            any_size = "takes data of any size: leave size out"
            takes = "learns biases for one size of data: give size" if size is None else any_size
            raise UserError(f"block '{block}' {takes}")
        self.two_times, self.size, self.num_heads = two_times, size, num_heads
        self.in_channels, self.num_classes, self.patch_size = in_channels, num_classes, patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        grid = patch_grid("SiT", (size, size), patch_size) if size else None
        self.patches = PatchEmbed(None, patch_size, in_channels, width)
        self.condition = Condition(width, num_classes, time_scale, two_times=two_times, silu=self.kind.modulated)
        self.blocks: Modules[TransformerBlock] = Modules(self.kind(width, num_heads, grid) for _ in range(depth))
        output = Output if self.kind.modulated else PlainOutput
        self.output = output(width, self.out_channels * patch_size**2)
        self.reset_parameters()
        self.set_gradient_checkpointing(gradient_checkpointing)
        add_middle_head(self, middle_head)

    def reset_parameters(self) -> None:
        """The authors' initial values: Xavier uniform, N(0, 0.02^2) for the embeddings, zero modulations and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # the patches' conv as the linear layer that it is
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.condition.reset_parameters()
        for block in self.blocks:
            block.reset_parameters()
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.size and tuple(x.shape[-2:]) != (self.size, self.size):
            raise UserError(
                f"this {type(self).__name__} has biases for data of {self.size}x{self.size}, not "
                f"{x.shape[-2]}x{x.shape[-1]}; build it with size {x.shape[-1]}"
            )
        grid = patch_grid("SiT", (x.shape[-2], x.shape[-1]), self.patch_size)
        c = self.condition(t, y)
        x = self.patches(x)
        if self.kind.sinusoids:
            x = x + position_embedding(grid, x.shape[-1], x.device).to(x.dtype)
        places = self.kind.places(x.shape[-1] // self.num_heads, grid, x.device)
        for block in self.blocks:
            x = block(x, c, *places)
        return unpatchify(self.output(x, c), grid, self.patch_size)

    def feature_map(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """A block's tokens (B, N, C) as a map (B, C, h, w), for data of `size` (H, W)."""
        return to_map(tokens, patch_grid("SiT", size, self.patch_size))
