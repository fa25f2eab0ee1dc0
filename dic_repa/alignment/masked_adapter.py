"""PixelREPA's head: a small transformer between the tap and the encoder's tokens, which sees only some of the tap's.

A pixel model that must itself give what an encoder keeps of an image loses what the encoder leaves out: REPA made JiT
worse in the end. With a transformer in between, the tap need only hold what the tokens can be computed from.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.alignment.heads import heads, start_as_repa, upsample
from dic_repa.errors import UserError
from dic_repa.models.layers import Modules, timestep_embedding, to_map, to_tokens
from dic_repa.models.sit import position_embedding
from dic_repa.models.transformer_blocks import AdaLNBlock

HEAD_WIDTH = 64  # channels of an attention head, at least
WORD = 0xFFFFFFFF


@heads.register("masked-adapter")
class MaskedAdapterHead(nn.Module):
    """PixelREPA's masked adapter (arXiv 2603.14366): transformer blocks that see a part of the tap's tokens.

    A token of the U-Net's grid is replaced by a learnt one with probability `mask_ratio`; then position embeddings,
    `depth` adaLN-Zero blocks that know the time, and, where the widths differ, linear, LayerNorm, SiLU, linear; then
    bilinear upsampling. All tokens are compared, also the masked ones. The paper's blocks also see the class, which a
    head is not given. In eval mode nothing is masked.

    The mask is a function of an image's time alone (see `masked`). So it is drawn anew with each time, is the same for
    any number of processes and passes, and in a recomputed pass. With DDPM's whole steps, each step has one mask.

    Args:
        depth: transformer blocks; with 0 it is only the projection.
        mask_ratio: share of the tokens that are masked, from 0 on, below 1.
    """

    def __init__(self, channels: int, embed_dim: int, grid: tuple[int, int], depth: int = 2, mask_ratio: float = 0.2):
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise UserError(f"head 'masked-adapter': mask_ratio lies in [0, 1), not at {mask_ratio}")
        if channels % 4:
            raise UserError(f"head 'masked-adapter': the tap's channels must be a multiple of 4, not {channels}")
        self.grid, self.mask_ratio = grid, mask_ratio
        most = max(1, channels // HEAD_WIDTH)
        count = max(count for count in range(1, most + 1) if channels % count == 0)
        self.mask_token = nn.Parameter(torch.zeros(channels))
        self.time1, self.time2 = nn.Linear(256, channels), nn.Linear(channels, channels)
        self.blocks = Modules(AdaLNBlock(channels, count) for _ in range(depth))
        wide = [nn.Linear(channels, channels), nn.LayerNorm(channels), nn.SiLU(), nn.Linear(channels, embed_dim)]
        self.project = nn.Sequential(*wide) if channels != embed_dim else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PixelREPA's: Xavier uniform, N(0, 0.02^2) for the mask token and the time, zero modulations."""
        self.apply(start_as_repa)
        for weight in (self.mask_token, self.time1.weight, self.time2.weight):
            nn.init.normal_(weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)

    def forward(self, feature: Tensor, t: Tensor) -> Tensor:
        size = (feature.shape[-2], feature.shape[-1])
        x = to_tokens(feature)
        if self.training and self.mask_ratio:
            x = torch.where(masked(t, x.shape[1], self.mask_ratio)[..., None], self.mask_token.to(x.dtype), x)
        x = x + position_embedding(size, x.shape[-1], x.device).to(x.dtype)
        c = F.silu(self.time2(F.silu(self.time1(timestep_embedding(t).to(self.time1.weight.dtype)))))
        for block in self.blocks:
            x = block(x, c)
        return to_tokens(upsample(to_map(self.project(x), size), self.grid))


def masked(t: Tensor, count: int, ratio: float) -> Tensor:
    """Which of `count` tokens of each image at times t (B,) are masked, (B, count): each with probability `ratio`.

    The bits of t (float32) and the token's number are mixed to a whole number below 2^32; the token is masked where
    that is below `ratio * 2^32`. Times that differ in their last bit have masks that have nothing in common.
    """
    times = scrambled(t.float().view(torch.int32).long() & WORD)
    tokens = scrambled(torch.arange(1, count + 1, device=t.device))
    return scrambled(times[:, None] ^ tokens) < ratio * 2**32


def scrambled(x: Tensor) -> Tensor:
    """Whole numbers below 2^32, int64, to others, one to one, so that each bit depends on all bits of `x`."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & WORD
    return x ^ (x >> 16)
