"""Frozen vision transformers of timm, whose patch tokens are the targets: those of a block, or of several combined."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dic_repa.encoders.timm_network import WEIGHTS_OPTION, FrozenNetwork, build_network
from dic_repa.errors import UserError, unknown_name

COMBINE: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "sum": lambda tokens: torch.stack(tokens).sum(dim=0),
    "concat": lambda tokens: torch.cat(tokens, dim=-1),
}


class FrozenViT(FrozenNetwork):
    """A timm ViT as an `Encoder`. A subclass says to which size images are resized.

    Of several blocks each one's tokens pass a LayerNorm without scale and shift, whatever `norm` says, and are then
    combined: RAEv2 (arXiv 2605.18324) sums those of DINOv3's last blocks, its final norm without learnt weights. (Its
    code divides by their number, which a cosine does not see, and adds the last block's mean token, which is not here.)

    Args:
        model: has timm's `forward_intermediates` and `embed_dim`.
        mean, std: of each input channel.
        layer: the index of the block that gives the tokens, -1 for the last; or a list of several.
        norm: whether the tokens pass the final norm, whichever block they come from.
        combine: several blocks' tokens: 'sum', or 'concat' along the width, in the order of the blocks.
    """

    layout = "NLC"

    def __init__(
        self,
        model: Any,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        layer: int | Sequence[int] = -1,
        norm: bool = True,
        combine: str = "sum",
    ):
        super().__init__(model, mean, std, layer, len(model.blocks), "blocks", norm)
        if combine not in COMBINE:
            raise unknown_name("way to combine layers", combine, list(COMBINE))
        self.combine = combine
        self.embed_dim = model.embed_dim * (len(self.layers) if combine == "concat" else 1)

    def features(self, inputs: Tensor) -> Tensor:
        if len(self.layers) == 1:
            return super().features(inputs)
        tokens = self.intermediates(inputs, norm=False)
        return COMBINE[self.combine]([F.layer_norm(each, each.shape[-1:]) for each in tokens])

    def prepare(self, images: Tensor) -> Tensor:
        return self.resize(self.normalise(images))

    def resize(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) at the size that the model is fed."""
        raise NotImplementedError


class TimmViT(FrozenViT):
    """Images (B, 1 or 3, H, W) to the patch tokens of a timm ViT, without its class and register tokens.

    Args:
        model_name: timm's name.
        weights: a safetensors file or plain state dict, in timm's layout or one that is converted to it: those of DINO,
            DINOv2, DINOv3, CLIP, MAE, PE (by timm), MoCo v3 and I-JEPA.
        pretrained: fetch timm's weights from the hub if no file is given; False leaves them random.
        layer: the block that gives the tokens, or a list of several.
        pixels_per_token: pixels of the image, in each direction, for one token. Images are resized (bicubic) to fit,
            and position embeddings to the grid. With 16, as in REPA, 256 px give 16x16 tokens for any patch size.
        norm: whether the tokens pass the model's final norm.
        combine: several blocks' tokens: 'sum', or 'concat' along the width.
        mean, std: of each channel; by default timm's.
        weights_from: where to fetch the weights by hand, if timm has none.
        model_args: go to `timm.create_model`.

    Raises:
        UserError: an unknown model, no ViT, or weights that cannot be fetched or do not fit.
    """

    def __init__(
        self,
        model_name: str,
        weights: str | PathLike | None = None,
        pretrained: bool = True,
        layer: int | list[int] = -1,
        pixels_per_token: int = 16,
        norm: bool = True,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        weights_from: str = "",
        combine: str = "sum",
        **model_args: Any,
    ):
        if weights_from and pretrained and weights is None:
            raise UserError(
                f"timm has no weights of this '{model_name}'; fetch them from {weights_from} and give "
                f"{WEIGHTS_OPTION}, or pretrained=False for random ones"
            )
        if pixels_per_token < 1:
            raise UserError(f"pixels_per_token must be at least 1, not {pixels_per_token}")
        options = {**model_args, "dynamic_img_size": True}
        model = build_network(model_name, weights, pretrained, options, " as a ViT of any image size")
        config = model.pretrained_cfg
        super().__init__(model, mean or config["mean"], std or config["std"], layer, norm, combine)
        self.pixels_per_token = pixels_per_token

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The tokens (h, w) for images of `size` (H, W): the size over `pixels_per_token`, rounded, at least 1."""
        h, w = (max(1, round(side / self.pixels_per_token)) for side in size)
        return h, w

    def resize(self, images: Tensor) -> Tensor:
        grid = self.token_grid((images.shape[-2], images.shape[-1]))
        h, w = (count * patch for count, patch in zip(grid, self.model.patch_embed.patch_size))
        return images if images.shape[-2:] == (h, w) else F.interpolate(images, (h, w), mode="bicubic")
