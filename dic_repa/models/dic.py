"""DiC, the diffusion U-Net of 3x3 convolutions (arXiv 2501.00603).

Three levels of C, 2C and 4C channels; an encoder stage at levels 0 and 1, the middle stage at level 2, a decoder
stage at levels 1 and 0. The skips are *sparse*, one in three blocks; each level has a condition embedding of its own
width; a block is modulated between its two convolutions. The paper's earlier steps are options: `shape`, `skips`,
`embedding` and `block`; their defaults are DiC.

Any submodule's name is a tap for the alignment: `mid.3` is the fourth block of the middle stage, `enc.0.2` and
`dec.1.0` are blocks of the encoder and decoder stages, numbered by level.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.conditions import VectorCondition
from dic_repa.errors import UserError, unknown_name
from dic_repa.limits import check_limit
from dic_repa.models.layers import Condition, Modules, RecomputableBlock, layout_of, pixel_shuffle
from dic_repa.models.middle import MiddleHeadOption, add_middle_head
from dic_repa.models.pretrained import Classes, Pretrained, Size, config_of
from dic_repa.registry import Registry

PRESETS: dict[str, dict[str, Any]] = {
    "DiC-S": {"width": 96, "depths": (6, 6, 5, 6, 6)},
    "DiC-B": {"width": 192, "depths": (6, 6, 5, 6, 6)},
    "DiC-XL": {"width": 384, "depths": (7, 7, 8, 7, 7)},
    "DiC-H": {"width": 384, "depths": (14, 14, 10, 14, 14)},
}
"""The paper's sizes: arguments of `DiC` by name."""
SHAPES = {"unet": (1, 2, 4), "isotropic": (1, 1, 1)}  # widths of the levels; where they are one, nothing is resampled
SKIP_STRIDES = {"sparse": 3, "dense": 1, "none": 0}
EMBEDDINGS = {"per-level": 3, "shared": 1}
blocks = Registry("block", key="model.options.block")


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of min(32, channels / 4) groups, or of the next fewer that divide the channels evenly."""
    groups = next(g for g in range(max(1, min(32, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


@blocks.register("dic")
class Block(RecomputableBlock):
    """GroupNorm, GELU, conv; GroupNorm, modulate, GELU, conv; gate; plus the input.

    x (B, in_channels, H, W) and c (B, condition width) to (B, channels, H, W).
    """

    gated = True

    def __init__(self, in_channels: int, channels: int, condition_width: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.modulation = nn.Linear(condition_width, 3 * channels)
        self.norm2 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        gate, scale, shift = self.modulation(c)[:, :, None, None].chunk(3, dim=1)
        h = self.conv1(F.gelu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)  # one pass over memory, not two, where nothing is compiled
        h = self.conv2(F.gelu(h))
        return torch.addcmul(self.shortcut(x), gate, h)


@blocks.register("gated")
class GatedBlock(Block):
    """DiC's block with SiLU instead of GELU."""

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        *gate, scale, shift = self.modulation(c)[:, :, None, None].chunk(2 + self.gated, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.shortcut(x) + (gate[0] * h if gate else h)


@blocks.register("mid-modulation")
class MidModulationBlock(GatedBlock):
    """Modulated between its convolutions, without a gate: GroupNorm, SiLU, conv; GroupNorm, modulate, SiLU, conv."""

    gated, early = False, False

    def __init__(self, in_channels: int, channels: int, condition_width: int):
        super().__init__(in_channels, channels, condition_width)
        self.modulation = nn.Linear(condition_width, 2 * (in_channels if self.early else channels))


@blocks.register("early-modulation")
class EarlyModulationBlock(MidModulationBlock):
    """Modulated before its first convolution, no gate: GroupNorm, modulate, SiLU, conv; GroupNorm, SiLU, conv."""

    early = True

    def _forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x) * (1 + scale) + shift))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Downsample(nn.Module):
    """Halve height and width, double the channels: a 3x3 conv to half the channels, then pixel-unshuffle."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.conv(x), 2)


class Upsample(nn.Module):
    """Double height and width, halve the channels: a 3x3 conv to twice the channels, then pixel-shuffle."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * 2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle(self.conv(x))


class Output(nn.Module):
    """A 3x3 conv, LayerNorm over the channels, modulation, and a 3x3 conv to the output's channels."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * width)
        self.conv2 = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = rearrange(self.conv1(x), "b c h w -> b h w c")  # no copy in channels_last, neither this nor back
        h = rearrange(F.layer_norm(h, h.shape[-1:], eps=1e-6), "b h w c -> b c h w")
        return self.conv2((h * (1 + scale) + shift).contiguous(memory_format=layout_of(x)))


class DiC(Pretrained):
    """A velocity (or noise, score, data) model: `model(x, t, y)` with x (B, in_channels, H, W), t (B,), y (B,) int64.

    H and W are any multiples of 4 patches. `y == num_classes` is the null class; with a `condition`, y is (B, dim). The
    output has `in_channels` channels, twice as many with `learn_sigma` (the second half is the variance of a
    DDPM-trained model). Activations are laid out in memory as the weights are: channels_last, unless the model is moved
    `to(memory_format=torch.contiguous_format)`.

    Args:
        width: C, the channels of level 0; even.
        depths: blocks of the stages (encoder 0, encoder 1, middle, decoder 1, decoder 0).
        patch_size: the side of the squares of pixels that level 0 sees as one (pixel-unshuffle): with 2, a step takes a
            quarter of the time, which suits data in pixels.
        time_scale: multiplies t before its embedding; 1 takes t as it is, as SiT and REPA do.
        two_times: t may be (t, r) (B, 2), for average velocities between the times r and t.
        shape: 'unet', or 'isotropic': all levels as wide as the first, and no resampling between them.
        skips: 'sparse' (one in three blocks), 'dense' (every block) or 'none'.
        embedding: 'per-level', or 'shared': one condition embedding as wide as level 0.
        condition: vectors in place of classes, as `VectorCondition.to_dict` has it.
        block: 'dic', or an earlier step's: 'gated', 'mid-modulation', 'early-modulation'.
        zero_gates: start each block as the identity. The authors' code means to, but does not: theirs is the default.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        middle_head: the block that a second head sits on, for internal guidance (`add_middle_head`); then the output is
            twice the channels, the head's prediction behind the model's own.
    """

    conditions = ("classes", "none", "vector")
    layout: torch.memory_format | None = None  # of the activations, if it is not that of the weights

    def __init__(
        self,
        width: Size,
        depths: tuple[Size, Size, Size, Size, Size],
        in_channels: Size = 4,
        num_classes: Classes = 1000,
        learn_sigma: bool = False,
        time_scale: float = 1.0,
        zero_gates: bool = False,
        gradient_checkpointing: bool = False,
        shape: str = "unet",
        skips: str = "sparse",
        embedding: str = "per-level",
        block: str = "dic",
        condition: dict[str, Any] | None = None,
        patch_size: Size = 1,
        middle_head: MiddleHeadOption = None,
        two_times: bool = False,
    ):
        super().__init__()
        self.config = config_of(locals())
        self.config["depths"] = list(depths)
        if not condition:
            del self.config["condition"]
        check_limit("blocks", sum(depths), "the number of blocks")
        if width < 2 or width % 2:
            raise UserError(f"width must be an even number of at least 2, not {width}")
        choices: dict[str, dict[str, Any]] = {"shape": SHAPES, "skips": SKIP_STRIDES, "embedding": EMBEDDINGS}
        for kind, known in choices.items():
            if self.config[kind] not in known:
                raise unknown_name(kind, self.config[kind], known)
        self.two_times = two_times
        self.in_channels, self.num_classes, self.patch_size = in_channels, num_classes, patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.skip_stride = SKIP_STRIDES[skips]
        widths = tuple(width * multiple for multiple in SHAPES[shape])
        condition_widths = widths if embedding == "per-level" else (width,) * 3
        encoder_depths, middle_depth, decoder_depths = depths[:2], depths[2], depths[:2:-1]  # decoder's by level too
        resampled = shape == "unet"
        make = blocks.find(block)

        self.patchify = nn.PixelUnshuffle(patch_size) if patch_size > 1 else nn.Identity()
        self.stem = nn.Conv2d(in_channels * patch_size**2, width, 3, padding=1)
        taken = self.conditioned_on
        vector = taken if isinstance(taken, VectorCondition) else None
        self.condition = Modules(
            Condition(w, num_classes, time_scale, vector, two_times) for w in condition_widths[: EMBEDDINGS[embedding]]
        )
        self.enc: Modules[Modules[Block]] = Modules(
            Modules(make(w, w, c) for _ in range(depth))
            for w, c, depth in zip(widths, condition_widths, encoder_depths)
        )
        self.down = nn.ModuleList(Downsample(w) if resampled else nn.Identity() for w in widths[:2])
        self.mid: Modules[Block] = Modules(make(widths[2], widths[2], condition_widths[2]) for _ in range(middle_depth))
        self.up = nn.ModuleList(Upsample(w) if resampled else nn.Identity() for w in widths[1:])
        self.dec: Modules[Modules[Block]] = Modules()
        for w, c, depth, encoder_depth in zip(widths, condition_widths, decoder_depths, encoder_depths):
            given, takes = len(pushing_blocks(encoder_depth, self.skip_stride)), popping_blocks(depth, self.skip_stride)
            if len(takes) > given:
                raise UserError(
                    f"a decoder stage of {depth} blocks needs {len(takes)} skips, its encoder stage gives {given}"
                )
            self.dec.append(Modules(make(2 * w if j in takes else w, w, c) for j in range(depth)))
        self.output = Output(width, self.out_channels * patch_size**2)
        self.unpatchify = nn.PixelShuffle(patch_size) if patch_size > 1 else nn.Identity()

        self.reset_parameters(zero_gates)
        self.set_gradient_checkpointing(gradient_checkpointing)
        self.to(memory_format=torch.channels_last)
        add_middle_head(self, middle_head)

    @classmethod
    def from_preset(cls, name: str, in_channels: int = 4, num_classes: int = 1000, **overrides) -> DiC:
        """One of the paper's sizes: DiC-S, DiC-B, DiC-XL, DiC-H. `overrides` are any of the constructor's arguments."""
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
        return cls(**{**PRESETS[name], "in_channels": in_channels, "num_classes": num_classes, **overrides})

    def reset_parameters(self, zero_gates: bool = False) -> None:
        """The authors' initial values (Xavier uniform; N(0, 0.02^2) for the embeddings; a zero output)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.stem.weight.flatten(1))  # the stem as the linear layer of a patch embedding
        for condition in self.condition:
            condition.reset_parameters()
        nn.init.zeros_(self.output.modulation.weight)
        nn.init.zeros_(self.output.conv2.weight)
        if zero_gates:
            for block in self.blocks():
                if not block.gated:
                    raise UserError(f"zero_gates needs blocks with gates, not '{self.config['block']}'")
                nn.init.zeros_(block.modulation.weight[: block.conv2.out_channels])

    def blocks(self) -> list[Block]:
        """All blocks, in the order in which they run."""
        return [*self.enc[0], *self.enc[1], *self.mid, *self.dec[1], *self.dec[0]]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if x.shape[-2] % (step := 4 * self.patch_size) or x.shape[-1] % step:
            raise UserError(f"DiC takes heights and widths divisible by {step}, not {x.shape[-2]}x{x.shape[-1]}")
        c = [condition(t, y) for condition in self.condition]
        c = c * 3 if len(c) == 1 else c
        # Not the stem's: of one channel it would be both. Of sharded weights, the output's are whole by now.
        layout = self.layout or layout_of(self.output.conv1.weight)
        x = self.stem(self.patchify(x).contiguous(memory_format=layout))
        skips = []
        for level in (0, 1):
            pushing = pushing_blocks(len(self.enc[level]), self.skip_stride)
            for j, block in enumerate(self.enc[level]):
                x = block(x, c[level])
                if j in pushing:
                    skips.append(x)
            x = self.down[level](x)
        for block in self.mid:
            x = block(x, c[2])
        for level in (1, 0):
            x = self.up[level](x)
            popping = popping_blocks(len(self.dec[level]), self.skip_stride)
            for j, block in enumerate(self.dec[level]):
                if j in popping:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, c[level])
        return self.unpatchify(self.output(x, c[0]))


def pushing_blocks(depth: int, stride: int = 3) -> set[int]:
    """The blocks of an encoder stage whose output becomes a skip: every third, counted back from the last."""
    return {j for j in range(depth) if stride and (depth - 1 - j) % stride == 0}


def popping_blocks(depth: int, stride: int = 3) -> set[int]:
    """The blocks of a decoder stage that take the newest skip: every third, counted from the first."""
    return {j for j in range(depth) if stride and j % stride == 0}
