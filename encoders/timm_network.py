"""What encoders that are networks of timm share: how one is built, takes its weights, and sees images."""

import inspect
import sys
from collections.abc import Sequence
from os import PathLike
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dic_repa.errors import UserError, first_line, unknown_name
from dic_repa.files.hub import pin
from dic_repa.files.weights import load_weights, read_tensors

WEIGHTS_OPTION = "--weights FILE (in a recipe: encoder_options: {weights: FILE})"
REFUSALS = (AssertionError, RuntimeError, TypeError, ValueError)  # what timm raises for options and sizes


class FrozenNetwork(nn.Module):
    """A timm network as an `Encoder`, in eval mode and without gradients. A subclass says what it is fed.

    Args:
        model: has timm's `forward_intermediates`.
        mean, std: of each input channel.
        layer: the index of the block or stage that gives the tokens, or a list of them; -1 is the last.
        count, word: how many there are, and what they are called.
        norm: whether the tokens pass the final norm, whichever layer they come from.
    """

    layout = "NCHW"  # of what is asked from timm: a map, or a ViT's tokens
    embed_dim: int
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: Any,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        layer: int | Sequence[int],
        count: int,
        word: str,
        norm: bool = False,
    ):
        super().__init__()
        self.layers = existing_layers([layer] if isinstance(layer, int) else layer, count, word)
        self.model, self.norm = model, norm
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Stays in eval mode, also when the module that holds it is put in train mode."""
        return super().train(False)

    def token_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The tokens (h, w) for images of `size` (H, W)."""
        raise NotImplementedError

    def prepare(self, images: Tensor) -> Tensor:
        """What the network is fed: images (B, C, H, W) in [0, 1], normalised and at its size."""
        raise NotImplementedError

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std  # of a grey image the same for each channel

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W), float in [0, 1], to tokens (B, h * w, embed_dim), row by row."""
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            given = f"{images.dtype} of shape {tuple(images.shape)}"
            raise UserError(f"an encoder takes float images (B, 1 or 3, H, W) in [0, 1], not {given}")
        if len(self.mean) == 1:
            images = images.mean(dim=1, keepdim=True)
        tokens = self.features(self.prepare(images))
        return tokens if tokens.ndim == 3 else tokens.flatten(2).mT.contiguous()

    def features(self, inputs: Tensor) -> Tensor:
        """What the layer gives for prepared images: tokens, or a map (B, embed_dim, h, w)."""
        return self.intermediates(inputs, self.norm)[0]

    def intermediates(self, inputs: Tensor, norm: bool) -> list[Tensor]:
        """What each layer gives, by one pass that ends with the last of them."""
        return self.model.forward_intermediates(
            inputs,
            indices=list(self.layers),
            norm=norm,
            stop_early=True,
            output_fmt=self.layout,
            intermediates_only=True,
        )


def existing_layers(layers: Sequence[int], count: int, word: str) -> tuple[int, ...]:
    """The layers counted from the first, in their order in the network, which has `count` of what `word` says."""
    for layer in layers:
        if not -count <= layer < count:
            there = f"{count} {word}, 0 to {count - 1} or -1 to {-count}"
            raise UserError(f"layer {layer} does not exist: the encoder has {there}")
    found = sorted({layer % count for layer in layers})
    if not found or len(found) < len(layers):
        raise UserError(f"layer {list(layers)} names no layer, or one of them twice: take different {word}")
    return tuple(found)


def build_network(
    name: str,
    weights: str | PathLike | None,
    pretrained: bool,
    options: dict[str, Any],
    kind: str = "",
    weights_option: str = WEIGHTS_OPTION,
) -> Any:
    """timm's model `name` without its classifier, made with `options` of timm's.

    Args:
        weights: a safetensors file or plain state dict; None takes those of the hub if `pretrained`, else random ones.
        kind, weights_option: what it is to be, such as " as a ViT", and how a file is given, for messages.
    """
    if taken := options.keys() & {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}:
        raise UserError(f"timm's {taken.pop()} is not passed on, since it may unpickle a file; give {weights_option}")
    if taken := options.keys() & {"features_only", "out_indices", "num_classes"}:
        raise UserError(f"timm's {taken.pop()} is not passed on; the layer says what the tokens are")
    check_architecture(name)
    try:
        # Without weights first: a failure here comes from the name or the options, one below from the hub.
        model = _create(name, num_classes=0, **options)
    except REFUSALS as error:
        raise UserError(f"timm cannot build '{name}'{kind} ({first_line(error)})") from error
    if not (hasattr(model, "forward_intermediates") and hasattr(model, "prune_intermediate_layers")):
        raise UserError(
            f"timm {timm.__version__} gives neither patch tokens nor feature maps of '{name}'; take another model, or "
            "a newer timm"
        )
    if weights is not None:
        _load_file(model, weights)
    if weights is not None or not pretrained:
        return model
    published = model.pretrained_cfg
    del model  # a second one of 7 B parameters would not fit everywhere
    return _fetch(name, published, options, weights_option)


def check_architecture(name: str) -> str:
    """The architecture in timm's `name`, which may have a tag; a UserError if there is none."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise unknown_name("timm model", architecture, timm.list_models())
    return architecture


def sketch(name: str) -> Any:
    """timm's model `name` without memory for its weights, to see what it is."""
    with torch.device("meta"):
        return _create(check_architecture(name))


def _create(name: str, **options: Any) -> Any:
    try:
        return timm.create_model(name, **options)
    except RuntimeError as error:
        if "meta" not in str(error).lower():
            raise
        with torch.device("cpu"):  # shapes are asked for, and it needs numbers; many do in timm 1.0.20
            return timm.create_model(name, **options)


def takes(model: Any, option: str) -> bool:
    """Whether the class of a timm model, or one that it is made of, takes that option."""
    return any(option in inspect.signature(base).parameters for base in type(model).__mro__ if base is not object)


def _fetch(name: str, published: dict[str, Any], options: dict[str, Any], weights_option: str) -> Any:
    if repository := published.get("hf_hub_id"):
        repository, commit = pin(repository)
        options = {**options, "pretrained_cfg_overlay": {"hf_hub_id": "@".join(filter(None, (repository, commit)))}}
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, **options)
    except OSError as error:
        hub = published.get("hf_hub_id")
        what = f"model.safetensors of '{hub}' on the Hugging Face hub" if hub else published["url"]
        raise UserError(
            f"the weights of '{name}' cannot be fetched from here; on a machine that can, fetch {what}, put it on this "
            f"one and give {weights_option}"
        ) from error
    except RuntimeError as error:
        why = f"no weights of timm's fit '{name}' ({first_line(error).rstrip(':.')})"
        raise UserError(f"{why}; give {weights_option}, or pretrained=False") from error


# In MoCo v3's ViT-L, as RCG distributes it, a renaming went through the layers' names.
_MISSPELT = {"blocks.13.norm13": "blocks.13.norm1", "blocks.13.mlp.fc13": "blocks.13.mlp.fc1"}
_MISSPELT |= {"blocks.14.norm14": "blocks.14.norm2", "blocks.14.mlp.fc14": "blocks.14.mlp.fc2"}


def _load_file(model: Any, path: str | PathLike) -> None:
    state, _ = read_tensors(path)
    own = model.state_dict()
    for prefix in ("module.base_encoder.", "module."):  # where MoCo v3 and I-JEPA keep the encoder
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        state = inner if any(key in own or key.startswith("blocks.") for key in inner) else state
    for wrong, right in _MISSPELT.items():
        state = {key.replace(wrong, right): value for key, value in state.items()}
    # timm keeps a converter beside each architecture, for other key layouts and other grids of position embeddings.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = convert(state, model) if convert else state
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        architecture = model.pretrained_cfg["architecture"]
        raise UserError(f"the weights in '{path}' are not of '{architecture}' ({error!r})") from error
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    no_part = ("head.", *(f"{classifier}." for classifier in classifiers))  # of the encoder
    state = {key: value for key, value in state.items() if key in own or not key.startswith(no_part)}
    # How many batches a norm has seen plays no part any more, and older files lack it.
    counts = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    load_weights(model, counts | state, path)
