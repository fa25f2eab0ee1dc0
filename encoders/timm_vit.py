"""Frozen vision transformers of timm, whose patch tokens are the targets; `timm:<model name>` is any of them."""

import sys
from os import PathLike
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.encoders.base import register_encoder
from dic_repa.errors import UserError, first_line, unknown_name
from dic_repa.files.hub import pin
from dic_repa.files.weights import load_weights, read_tensors

WEIGHTS_OPTION = "--weights FILE (in a recipe: encoder_options: {weights: FILE})"


class FrozenViT(nn.Module):
    """A timm ViT as an `Encoder`. A subclass says to which size images are resized.

    Args:
        model: has timm's `forward_intermediates` and `embed_dim`.
        mean, std: of each input channel.
        layer: the index of the block that gives the tokens; -1 is the last.
        norm: whether the tokens pass the final norm, whichever block they come from.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: tuple[float, ...], std: tuple[float, ...], layer: int = -1, norm: bool = True):
        super().__init__()
        depth = len(model.blocks)
        if not -depth <= layer < depth:
            blocks = f"{depth} blocks, 0 to {depth - 1} or -1 to {-depth}"
            raise UserError(f"layer {layer} does not exist: the encoder has {blocks}")
        self.model, self.layer, self.norm = model, layer, norm
        self.embed_dim: int = model.embed_dim
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenViT":
        """Stays in eval mode, also when the module that holds it is put in train mode."""
        return super().train(False)

    def resize(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) at the size that the model is fed."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W), float in [0, 1], to tokens (B, h * w, embed_dim), row by row."""
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            given = f"{images.dtype} of shape {tuple(images.shape)}"
            raise UserError(f"an encoder takes float images (B, 1 or 3, H, W) in [0, 1], not {given}")
        if len(self.mean) == 1:
            images = images.mean(dim=1, keepdim=True)
        images = self.resize((images - self.mean) / self.std)  # of a grey image the same for each channel
        (tokens,) = self.model.forward_intermediates(
            images, indices=[self.layer], norm=self.norm, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        return tokens


@register_encoder("timm:")
class TimmViT(FrozenViT):
    """Images (B, 1 or 3, H, W) to the patch tokens of a timm ViT, without its class and register tokens.

    Args:
        model_name: timm's name.
        weights: a safetensors file or plain state dict, in timm's layout or one that is converted to it: those of DINO,
            DINOv2, DINOv3, CLIP, MAE, PE (by timm), MoCo v3 and I-JEPA.
        pretrained: fetch timm's weights from the hub if no file is given; False leaves them random.
        layer: the block that gives the tokens.
        pixels_per_token: pixels of the image, in each direction, for one token. Images are resized (bicubic) to fit,
            and position embeddings to the grid. With 16, as in REPA, 256 px give 16x16 tokens for any patch size.
        norm: whether the tokens pass the model's final norm.
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
        layer: int = -1,
        pixels_per_token: int = 16,
        norm: bool = True,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        weights_from: str = "",
        **model_args: Any,
    ):
        if weights_from and pretrained and weights is None:
            raise UserError(
                f"timm has no weights of this '{model_name}'; fetch them from {weights_from} and give "
                f"{WEIGHTS_OPTION}, or pretrained=False for random ones"
            )
        if pixels_per_token < 1:
            raise UserError(f"pixels_per_token must be at least 1, not {pixels_per_token}")
        model = _build(model_name, pretrained and weights is None, model_args)
        if weights is not None:
            _load_file(model, weights)
        config = model.pretrained_cfg
        super().__init__(model, mean or config["mean"], std or config["std"], layer, norm)
        self.pixels_per_token = pixels_per_token

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The tokens (h, w) for images of `size` (H, W): the size over `pixels_per_token`, rounded, at least 1."""
        h, w = (max(1, round(side / self.pixels_per_token)) for side in size)
        return h, w

    def resize(self, images: Tensor) -> Tensor:
        grid = self.token_grid((images.shape[-2], images.shape[-1]))
        h, w = (count * patch for count, patch in zip(grid, self.model.patch_embed.patch_size))
        return images if images.shape[-2:] == (h, w) else F.interpolate(images, (h, w), mode="bicubic")


def _build(name: str, pretrained: bool, model_args: dict[str, Any]) -> Any:
    if taken := model_args.keys() & {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}:
        raise UserError(f"timm's {taken.pop()} is not passed on, since it may unpickle a file; give {WEIGHTS_OPTION}")
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise unknown_name("timm model", architecture, timm.list_models())
    try:
        # Without weights first: a failure here comes from the name or the options, one below from the hub.
        model: Any = timm.create_model(name, num_classes=0, dynamic_img_size=True, **model_args)
        if not (hasattr(model, "blocks") and hasattr(model, "forward_intermediates")):
            raise TypeError("it has no grid of patch tokens")
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        why = f"timm cannot build '{name}' as a ViT of any image size ({first_line(error)})"
        raise UserError(f"{why}; see timm.list_models('vit_*')") from error
    if not pretrained:
        return model
    published = model.pretrained_cfg
    if repository := published.get("hf_hub_id"):
        repository, commit = pin(repository)
        model_args = {
            **model_args,
            "pretrained_cfg_overlay": {"hf_hub_id": "@".join(filter(None, (repository, commit)))},
        }
    del model  # a second one of 7 B parameters would not fit everywhere
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True, **model_args)
    except OSError as error:
        hub = published.get("hf_hub_id")
        what = f"model.safetensors of '{hub}' on the Hugging Face hub" if hub else published["url"]
        raise UserError(
            f"the weights of '{name}' cannot be fetched from here; on a machine that can, fetch {what}, put it on this "
            f"one and give {WEIGHTS_OPTION}"
        ) from error
    except RuntimeError as error:
        why = f"no weights of timm's fit '{name}' ({first_line(error).rstrip(':.')})"
        raise UserError(f"{why}; give {WEIGHTS_OPTION}, or pretrained=False") from error


# In MoCo v3's ViT-L, as RCG distributes it, a renaming went through the layers' names.
_MISSPELT = {"blocks.13.norm13": "blocks.13.norm1", "blocks.13.mlp.fc13": "blocks.13.mlp.fc1"}
_MISSPELT |= {"blocks.14.norm14": "blocks.14.norm2", "blocks.14.mlp.fc14": "blocks.14.mlp.fc2"}


def _load_file(model: Any, path: str | PathLike) -> None:
    state, _ = read_tensors(path)
    for prefix in ("module.base_encoder.", "module."):  # where MoCo v3 and I-JEPA keep the encoder
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        state = inner if any(key.startswith("blocks.") for key in inner) else state
    for wrong, right in _MISSPELT.items():
        state = {key.replace(wrong, right): value for key, value in state.items()}
    # timm keeps a converter beside each architecture, for other key layouts and other grids of position embeddings.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(state, model) if convert else state
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        architecture = model.pretrained_cfg["architecture"]
        raise UserError(f"the weights in '{path}' are not of '{architecture}' ({error!r})") from error
    own = model.state_dict()  # without the classifier, which is not part of the encoder
    load_weights(model, {k: v for k, v in state.items() if k in own or not k.startswith("head.")}, path)
