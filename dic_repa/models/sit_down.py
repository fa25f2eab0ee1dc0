"""SiT↓, the network of the U-REPA paper (arXiv 2503.18414): a SiT with a U shape.

Of three parts of transformer blocks, the encoder and the decoder see all tokens and the middle a quarter of them, of
the same width. A 3x3 convolution and pixel-unshuffle lead down, a convolution and pixel-shuffle up, as in U-DiT (arXiv
2405.02730), and each block of the decoder takes in what its counterpart of the encoder gave. Blocks have rotary
position embeddings and gated MLPs, the paper's "tricks".

Stated by the paper (table 2, section 3.2): widths, heads, blocks in the parts, one downsampling, skips, RoPE, SwiGLU.
By its author (DiC tracker, issue 2): U-DiT's down- and upsampling, width kept, no attention on downsampled tokens, SiT
and training as in REPA's code. Not stated, but inferred, since so table 2's parameters come out to the last printed
digit for B, L and XL, with REPA's projector and fixed position embeddings counted too:

- the convolutions between the parts have no bias, and lie between the encoder's last block, the middle's and the
  decoder's first;
- a skip joins by concatenation and a linear layer in front of each block of the decoder, as in U-ViT;
- the middle has a condition embedding of its own, as the levels of U-DiT and DiC have;
- the SwiGLU is VisionLLaMA's: 2/3 of 4 x width rounded up to a multiple of 256, without biases.

Our choice, which no number tells: the skip of the last encoder block goes to the first of the decoder, and so on; the
fixed position embeddings are added to the patches, as in REPA's code, and not again in the middle; rotary positions are
counted in each part's own grid; convolutions start from Xavier's weights, as in U-DiT; size S.

Taps are `enc.N`, `mid.N` and `dec.N`. The paper counts the blocks of XL from 1 to 36: 1 to 10 are `enc.0` to `enc.9`,
11 to 26 `mid.0` to `mid.15`, 27 to 36 `dec.0` to `dec.9`. So its depths 4, 18 and 32 are `enc.3`, `mid.7` and `dec.5`.
"""

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from dic_repa.errors import UserError
from dic_repa.limits import check_limit
from dic_repa.models.blocks import Downsample, Upsample
from dic_repa.models.layers import Condition, Modules, to_map, to_tokens, unpatchify
from dic_repa.models.middle import MiddleHeadOption, add_middle_head
from dic_repa.models.pretrained import Classes, Pretrained, Size, config_of
from dic_repa.models.sit import Output, position_embedding
from dic_repa.models.transformer_blocks import LlamaLayerNormBlock


class SkipBlock(LlamaLayerNormBlock):
    """A block with a linear layer in front that takes a second input (B, N, C) in."""

    def __init__(self, width: int, num_heads: int):
        super().__init__(width, num_heads)
        self.skip = nn.Linear(2 * width, width)

    def _forward(self, x: Tensor, c: Tensor, *others: Tensor) -> Tensor:
        *places, skip = others
        return super()._forward(self.skip(torch.cat([x, skip], dim=-1)), c, *places)


class SiTDown(Pretrained):
    """A velocity (or noise, score, data) model: `model(x, t, y)` with x (B, in_channels, H, W), t (B,), y (B,) int64.

    H and W are any multiples of `2 patch_size`. `y == num_classes` is the null class. The output has `in_channels`
    channels, twice as many with `learn_sigma` (the second half is the variance of a DDPM-trained model).

    Args:
        width: channels of a token; of each of the `num_heads` heads a multiple of 4.
        depths: blocks of the encoder, the middle and the decoder, which has as many as the encoder.
        time_scale: multiplies t before its embedding; 1 takes t as it is.
        two_times: t may be (t, r) (B, 2), for average velocities between the times r and t.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        middle_head: the block that a second head sits on, for internal guidance (`add_middle_head`); then the output is
            twice the channels, the head's prediction behind the model's own.
    """

    def __init__(
        self,
        width: Size,
        depths: tuple[Size, Size, Size],
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
        self.config["depths"] = list(depths)
        check_limit("blocks", sum(depths), "the number of blocks")
        encoder, middle, decoder = depths
        if encoder != decoder:
            raise UserError(
                f"a decoder of {decoder} blocks needs {decoder} skips, and an encoder of {encoder} blocks gives "
                f"{encoder}: give both the same number"
            )
        if width % (4 * num_heads):
            raise UserError(f"width must be a multiple of 4 num_heads, {4 * num_heads}, not {width}")
        self.two_times, self.num_heads = two_times, num_heads
        self.in_channels, self.num_classes, self.patch_size = in_channels, num_classes, patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.multiple = 2 * patch_size  # what H and W are multiples of

        self.patches = PatchEmbed(None, patch_size, in_channels, width)
        self.condition = Modules(Condition(width, num_classes, time_scale, two_times=two_times) for _ in range(2))
        self.enc = Modules(LlamaLayerNormBlock(width, num_heads) for _ in range(encoder))
        self.down = Downsample(width, widening=1)
        self.mid = Modules(LlamaLayerNormBlock(width, num_heads) for _ in range(middle))
        self.up = Upsample(width, narrowing=1)
        self.dec = Modules(SkipBlock(width, num_heads) for _ in range(decoder))
        self.output = Output(width, self.out_channels * patch_size**2)
        self.reset_parameters()
        self.set_gradient_checkpointing(gradient_checkpointing)
        add_middle_head(self, middle_head)

    def reset_parameters(self) -> None:
        """SiT's initial values: Xavier uniform, N(0, 0.02^2) for the embeddings, zero modulations and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patches.proj.weight.flatten(1))  # as the linear layer that it is
        for condition in self.condition:
            condition.reset_parameters()
        for block in self.blocks():
            block.reset_parameters()
        for layer in (self.output.modulation, self.output.linear):
            nn.init.zeros_(layer.weight)

    def blocks(self) -> list[LlamaLayerNormBlock]:
        """All blocks, in the order in which they run: the paper's numbers, from 1 on."""
        return [*self.enc, *self.mid, *self.dec]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        grid = self.grid((x.shape[-2], x.shape[-1]))
        half = grid[0] // 2, grid[1] // 2
        c, middle_c = (condition(t, y) for condition in self.condition)
        x = self.patches(x)
        width = x.shape[-1] // self.num_heads
        places, half_places = (LlamaLayerNormBlock.places(width, each, x.device) for each in (grid, half))
        x = x + position_embedding(grid, x.shape[-1], x.device).to(x.dtype)
        skips = []
        for block in self.enc:
            x = block(x, c, *places)
            skips.append(x)
        x = to_tokens(self.down(to_map(x, grid)))
        for block in self.mid:
            x = block(x, middle_c, *half_places)
        x = to_tokens(self.up(to_map(x, half)))
        for block in self.dec:
            x = block(x, c, *places, skips.pop())
        return unpatchify(self.output(x, c), grid, self.patch_size)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of all tokens, for data of `size` (H, W); a UserError if `multiple` does not divide it."""
        height, width = size
        if height % self.multiple or width % self.multiple:
            raise UserError(
                f"SiT-down takes heights and widths divisible by {self.multiple}, twice its patch size, not "
                f"{height}x{width}"
            )
        return height // self.patch_size, width // self.patch_size

    def feature_map(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """A block's tokens (B, N, C) as a map (B, C, h, w), for data of `size` (H, W): half as high and wide if they
        are the middle's."""
        rows, columns = self.grid(size)
        whole = tokens.shape[1] == rows * columns
        return to_map(tokens, (rows, columns) if whole else (rows // 2, columns // 2))
