"""Reading an encoder's weights from a file, with every key and shape checked."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dic_repa.errors import UserError


def read_weights(path: str | PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, or of a plain PyTorch state dict (no metadata; nothing is
    unpickled but tensors). Raises UserError when there is no such file or it is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at '{path}'; give a safetensors file or a plain PyTorch state dict")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"'{path}' cannot be read as safetensors or as a plain state dict: {_first_line(error)}"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"'{path}' holds a {type(state).__name__}; save the model's state_dict() instead")
    return state, {}


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str | PathLike) -> None:
    """Load `state` into `model`. Raises UserError naming keys that are missing, unexpected or of another shape."""
    own = model.state_dict()
    faults = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {_shorten(keys)}" for fault, keys in faults.items() if keys)
        raise UserError(f"the weights in '{source}' are not of this encoder; {listed}")
    model.load_state_dict(state)


def _shorten(keys: Iterable[str], most: int = 5) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
