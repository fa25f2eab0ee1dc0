"""Saving and loading a denoiser as a folder of two files, config.json and model.safetensors, local or on the hub."""

from __future__ import annotations

import functools
import json
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from einops import rearrange
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor, nn

from dic_repa.conditions import Condition, NoCondition, condition_of_model, create_condition
from dic_repa.errors import MISTAKES, UserError, first_line
from dic_repa.files.atomic import write_aside, write_whole
from dic_repa.files.hub import pin
from dic_repa.files.manifest import MANIFEST, check_whole, write_manifest
from dic_repa.files.outputs import begin_folder, check_folder
from dic_repa.files.reading import read_json
from dic_repa.files.weights import check_shapes, load_weights, read_shapes, read_tensors, save_tensors, without_memory
from dic_repa.limits import check_limit
from dic_repa.trust import check_code

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Arguments that a config has only where they are given.
_ONLY_IF_SET = ("middle_head", "two_times", "strides", "stem_bottleneck", "wide_head", "size")


def _few(blocks: int) -> int:
    check_limit("blocks", blocks, "it")
    return blocks


# Of a constructor's arguments, which `config_of` checks.
Size = Annotated[int, Field(ge=1)]
Classes = Annotated[int, Field(ge=0)]
Blocks = Annotated[int, Field(ge=1), AfterValidator(_few)]


class Pretrained(nn.Module):
    """A denoiser that is saved with its `config`, the dict of its constructor's arguments."""

    config: dict
    in_channels: int
    num_classes: int  # 0 where it is conditioned on something else
    two_times: bool = False  # whether t may be (t, r) (B, 2)
    conditions: ClassVar[tuple[str, ...]] = ("classes", "none")  # the kinds of conditions that it can be built for
    kinds: ClassVar[dict[str, type[Pretrained]]] = {}  # the classes so far imported, by the name in config.json

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        Pretrained.kinds[cls.__name__] = cls

    @property
    def conditioned_on(self) -> Condition:
        """What y is: classes, or the `condition` of its config."""
        return create_condition(self.num_classes, getattr(self, "config", {}).get("condition"))

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Trade a second forward pass for the memory of activations, in all submodules that have an attribute
        `gradient_checkpointing`; a UserError if none has."""
        blocks: list[Any] = [module for module in self.modules() if hasattr(module, "gradient_checkpointing")]
        if enabled and not blocks:
            raise UserError(f"{type(self).__name__} has no gradient checkpointing; train with it switched off")
        for block in blocks:
            block.gradient_checkpointing = enabled

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and a manifest of them into `folder`, a new one or one that this has
        made before.

        A UserError where the folder holds anything else.
        """
        folder = Path(folder)
        if check_folder(folder, "model") is None:
            begin_folder(folder, "model", [CONFIG, WEIGHTS, MANIFEST])
        (folder / MANIFEST).unlink(missing_ok=True)  # killed from here on, it says nothing that is not so
        write_whole(folder / CONFIG, json.dumps({"model": type(self).__name__, **self.config}, indent=2) + "\n")
        with write_aside(folder / WEIGHTS) as aside:
            save_tensors(self.state_dict(), aside)
        write_manifest(folder, [CONFIG, WEIGHTS])

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, **overrides) -> Self:
        """The model of a local folder, or of a hub id such as 'someone/dic-xl' or 'someone/dic-xl@revision', which is
        downloaded once, then cached.

        `overrides` are constructor arguments that leave the weights as they are, such as `gradient_checkpointing=True`.
        A UserError says what is missing or does not fit.
        """
        config_file, weights_file = _locate(path_or_hub_id)
        if Path(path_or_hub_id).is_dir():
            check_whole(Path(path_or_hub_id))
        kind, config = _read_config(config_file)
        if kind != cls.__name__:
            raise UserError(f"{config_file} describes a {kind or 'model of unknown kind'}, not a {cls.__name__}")
        try:  # first without memory, which the config may ask for in any amount
            if sketch := without_memory(lambda: cls(**{**config, **overrides})):
                check_shapes(sketch, read_shapes(weights_file), weights_file)
            model = cls(**{**config, **overrides})
        except UserError:
            raise
        except MISTAKES as error:
            raise UserError(f"{config_file} does not fit {cls.__name__}: {first_line(error)}") from None
        load_weights(model, read_tensors(weights_file)[0], weights_file)
        return model.eval()


def config_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The config of a model from its constructor's `locals()`: the arguments that say what its weights are.

    A UserError for one that is not of the kind that the constructor's annotation says.
    """
    kind, others = arguments.get("__class__", type(arguments["self"])), ("self", "__class__")
    given = {key: value for key, value in arguments.items() if key not in others}
    try:
        _schema(kind).model_validate_json(json.dumps(given, default=int), strict=True)  # int of numpy's numbers
    except (TypeError, ValidationError) as error:
        raise UserError(f"{type(arguments['self']).__name__}: {_explain(error)}") from None
    kept = {key: value for key, value in given.items() if key not in ("zero_gates", "gradient_checkpointing")}
    return {key: value for key, value in kept.items() if value or key not in _ONLY_IF_SET}


@functools.cache
def _schema(kind: type[nn.Module]) -> type[BaseModel]:
    hints = typing.get_type_hints(kind.__init__, include_extras=True)
    fields: dict[str, Any] = {name: (hint, ...) for name, hint in hints.items() if name != "return"}
    return create_model(kind.__name__, __config__=ConfigDict(allow_inf_nan=False), **fields)


def _explain(error: TypeError | ValidationError) -> str:
    if isinstance(error, TypeError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":
        return f"{where}: {first['msg'].removeprefix('Value error, ')}"
    return f"{where} {first['msg'].removeprefix('Input ')}, not {first['input']!r}"


def saved_kind(path_or_hub_id: str | Path) -> str | None:
    """The name of the class that a saved denoiser's config.json gives."""
    return _read_config(_locate(path_or_hub_id)[0])[0]


def _read_config(file: Path) -> tuple[str | None, dict]:
    config = read_json(file, "download or copy it again")
    if not isinstance(config, dict) or not isinstance(config.get("model"), str | None):
        raise UserError(f"{file} is not a model's config: it is no mapping of names to values, with the `model`")
    check_code(config, file)
    return config.pop("model", None), config


def _locate(path_or_hub_id: str | Path) -> tuple[Path, Path]:
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"{folder} is not a saved model: it has no {name}")
        return folder / CONFIG, folder / WEIGHTS
    name = str(path_or_hub_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"there is no model folder {name}")

    from huggingface_hub import hf_hub_download

    try:
        repository, commit = pin(name)
        config, weights = (hf_hub_download(repository, file, revision=commit) for file in (CONFIG, WEIGHTS))
        return Path(config), Path(weights)
    except Exception as error:  # the hub's client raises a dozen kinds, from no connection to no such repository
        raise UserError(
            f"there is no folder {name}, and the hub does not give it ({type(error).__name__}: {first_line(error)}); "
            f"download {CONFIG} and {WEIGHTS} of that repository into a folder and pass the folder"
        ) from None


def forward_on_meta(model: Pretrained, height: int, width: int) -> Tensor:
    """Run a denoiser on shapes alone, so that hooks can see those of its feature maps; returns its output, on the meta
    device. The model stays where it is, and its inputs are in its own precision."""
    # einops' first use makes torch 2.6 import what cannot be imported on the meta device.
    rearrange(torch.empty(1), "a -> a")
    tensors = {**model.state_dict(keep_vars=True), **dict(model.named_buffers())}  # these with what is not saved
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with torch.no_grad(), torch.device("meta"):
        condition = condition_of_model(model) or NoCondition()
        dtype = next((tensor.dtype for tensor in meta.values() if tensor.is_floating_point()), torch.float32)
        blank = condition.blank(1)
        y = blank.to(dtype) if blank.is_floating_point() else blank  # vectors or tokens; classes are whole numbers
        inputs = (torch.empty(1, model.in_channels, height, width, dtype=dtype), torch.empty(1), y)
        return torch.func.functional_call(model, meta, inputs)
