"""Reading and writing weights: safetensors, or torch files of plain tensors. Nothing is ever unpickled."""

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dic_repa.errors import UserError, first_few, first_line
from dic_repa.files.hashing import add_parts, fingerprint
from dic_repa.files.reading import check_regular
from dic_repa.files.shards import Stored, open_tensors, tensor_files
from dic_repa.limits import check_limit

SEAL = "sha256 of tensors"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # what a full disk raises in torch and in safetensors


def save_tensors(tensors: dict[str, Tensor], path: str | PathLike, metadata: dict[str, str] | None = None) -> None:
    """`tensors` as a safetensors file, which stores plain contiguous tensors only."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def seal(tensors: Mapping[str, Tensor | Stored]) -> dict[str, str]:
    """The metadata of a file that no manifest lists: the SHA-256 of its tensors, their names and shapes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name][...]
        add_parts(digest, f"{name} {tensor.dtype} {tuple(tensor.shape)}", tensor)
    return {SEAL: digest.hexdigest()}


def check_seal(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """A UserError if tensors have changed since they were sealed; those without a seal are taken as they are."""
    if SEAL in metadata and seal(tensors)[SEAL] != metadata[SEAL]:
        raise UserError(f"{path} is damaged: its tensors have changed since it was written; restore it, or remove it")


def read_tensors(path: str | PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and its metadata (empty unless it is a safetensors file).

    In the file's place there may be those of a sharded run (`shards.py`).

    A torch training checkpoint gives its inner dict: `ema`, `model`, `state_dict` or `encoder`.

    Raises:
        UserError: a file that is missing, cut short, or holds more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file() and tensor_files(path):
        with open_tensors(path) as stored:
            return {name: each[...] for name, each in stored.items()}, {}
    if not path.is_file():
        raise UserError(f"no weights at '{path}'; give a safetensors file or a plain PyTorch state dict")
    check_regular(path, "memory")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
            check_seal(tensors, metadata, path)
            return tensors, metadata
        with torch.serialization.safe_globals([argparse.Namespace]):  # in the checkpoints of DiT and its descendants
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError
        raise UserError(f"{path} cannot be read as a file of plain tensors ({first_line(error)})") from error
    for key in ("ema", "model", "state_dict", "encoder"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; save the model's state_dict() instead")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name")
    return tensors, {}


def read_shapes(path: str | PathLike) -> dict[str, Sequence[int]]:
    """The shapes of the tensors in a safetensors file by name, from its header alone; a UserError if it is damaged."""
    check_regular(Path(path), "memory")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error


def check_shapes(module: nn.Module, shapes: Mapping[str, Sequence[int]], source: str | PathLike) -> None:
    """A UserError names those of the `shapes` of tensors that are missing, left over or another than the module's."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(shape) for name, shape in shapes.items()}
    faults = {
        "missing": [name for name in own if name not in found],
        "left over": [name for name in found if name not in own],
        "of another shape": [
            f"{name} is {found[name]}, the model's {shape}"
            for name, shape in own.items()
            if found.get(name, shape) != shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {fault}: {first_few(names, 5)}" for fault, names in faults.items() if names)
        raise UserError(f"{source} does not fit this {type(module).__name__}; {listed}")


def load_weights(module: nn.Module, tensors: dict[str, Tensor], source: str | PathLike) -> None:
    """Load `tensors` into `module`; a UserError names those missing, left over or of another shape."""
    check_shapes(module, {name: tensor.shape for name, tensor in tensors.items()}, source)
    module.load_state_dict(tensors)


def without_memory(build: Callable[[], nn.Module]) -> nn.Module | None:
    """What `build` makes, with shapes and no memory; None for a module of the user's own that needs numbers."""
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError) as error:
        if "meta" in str(error):
            return None
        raise


def check_memory(build: Callable[[], nn.Module], what: str) -> None:
    """A UserError if the weights of what `build` makes are more than this machine's memory."""
    if module := without_memory(build):
        size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        check_limit("memory", size, f"the memory for the weights of {what}, in bytes,")


def weights_fingerprint(path: Path) -> str:
    """A hash of a file's size and of 64 places in it: fast, and every training step changes all of them.

    Of the files that a sharded run has in its place, all are looked at.
    """
    files = tensor_files(path)
    if not files:
        raise UserError(f"there are no weights {path}")
    if len(files) > 1:
        return fingerprint(*map(weights_fingerprint, files))
    size = files[0].stat().st_size
    parts = []
    with files[0].open("rb") as file:
        for place in torch.linspace(0, max(0, size - 4096), 64).long().tolist():
            file.seek(place)
            parts.append(file.read(4096))
    return fingerprint(str(size), *parts)
