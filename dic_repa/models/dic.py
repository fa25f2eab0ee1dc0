"""DiC, the diffusion U-Net of 3x3 convolutions (arXiv 2501.00603).

Three levels of C, 2C and 4C channels; an encoder stage at levels 0 and 1, the middle stage at level 2, a decoder
stage at levels 1 and 0. The skips are *sparse*, one in three blocks; each level has a condition embedding of its own
width; a block is modulated between its two convolutions. The paper's earlier steps are options: `shape`, `skips`,
`embedding` and `block`; their defaults are DiC. For other latents than 4x32x32 it may have any number of levels, not
all of them downsampled (`depths`, `strides`), and a wide head for many channels.

Any submodule's name is a tap for the alignment: `mid.3` is the fourth block of the middle stage, `enc.0.2` and
`dec.1.0` are blocks of the encoder and decoder stages, numbered by level.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dic_repa.conditions import VectorCondition
from dic_repa.errors import UserError, unknown_name
from dic_repa.limits import check_limit
from dic_repa.models.blocks import Block, Downsample, Output, Upsample, blocks
from dic_repa.models.layers import Condition, Modules, layout_of
from dic_repa.models.middle import MiddleHeadOption, add_middle_head
from dic_repa.models.pretrained import Classes, Pretrained, Size, config_of
from dic_repa.models.wide_head import WideHead, WideHeadOption, read_wide_head

PRESETS: dict[str, dict[str, Any]] = {
    "DiC-S": {"width": 96, "depths": (6, 6, 5, 6, 6)},
    "DiC-B": {"width": 192, "depths": (6, 6, 5, 6, 6)},
    "DiC-XL": {"width": 384, "depths": (7, 7, 8, 7, 7)},
    "DiC-H": {"width": 384, "depths": (14, 14, 10, 14, 14)},
    "DiC-XL/f16": {"width": 768, "depths": (15, 8, 15)},
    "DiC-XL/f16-wide": {"width": 768, "depths": (9, 8, 9), "wide_head": {"width": 1536, "depth": 2}},
    "DiC-XL/f32": {"width": 768, "depths": (9, 18, 9), "strides": (1,)},
}
"""Arguments of `DiC` by name: the paper's sizes, and ours for autoencoders that downsample by 16 and 32.

All of ours have a middle stage of 8x8 positions at 256 px, as DiC-XL has, and about its 36 blocks.

- f16: of 32x16x16 latents, 858.6 M parameters and 116.6 GMACs (DiC-XL: 702 M, 116.1). A weight has a quarter of the
  positions that it has at 32x32, so level 0 is twice as wide, and there are two levels: a third of 3072 channels and
  4x4 positions would hold most of the weights and few of the MACs.
- f16-wide: the same for 768x16x16, as RAE has: 846.3 M, 116.7 GMACs, a quarter of them in the wide head. Its stem has
  no bottleneck: the features of an encoder are not known to lie near fewer dimensions, as pixels do.
- f32: of 32x8x8, 1,168.6 M, 64.3 GMACs. With 64 positions 116 GMACs would take over 1.8 billion weights. The
  middle stage is wider, but not downsampled.
"""
SHAPES = {"unet": 2, "isotropic": 1}  # how many times wider each level is; where it is 1, nothing is resampled
SKIP_STRIDES = {"sparse": 3, "dense": 1, "none": 0}
EMBEDDINGS = ("per-level", "shared")


class DiC(Pretrained):
    """A velocity (or noise, score, data) model: `model(x, t, y)` with x (B, in_channels, H, W), t (B,), y (B,) int64.

    H and W are any multiples of 4 patches (of all `strides`). `y == num_classes` is the null class; with a `condition`,
    y is (B, dim). The output has `in_channels` channels, twice as many with `learn_sigma` (the second half is the
    variance of a DDPM-trained model). Activations are laid out in memory as the weights are: channels_last, unless the
    model is moved `to(memory_format=torch.contiguous_format)`.

    Args:
        width: C, the channels of level 0; even. Each further level has twice as many.
        depths: blocks of the stages: encoder 0, encoder 1, ..., middle, ..., decoder 1, decoder 0. Five are DiC's three
            levels; three are two levels.
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
        strides: from each level to the next, 2, or 1 for a level that is wider and not downsampled; 2 everywhere by
            default.
        stem_bottleneck: a 1x1 convolution to so many channels before the stem, for data of many channels that lie near
            fewer dimensions (JiT, arXiv 2511.13720). What it drops of the noise, only a `wide_head` can predict.
        wide_head: {width, depth} of further blocks at the end that see the noisy input itself (`WideHead`).
    """

    conditions = ("classes", "none", "vector")
    layout: torch.memory_format | None = None  # of the activations, if it is not that of the weights

    def __init__(
        self,
        width: Size,
        depths: tuple[Size, ...],
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
        strides: tuple[Literal[1, 2], ...] | None = None,
        stem_bottleneck: Size | None = None,
        wide_head: WideHeadOption = None,
    ):
        super().__init__()
        self.config = config_of(locals())
        self.config["depths"] = list(depths)
        if not condition:
            del self.config["condition"]
        channels = in_channels * patch_size**2  # as level 0 sees them
        head = read_wide_head(wide_head, channels) if wide_head else None
        check_limit("blocks", sum(depths) + (head[1] if head else 0), "the number of blocks")
        if width < 2 or width % 2:
            raise UserError(f"width must be an even number of at least 2, not {width}")
        choices = {"shape": SHAPES, "skips": SKIP_STRIDES, "embedding": EMBEDDINGS}
        for kind, known in choices.items():
            if self.config[kind] not in known:
                raise unknown_name(kind, self.config[kind], known)
        self.strides = read_strides(depths, strides, shape)
        if strides:
            self.config["strides"] = list(strides)
        levels = len(self.strides) + 1
        self.two_times = two_times
        self.in_channels, self.num_classes, self.patch_size = in_channels, num_classes, patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.multiple = patch_size * math.prod(self.strides)  # what H and W are multiples of
        self.skip_stride = SKIP_STRIDES[skips]
        widths = [width * SHAPES[shape] ** level for level in range(levels)]
        condition_widths = widths if embedding == "per-level" else [width] * levels
        encoder_depths, middle_depth = depths[: levels - 1], depths[levels - 1]
        decoder_depths = depths[: levels - 1 : -1]  # by level too
        resampled = shape == "unet"
        make = blocks.find(block)

        self.patchify = nn.PixelUnshuffle(patch_size) if patch_size > 1 else nn.Identity()
        narrow = stem_bottleneck or channels
        self.bottleneck = nn.Conv2d(channels, narrow, 1, bias=False) if stem_bottleneck else nn.Identity()
        self.stem = nn.Conv2d(narrow, width, 3, padding=1)
        taken = self.conditioned_on
        vector = taken if isinstance(taken, VectorCondition) else None
        self.condition = Modules(
            Condition(w, num_classes, time_scale, vector, two_times)
            for w in (widths if embedding == "per-level" else widths[:1])
        )
        self.enc: Modules[Modules[Block]] = Modules(
            Modules(make(w, w, c) for _ in range(depth))
            for w, c, depth in zip(widths, condition_widths, encoder_depths)
        )
        steps = list(zip(widths, widths[1:], self.strides))  # between the levels
        self.down = nn.ModuleList(Downsample(w, s) if resampled else nn.Identity() for w, _, s in steps)
        self.mid: Modules[Block] = Modules(
            make(widths[-1], widths[-1], condition_widths[-1]) for _ in range(middle_depth)
        )
        self.up = nn.ModuleList(Upsample(w, s) if resampled else nn.Identity() for _, w, s in steps)
        self.dec: Modules[Modules[Block]] = Modules()
        for w, c, depth, encoder_depth in zip(widths, condition_widths, decoder_depths, encoder_depths):
            given, takes = len(pushing_blocks(encoder_depth, self.skip_stride)), popping_blocks(depth, self.skip_stride)
            if len(takes) > given:
                raise UserError(
                    f"a decoder stage of {depth} blocks needs {len(takes)} skips, its encoder stage gives {given}"
                )
            self.dec.append(Modules(make(2 * w if j in takes else w, w, c) for j in range(depth)))
        self.wide_head = WideHead(*head, channels, width, condition_widths[0], make) if head else None
        self.output = Output(head[0] if head else width, self.out_channels * patch_size**2, condition_widths[0])
        self.unpatchify = nn.PixelShuffle(patch_size) if patch_size > 1 else nn.Identity()

        self.reset_parameters(zero_gates)
        self.set_gradient_checkpointing(gradient_checkpointing)
        self.to(memory_format=torch.channels_last)
        add_middle_head(self, middle_head)

    @classmethod
    def from_preset(cls, name: str, in_channels: int = 4, num_classes: int = 1000, **overrides) -> DiC:
        """One of the `PRESETS`, such as DiC-XL. `overrides` are any of the constructor's arguments."""
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
        return cls(**{**PRESETS[name], "in_channels": in_channels, "num_classes": num_classes, **overrides})

    @property
    def end_layers(self) -> tuple[str, ...]:
        """Layers that Muon leaves to AdamW, beside the first and the last one."""
        return ("wide_head.stem",) if self.wide_head is not None else ()

    def reset_parameters(self, zero_gates: bool = False) -> None:
        """The authors' initial values (Xavier uniform; N(0, 0.02^2) for the embeddings; a zero output)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for stem in (self.stem, *([] if self.wide_head is None else [self.wide_head.stem])):
            nn.init.xavier_uniform_(stem.weight.flatten(1))  # as the linear layer of a patch embedding
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
        stages = [*self.enc, self.mid, *reversed([*self.dec])]
        if self.wide_head is not None:
            stages.append(self.wide_head.blocks)
        return [block for stage in stages for block in stage]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if x.shape[-2] % self.multiple or x.shape[-1] % self.multiple:
            raise UserError(
                f"DiC takes heights and widths divisible by {self.multiple}, not {x.shape[-2]}x{x.shape[-1]}"
            )
        c = [condition(t, y) for condition in self.condition]
        c = c * (len(self.strides) + 1) if len(c) == 1 else c
        # Not the stem's: of one channel it would be both. Of sharded weights, the output's are whole by now.
        layout = self.layout or layout_of(self.output.conv1.weight)
        noisy = self.patchify(x).contiguous(memory_format=layout)
        x = self.stem(self.bottleneck(noisy))
        skips = []
        for level, stage in enumerate(self.enc):
            pushing = pushing_blocks(len(stage), self.skip_stride)
            for j, block in enumerate(stage):
                x = block(x, c[level])
                if j in pushing:
                    skips.append(x)
            x = self.down[level](x)
        for block in self.mid:
            x = block(x, c[-1])
        for level in reversed(range(len(self.dec))):
            x = self.up[level](x)
            popping = popping_blocks(len(self.dec[level]), self.skip_stride)
            for j, block in enumerate(self.dec[level]):
                if j in popping:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, c[level])
        if self.wide_head is not None:
            x = self.wide_head(noisy, x, c[0])
        return self.unpatchify(self.output(x, c[0]))


def read_strides(depths: tuple[int, ...], strides: tuple[int, ...] | None, shape: str) -> tuple[int, ...]:
    """The stride from each level to the next; a UserError for stages or strides that do not fit each other."""
    if len(depths) % 2 == 0:
        raise UserError(
            f"depths has {len(depths)} stages; give an odd number, such as [14, 8, 14]: encoder, middle, decoder"
        )
    steps = len(depths) // 2
    if shape == "isotropic":
        if strides:
            raise UserError("strides are between the levels of shape unet; isotropic resamples nothing: leave them out")
        return (1,) * steps
    if strides is not None and len(strides) != steps:
        raise UserError(f"strides has {len(strides)} entries; {len(depths)} stages have {steps} steps between levels")
    return (2,) * steps if strides is None else tuple(strides)


def pushing_blocks(depth: int, stride: int = 3) -> set[int]:
    """The blocks of an encoder stage whose output becomes a skip: every third, counted back from the last."""
    return {j for j in range(depth) if stride and (depth - 1 - j) % stride == 0}


def popping_blocks(depth: int, stride: int = 3) -> set[int]:
    """The blocks of a decoder stage that take the newest skip: every third, counted from the first."""
    return {j for j in range(depth) if stride and j % stride == 0}
