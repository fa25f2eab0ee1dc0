"""Models of diffusers as denoisers: `diffusers:UNet2DModel`, `diffusers:DiTTransformer2DModel` and the like.

    create_denoiser("diffusers:UNet2DModel", 4, 1000, block_out_channels=[128, 256], ...)

(The other direction, one of our denoisers as a model of diffusers, is in `dic_repa/export/diffusers_denoiser.py`.) The
options are those of diffusers' class, and its code computes: only conditions, time and size are ours. A model that
takes `class_labels` gets the label; one that takes a caption (PixArt, Sana, UNet2DConditionModel) gets it as the only
token of a caption, a row of a learnt table. Taps are submodules of `network`, such as `network.mid_block` and
`network.transformer_blocks.7`. The initial values are diffusers', which are PyTorch's: no layer begins at zero.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dic_repa.errors import UserError, first_line, unknown_name
from dic_repa.limits import check_limit
from dic_repa.models.diffusers_source import (
    CAPTIONS,
    CLASS_TABLES,
    class_tables,
    load_source,
    network_class,
    options_of,
    source_config,
    takes_caption,
)
from dic_repa.models.layers import patch_grid, to_map
from dic_repa.models.middle import MiddleHeadOption, add_middle_head
from dic_repa.models.pretrained import Classes, Pretrained, Size, config_of, forward_on_meta

# Options of diffusers' classes that follow from the data and the objective.
_SET = ("in_channels", "out_channels", *CLASS_TABLES, "class_embed_type", "use_additional_conditions")
_SQUARE = ("DiTTransformer2DModel", "Transformer2DModel")  # which put their patches together as a square


class DiffusersNetwork(Pretrained):
    """A model of diffusers: `model(x, t, y)` with x (B, in_channels, H, W), t (B,), y (B,) int64.

    `y == num_classes` is the null class, one row more in each table of classes. Labels are dropped by training alone,
    never by the model itself. H and W are multiples of `multiple`. A transformer's position embeddings are made for the
    class's `sample_size`, and stretched for other sizes.

    Args:
        kind: diffusers' name of the class.
        learn_sigma: twice the output channels; the second half is the variance of a DDPM-trained model.
        time_scale: multiplies t before its sinusoids, which vary over hundreds as in all diffusers' models: 1 for
            DDPM's steps, 1000 for a t in [0, 1].
        gradient_checkpointing: diffusers' own, recomputing each block or layer in the backward pass.
        middle_head: the block that a second head sits on, for internal guidance (`add_middle_head`).
        options: of diffusers' class, but for those that follow from the others.

    Raises:
        UserError: an unknown class or option, or one that is not class-conditional.
    """

    network: Any  # diffusers' model

    def __init__(
        self,
        kind: str,
        in_channels: Size = 4,
        num_classes: Classes = 1000,
        learn_sigma: bool = False,
        time_scale: float = 1.0,
        gradient_checkpointing: bool = False,
        middle_head: MiddleHeadOption = None,
        **options: Any,
    ):
        super().__init__()
        config = config_of(locals())
        options = json.loads(json.dumps(config.pop("options"), default=int))  # as a file has them: lists for tuples
        self.config = {**config, **options}
        self.kind, self.in_channels, self.num_classes, self.time_scale = kind, in_channels, num_classes, time_scale
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        network = network_class(kind)
        _check_options(network, options)
        known, by_caption = options_of(network), takes_caption(network)
        given = {"in_channels": in_channels, "out_channels": self.out_channels, **options}
        if "use_additional_conditions" in known:  # the picture's size and proportions, which are none of ours
            given["use_additional_conditions"] = False
        if not by_caption:
            # The table of a UNet2DModel has as many rows as it says, that of a DiT one more.
            given |= {"num_class_embeds": num_classes + 1} if "num_class_embeds" in known else {}
            given |= {"num_embeds_ada_norm": num_classes} if "num_embeds_ada_norm" in known else {}
        self.network = _build(network, given)
        self.settings = {**known, **given}
        self.caption = self._caption_table() if by_caption else None
        if self.caption is None and not class_tables(self.network, num_classes + 1):
            raise UserError(f"diffusers' {kind} has no table of classes with these options; see its `norm_type`")
        for module in self.network.modules():
            if hasattr(module, "token_drop"):  # diffusers' LabelEmbedding drops labels itself in training
                module.dropout_prob = 0.0
        self.first = "sample" if "sample" in inspect.signature(network.forward).parameters else "hidden_states"
        self.patch_size = self.settings.get("patch_size") or 1
        levels = len(self.settings.get("block_out_channels") or [0])
        self.multiple = self.patch_size * 2 ** (levels - 1)
        if levels > 1:  # convolutional
            self.to(memory_format=torch.channels_last)
        self._check_runs()
        self.set_gradient_checkpointing(gradient_checkpointing)
        add_middle_head(self, middle_head)

    def _caption_table(self) -> nn.Embedding:
        """The classes as captions of one token, N(0, 0.02^2) as DiT's labels."""
        width = next((self.settings[name] for name in CAPTIONS if self.settings.get(name)), None)
        if not isinstance(width, int):
            raise UserError(f"{self.kind} needs {' or '.join(CAPTIONS)}, one number: the width of a caption's token")
        table = nn.Embedding(self.num_classes + 1, width)
        nn.init.normal_(table.weight, std=0.02)
        return table

    def _check_runs(self) -> None:
        """A UserError if it cannot predict with these options, found by a run on shapes alone."""
        given = self.settings.get("sample_size")
        side = given if isinstance(given, int) and given % self.multiple == 0 else 4 * self.multiple
        try:
            shape = tuple(forward_on_meta(self, side, side).shape)
        except Exception as error:  # of diffusers, of any kind
            raise UserError(f"diffusers' {self.kind} does not run with these options: {first_line(error)}") from error
        if shape != (1, self.out_channels, side, side):
            raise UserError(f"diffusers' {self.kind} gives {shape} for data of {side}x{side} with these options")

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """diffusers' own, on or off; a UserError for a class that has none."""
        if not enabled:
            self.network.disable_gradient_checkpointing()
            return
        try:
            self.network.enable_gradient_checkpointing()
        except ValueError:
            raise UserError(f"{self.kind} has no gradient checkpointing; train with it switched off") from None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise UserError(
                f"this {self.kind} takes heights and widths divisible by {self.multiple}, not {height}x{width}"
            )
        if self.kind in _SQUARE and height != width:
            raise UserError(f"{self.kind} takes squares, not {height}x{width}")
        if t.ndim > 1:
            raise UserError(f"{self.kind} takes one time, not two; take another denoiser, such as DiC or SiT")
        inputs = {self.first: x, "timestep": t * self.time_scale}
        if self.caption is None:
            inputs["class_labels"] = y
        else:
            inputs["encoder_hidden_states"] = self.caption(y)[:, None]
        (prediction,) = self.network(**inputs, return_dict=False)
        return prediction

    def feature_map(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """A block's tokens (B, N, C) as a map (B, C, h, w), for data of `size` (H, W)."""
        side = math.isqrt(size[0] * size[1] // tokens.shape[1])  # pixels of a token's side, at any level of a U-Net
        return to_map(tokens, patch_grid(self.kind, size, max(side, 1)))


def from_diffusers(
    kind: str,
    in_channels: int = 4,
    num_classes: int = 1000,
    learn_sigma: bool = False,
    time_scale: float = 1.0,
    gradient_checkpointing: bool = False,
    middle_head: MiddleHeadOption = None,
    weights: str | None = None,
    **options: Any,
) -> DiffusersNetwork:
    """A class-conditional model of diffusers by its class's name, with that class's options.

    Args:
        weights: a folder or hub id with config.json and diffusion_pytorch_model.safetensors, and ':' before a folder in
            it. Its config gives the options that are not given here.
    """
    if weights:
        given = source_config(network_class(kind), weights)
        options = {name: value for name, value in given.items() if name not in _SET} | options
    model = DiffusersNetwork(
        kind, in_channels, num_classes, learn_sigma, time_scale, gradient_checkpointing, middle_head, **options
    )
    if weights and next(model.parameters()).device.type != "meta":
        load_source(model.network, weights, num_classes)
    return model


def _check_options(network: Any, options: dict[str, Any]) -> None:
    """A UserError for options that the class does not take, that follow from others, or that ask for too much."""
    name, known = network.__name__, options_of(network)
    for option, value in options.items():
        if option == "two_times":
            raise UserError(f"{name} takes one time, so two_times cannot be had; take another denoiser")
        if option in _SET:
            raise UserError(f"{name}: {option} follows from the data, the classes and learn_sigma; leave it out")
        if option not in known:
            raise unknown_name(f"option of diffusers' {name}:", option, [each for each in known if each not in _SET])
        numbers = list(_numbers(value))
        if "layers" in option or option == "block_out_channels":
            blocks = len(numbers) if option == "block_out_channels" else sum(numbers)
            check_limit("blocks", blocks, f"{name}: {option}")
        if option == "sample_size":
            check_limit("size", max(numbers, default=0), f"{name}: {option}")
    if options.get("time_embedding_type", "positional") != "positional":
        raise UserError(f"{name}: time_embedding_type must be positional: the others cannot embed every t from 0 on")


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in nested lists."""
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _build(network: Any, given: dict[str, Any]) -> nn.Module:
    try:
        return network(**given)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # diffusers checks little, so anything may be raised, down to ZeroDivisionError
        raise UserError(f"diffusers' {network.__name__} does not take these options: {first_line(error)}") from error
