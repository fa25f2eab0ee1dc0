"""`digits-vit`: the embedded teacher of the digit recipes, a stand-in for DINOv2 that fits in the package.

A convolutional stem to 7x7 tokens, then three transformer blocks. `train_digits` trained it to give the digit from
the mean of the tokens, and each patch's pixels from its token, so that the tokens of an image differ.
"""

from os import PathLike
from pathlib import Path

from timm.layers import HybridEmbed
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.encoders.base import IN_PACKAGE, Card, register_encoder
from dic_repa.encoders.timm_vit import FrozenViT
from dic_repa.errors import MISTAKES, UserError, first_line
from dic_repa.files.reading import parse_json
from dic_repa.files.weights import check_shapes, load_weights, read_tensors, without_memory
from dic_repa.limits import check_limit

IMAGE_SIZE = 28
HEAD_WIDTH = 32
MEAN, STD = (0.13,), (0.31,)


def build_digits_vit(embed_dim: int = 96, depth: int = 3, stem_width: int = 24) -> VisionTransformer:
    """The network without weights: (B, 1, 28, 28), normalised, to 49 tokens."""

    def conv(channels_in: int, channels_out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.GELU(),
        )

    def embed(patch_size, **options) -> HybridEmbed:
        # Convolutions instead of a linear patch embedding, from which a ViT learns far too slowly with 8,000 images.
        stem = nn.Sequential(conv(1, stem_width), conv(stem_width, 2 * stem_width))
        return HybridEmbed(stem, patch_size=1, **options)

    return VisionTransformer(
        img_size=IMAGE_SIZE,
        in_chans=1,
        num_classes=0,
        embed_layer=embed,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // HEAD_WIDTH,
        mlp_ratio=2,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    )


@register_encoder("digits-vit")
class DigitsViT(FrozenViT):
    """Digits (B, 1 or 3, H, W), of any size, to 7x7 tokens of width 96.

    Args:
        weights: a file of `python -m dic_repa.training.train_digits encoder --out`; by default the package's own.
        layer: the block that gives the tokens, or a list of several.
        combine: several blocks' tokens: 'sum', or 'concat' along the width (see `FrozenViT`).
    """

    card = Card(96, 4, 49, 0.2, IN_PACKAGE, "Apache-2.0")

    def __init__(self, weights: str | PathLike | None = None, layer: int | list[int] = -1, combine: str = "sum"):
        path = weights or Path(__file__).parent / "weights" / "digits_vit.safetensors"
        state, metadata = read_tensors(path)
        if "config" not in metadata:
            raise UserError(f"'{path}' has no config among its metadata; write it with train_digits encoder --out")
        try:
            config = parse_json(metadata["config"])
            check_limit("blocks", config.get("depth", 3), f"depth in the config of '{path}'")
            if sketch := without_memory(lambda: build_digits_vit(**config)):
                check_shapes(sketch, {name: tensor.shape for name, tensor in state.items()}, path)
            model = build_digits_vit(**config)
        except UserError:
            raise
        except MISTAKES as error:
            raise UserError(f"the config of '{path}' describes no such encoder: {first_line(error)}") from None
        load_weights(model, state, path)
        super().__init__(model, MEAN, STD, layer, combine=combine)

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(7, 7) for images of any `size` (H, W): they are resized to 28x28."""
        return self.model.patch_embed.grid_size

    def resize(self, images: Tensor) -> Tensor:
        if images.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
            return images
        return F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
