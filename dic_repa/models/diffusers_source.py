"""Which models of diffusers a denoiser can be made of, and where their weights are.

diffusers is imported when one is asked for: it takes seconds.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dic_repa.errors import UserError, first_few, first_line, unknown_name
from dic_repa.files.hub import is_hub_id, pin
from dic_repa.files.weights import load_weights
from dic_repa.models.adapters import quiet_bitsandbytes
from dic_repa.runtime.progress import say

FAMILY = "diffusers:"
CLASS_TABLES = ("num_class_embeds", "num_embeds_ada_norm")  # options that say how many classes a model has
CAPTIONS = ("caption_channels", "cross_attention_dim")  # options that say how wide a caption's tokens are
FILES = "config.json and diffusion_pytorch_model.safetensors"
_LEGACY = "Transformer2DModel"  # what configs of DiT and PixArt call their classes


def network_class(kind: str) -> Any:
    """diffusers' class of that name, if it is one of its models for pictures that takes classes or a caption.

    Raises:
        UserError: there is no such model, with the near names, or what it lacks.
    """
    import diffusers

    found = _classes([kind]).get(kind)
    if found is None:
        raise unknown_name(f"model of diffusers {diffusers.__version__}:", kind, _suitable())
    if lack := _lack(found):
        raise UserError(f"diffusers' {kind} cannot be a denoiser: {lack}; some that can: {', '.join(_suitable())}")
    return found


def takes_caption(network: Any) -> bool:
    """Whether the class is told what to draw by a caption's tokens, and not by a label."""
    caption = inspect.signature(network.forward).parameters.get("encoder_hidden_states")
    return not _takes_labels(network) or (caption is not None and caption.default is caption.empty)


def _takes_labels(network: Any) -> bool:
    """Whether the class can have a table of classes: that of `num_embeds_ada_norm` is only on patches."""
    labels, options = "class_labels" in inspect.signature(network.forward).parameters, options_of(network)
    return labels and ("num_class_embeds" in options or {"num_embeds_ada_norm", "patch_size"} <= options.keys())


def options_of(network: Any) -> dict[str, Any]:
    """The options of the class with their defaults."""
    parameters = inspect.signature(network.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("self", "args", "kwargs")}


def _classes(names: Iterable[str]) -> dict[str, Any]:
    """diffusers' own models among `names`: nothing else can be named by a config."""
    quiet_bitsandbytes()  # diffusers imports it
    import diffusers
    import diffusers.models as models

    found = {}
    for name in set(names) & set(dir(models)):
        with contextlib.suppress(ImportError, RuntimeError):  # it needs a package that is not here
            found[name] = getattr(models, name)
    kinds = {name: each for name, each in found.items() if isinstance(each, type)}
    return {name: each for name, each in kinds.items() if issubclass(each, diffusers.ModelMixin)}


def _suitable() -> list[str]:
    import diffusers.models as models

    # Others are of sound and films, or controls of these: to import them all takes seconds.
    pictures = _classes(name for name in dir(models) if "2D" in name)
    return sorted(name for name, each in pictures.items() if not _lack(each))


def _lack(network: Any) -> str:
    """Why a class cannot be a denoiser; '' if it can."""
    given, options = inspect.signature(network.forward).parameters, options_of(network)
    known = ("self", "sample", "hidden_states", "timestep", "class_labels", "encoder_hidden_states")
    caption = "encoder_hidden_states" in given and any(name in options for name in CAPTIONS)
    named = [p for p in given.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needs = [p.name for p in named if p.default is p.empty and p.name not in known]
    if "timestep" not in given:
        return "it takes no timestep"
    if not (caption or _takes_labels(network)):
        return "it is not class-conditional: it takes no class_labels, nor a caption of a width that is an option"
    if needs:
        return f"it also needs {first_few(needs, 4)}"
    if not {"in_channels", "out_channels"} <= options.keys():
        return "its channels are no options"
    return "" if "2D" in network.__name__ else "it has no 2D in its name, as diffusers' models of pictures"


def source_config(network: Any, weights: str) -> dict[str, Any]:
    """The options that the config of a folder or hub id gives the class."""
    with _opening(network, weights) as where:
        config = network.load_config(**where)
        kind = config.get("_class_name", network.__name__)
        if kind not in (network.__name__, _LEGACY):
            raise UserError(f"{weights} holds diffusers' {kind}; name the model {FAMILY}{kind}")
        known = options_of(network)
        return {name: value for name, value in config.items() if name in known}


def load_source(network: nn.Module, weights: str, classes: int) -> None:
    """Give a `network` of diffusers, which has tables of `classes` + 1 rows, the weights of a folder or hub id.

    A table of classes that the source has not, or its last row, the null class, stays as it is: new.

    Raises:
        UserError: the weights cannot be had, or are others than the network's, with the shapes that differ.
    """
    kind: Any = type(network)
    with _opening(kind, weights) as where:
        model, found = kind.from_pretrained(**where, use_safetensors=True, output_loading_info=True)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"its weights lack {len(missing)} tensors, such as {first_few(missing, 2)}")
    state, own = model.state_dict(), network.state_dict()
    tables = class_tables(network, classes + 1)
    new = [name for name in tables if name not in state]
    if new:
        say(f"note: {weights} knows no classes; its table of classes starts new")
    short = [name for name in tables if name in state and len(state[name]) == classes]
    state |= {name: own[name] for name in new}
    state |= {name: torch.cat([state[name].to(own[name].dtype), own[name][-1:]]) for name in short}
    load_weights(network, state, weights)


def class_tables(network: nn.Module, rows: int) -> list[str]:
    """The names of the tables of so many rows in a network, as its state dict has them."""
    embeddings = {name: each for name, each in network.named_modules() if isinstance(each, nn.Embedding)}
    return [f"{name}.weight" for name, each in embeddings.items() if each.num_embeddings == rows]


@contextlib.contextmanager
def _opening(network: Any, weights: str) -> Iterator[dict[str, Any]]:
    """diffusers' arguments for a folder or hub id, with ':' before a folder in it; its errors in one line."""
    from diffusers.utils import logging

    root, _, inner = (weights, "", "") if Path(weights).is_dir() else weights.partition(":")
    local = Path(root).is_dir()
    if not local and not is_hub_id(root):
        wanted = f"{FILES} of diffusers' {network.__name__}"
        raise UserError(f"weights: there is no folder {root}; name one, or a hub id, with {wanted}")
    repository, commit = (root, None) if local else pin(root)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # About an argument that diffusers itself passes to the hub's client.
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
            yield {"pretrained_model_name_or_path": repository, "revision": commit, "subfolder": inner or None}
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        wanted = f"{FILES} of diffusers' {network.__name__}"
        if local:
            raise UserError(f"weights: {weights} does not hold {wanted} ({first_line(error)})") from None
        address = f"https://huggingface.co/{root.partition('@')[0]}/tree/main/{inner}".rstrip("/")
        raise UserError(
            f"weights: {weights} cannot be fetched from the hub; download {wanted} from {address} into a folder and "
            "name that folder in its place"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
