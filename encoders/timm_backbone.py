"""Frozen networks of timm that are no ViTs (convolutional, hierarchical or both); a feature map is the tokens."""

import contextlib
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dic_repa.encoders.timm_network import REFUSALS, FrozenNetwork, build_network, sketch, takes
from dic_repa.errors import UserError, first_line

CPU_PART = 8  # images that go through the network at once on a CPU


class TimmBackbone(FrozenNetwork):
    """Images (B, 1 or 3, H, W) to a feature map of a timm network, each of its cells a token.

    Args:
        model_name: timm's name.
        weights: a safetensors file or plain state dict, in timm's layout or one that timm converts to it.
        pretrained: fetch timm's weights from the hub if no file is given; False leaves them random.
        layer: the stage that gives the map, as timm's `features_only` counts them; -1 is the last. Later ones are not
            computed.
        input_size: the shorter side that images are resized to (bicubic), in pixels; None leaves them as they are.
        mean, std: of each channel; by default timm's.
        model_args: go to `timm.create_model`.

    Raises:
        UserError: an unknown model, one without feature maps, or weights that cannot be fetched or do not fit.
    """

    def __init__(
        self,
        model_name: str,
        weights: str | PathLike | None = None,
        pretrained: bool = True,
        layer: int = -1,
        input_size: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **model_args: Any,
    ):
        if input_size is not None and input_size < 1:
            raise UserError(f"input_size must be at least 1, not {input_size}")
        if takes(sketch(model_name), "strict_img_size"):  # Swin, which can do without a fixed size
            model_args = {**model_args, "strict_img_size": False}
        model = build_network(model_name, weights, pretrained, model_args)
        config = model.pretrained_cfg
        super().__init__(model, mean or config["mean"], std or config["std"], layer, len(model.feature_info), "stages")
        self.embed_dim: int = model.feature_info[self.layers[0]]["num_chs"]
        with contextlib.suppress(AssertionError):  # timm 1.0.20 cannot drop EfficientViT's head
            model.prune_intermediate_layers(list(self.layers), prune_norm=True, prune_head=True)
        self.name, self.input_size = model_name, input_size
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The rows and columns (h, w) of the map for images of `size` (H, W), found by one run for each size.

        Raises:
            UserError: the network takes no such images.
        """
        if size not in self._grids:
            device = next(self.model.parameters()).device
            black = self.resize(torch.zeros(1, len(self.mean), *size, device=device))
            try:
                h, w = self.features(black).shape[-2:]
            except REFUSALS as error:
                h, w = black.shape[-2:]
                own = "x".join(map(str, self.model.pretrained_cfg["input_size"][1:]))
                why = f"timm's '{self.name}' does not take images of {h}x{w} pixels ({first_line(error).rstrip('.')})"
                raise UserError(f"{why}; set input_size, or timm's img_size, which is {own} by default") from error
            self._grids[size] = (h, w)
        return self._grids[size]

    def features(self, inputs: Tensor) -> Tensor:
        run = super().features
        if inputs.device.type != "cpu":
            return run(inputs)
        # Large activations are mapped into memory anew each time, which takes more than half of a pass of 64.
        return torch.cat([run(part) for part in inputs.split(CPU_PART)])

    def prepare(self, images: Tensor) -> Tensor:
        return self.normalise(self.resize(images))

    def resize(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) whose shorter side is `input_size`, as a picture file has them: within [0, 1]."""
        shorter = min(images.shape[-2:])
        if self.input_size is None or self.input_size == shorter:
            return images
        size = [round(side * self.input_size / shorter) for side in images.shape[-2:]]
        return F.interpolate(images, size, mode="bicubic", antialias=self.input_size < shorter).clamp(0, 1)
