"""The shape that DiCo and FCDM share: a U-Net of convolutional blocks that all keep their width.

Three levels of C, 2C and 4C channels; an encoder stage at levels 0 and 1, the middle stage at level 2, a decoder stage
at levels 1 and 0. There is one skip for each level: what its encoder stage gives is concatenated behind the upsampled
map, and a 1x1 convolution merges both. As in DiC each level has a condition embedding of its own width, and taps are
named alike: `mid.3` is the fourth block of the middle stage, `enc.0.2` and `dec.1.0` are blocks of the encoder and
decoder stages, numbered by level.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.conditions import VectorCondition
from dic_repa.errors import UserError
from dic_repa.limits import check_limit
from dic_repa.models.blocks import Downsample, Upsample
from dic_repa.models.layers import Condition, Modules, RecomputableBlock, layout_of
from dic_repa.models.middle import MiddleHeadOption, add_middle_head
from dic_repa.models.pretrained import Classes, Pretrained, Size, config_of

LEVELS = 3
MULTIPLE = 2 ** (LEVELS - 1)  # what height and width are multiples of


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm over the channels, without parameters, of a map (B, C, H, W); modulated by shift and scale
    (B, C, 1, 1)."""
    h = rearrange(x, "b c h w -> b h w c")  # no copy in channels_last, neither this nor back
    h = rearrange(F.layer_norm(h, h.shape[-1:], eps=1e-6), "b h w c -> b c h w")
    return torch.addcmul(shift, h, 1 + scale)


class StageBlock(RecomputableBlock):
    """A block of a stage: x (B, width, H, W) and SiLU(c) (B, width) to (B, width, H, W).

    `modulation` is its linear layer from SiLU(c); it begins at zero, so that the block begins as the identity.
    """

    modulation: nn.Linear

    def __init__(self, width: int, mlp_ratio: int):
        super().__init__()


class Output(nn.Module):
    """LayerNorm over the channels, modulation, and a 3x3 conv to the output's channels; `further_conv` comes first.

    x (B, width, H, W) and SiLU(c) (B, width) to (B, out_channels, H, W).
    """

    def __init__(self, width: int, out_channels: int, further_conv: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1) if further_conv else nn.Identity()
        self.modulation = nn.Linear(width, 2 * width)
        self.conv2 = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        return self.conv2(modulated_norm(self.conv1(x), shift, scale).contiguous(memory_format=layout_of(x)))


class StagedUNet(Pretrained):
    """A velocity (or noise, score, data) model: `model(x, t, y)` with x (B, in_channels, H, W), t (B,), y (B,) int64.

    H and W are any multiples of 4. `y == num_classes` is the null class; with a `condition`, y is (B, dim). The output
    has `in_channels` channels, twice as many with `learn_sigma` (the second half is the variance of a DDPM-trained
    model). Activations are laid out in memory as the weights are, channels_last as in DiC.

    A subclass is a model: it says of which `block` its stages are, which level's width and condition its last stage
    has, and whether a further 3x3 convolution stands before its last layers.

    Args:
        width: C, the channels of level 0; even.
        depths: blocks of the five stages: encoder 0, encoder 1, middle, decoder 1, decoder 0.
        mlp_ratio: how many times wider than its block a block's inner layer is.
        time_scale: multiplies t before its embedding; 1 takes t as it is.
        condition: vectors in place of classes, as `VectorCondition.to_dict` has it.
        two_times: t may be (t, r) (B, 2), for average velocities between the times r and t.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        middle_head: the block that a second head sits on, for internal guidance (`add_middle_head`); then the output is
            twice the channels, the head's prediction behind the model's own.
    """

    block: ClassVar[type[StageBlock]]
    last_level: ClassVar[int]
    further_conv: ClassVar[bool]
    conditions = ("classes", "none", "vector")
    layout: torch.memory_format | None = None  # of the activations, if it is not that of the weights

    def __init__(
        self,
        width: Size,
        depths: tuple[Size, Size, Size, Size, Size],
        mlp_ratio: Size,
        in_channels: Size = 4,
        num_classes: Classes = 1000,
        learn_sigma: bool = False,
        time_scale: float = 1.0,
        condition: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        middle_head: MiddleHeadOption = None,
        two_times: bool = False,
    ):
        super().__init__()
        self.config = config_of(locals())
        self.config["depths"] = list(depths)
        if not condition:
            del self.config["condition"]
        check_limit("blocks", sum(depths), "the number of blocks")
        if width % 2:
            raise UserError(f"width must be an even number, not {width}")
        self.two_times = two_times
        self.in_channels, self.num_classes = in_channels, num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.multiple = MULTIPLE
        widths = [width * 2**level for level in range(LEVELS)]
        decoder_widths = [widths[self.last_level], widths[1]]  # by level, as all of the decoder's
        taken = self.conditioned_on
        vector = taken if isinstance(taken, VectorCondition) else None

        def stage(channels: int, depth: int) -> Modules[StageBlock]:
            return Modules(self.block(channels, mlp_ratio) for _ in range(depth))

        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.condition = Modules(Condition(w, num_classes, time_scale, vector, two_times) for w in widths)
        self.enc = Modules(stage(widths[level], depths[level]) for level in (0, 1))
        self.down = nn.ModuleList(Downsample(w) for w in widths[:2])
        self.mid = stage(widths[2], depths[2])
        self.up = nn.ModuleList(Upsample(w) for w in (decoder_widths[1], widths[2]))
        self.merge = nn.ModuleList(nn.Conv2d(2 * w, out, 1) for w, out in zip(widths, decoder_widths))
        self.dec = Modules(stage(decoder_widths[level], depths[4 - level]) for level in (0, 1))
        self.output = Output(decoder_widths[0], self.out_channels, self.further_conv)

        self.reset_parameters()
        self.set_gradient_checkpointing(gradient_checkpointing)
        self.to(memory_format=torch.channels_last)
        add_middle_head(self, middle_head)

    def reset_parameters(self) -> None:
        """The authors' initial values: Xavier uniform, N(0, 0.02^2) for the embeddings, zero modulations and output."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.stem.weight.flatten(1))  # as the linear layer of a patch embedding
        for condition in self.condition:
            condition.reset_parameters()
        nn.init.zeros_(self.output.modulation.weight)
        nn.init.zeros_(self.output.conv2.weight)
        for block in self.blocks():
            nn.init.zeros_(block.modulation.weight)

    def blocks(self) -> list[StageBlock]:
        """All blocks, in the order in which they run."""
        return [block for stage in (*self.enc, self.mid, self.dec[1], self.dec[0]) for block in stage]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if x.shape[-2] % MULTIPLE or x.shape[-1] % MULTIPLE:
            raise UserError(
                f"{type(self).__name__} takes heights and widths divisible by {MULTIPLE}, not "
                f"{x.shape[-2]}x{x.shape[-1]}"
            )
        c = [condition(t, y) for condition in self.condition]
        layout = self.layout or layout_of(self.output.conv2.weight)
        x = self.stem(x.contiguous(memory_format=layout))
        skips = []
        for level, stage in enumerate(self.enc):
            for block in stage:
                x = block(x, c[level])
            skips.append(x)
            x = self.down[level](x)
        for block in self.mid:
            x = block(x, c[2])
        for level in (1, 0):
            x = self.merge[level](torch.cat([self.up[level](x), skips[level]], dim=1))
            own = c[level or self.last_level]
            for block in self.dec[level]:
                x = block(x, own)
        return self.output(x, c[self.last_level])
