"""Saving and loading a denoiser as a folder of two files, config.json and model.safetensors, local or on the hub."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dic_repa.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Pretrained:
    """Mixin for a module whose `config` is the dict of its constructor's arguments."""

    config: dict

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, which is made where it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps({"model": type(self).__name__, **self.config}, indent=2) + "\n")
        save_tensors(self.state_dict(), folder / WEIGHTS)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, **overrides):
        """The model of a local folder, or of a hub id such as 'someone/dic-xl' (downloaded once, then cached).

        `overrides` are constructor arguments that leave the weights as they are, such as `gradient_checkpointing=True`.
        A UserError says what is missing or does not fit.
        """
        config_file, weights_file = _locate(path_or_hub_id)
        try:
            config = json.loads(config_file.read_text())
            kind = config.pop("model", None)
        except (ValueError, AttributeError):
            raise UserError(f"{config_file} is not a model's config: not valid JSON") from None
        if kind != cls.__name__:
            raise UserError(f"{config_file} describes a {kind or 'model of unknown kind'}, not a {cls.__name__}")
        try:
            model = cls(**{**config, **overrides})
        except TypeError as error:
            raise UserError(f"{config_file} does not fit {cls.__name__}: {error}") from None
        load_weights(model, load_tensors(weights_file), weights_file)
        return model.eval()


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
        return Path(hf_hub_download(name, CONFIG)), Path(hf_hub_download(name, WEIGHTS))
    except Exception as error:  # the hub's client raises a dozen kinds, from no connection to no such repository
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"no folder {name}, and not to be had from the hub ({type(error).__name__}: {reason}); "
            f"download {CONFIG} and {WEIGHTS} of that repository into a folder and pass the folder"
        ) from None


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """`tensors` as a safetensors file, which stores plain contiguous tensors only."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file that holds nothing but tensors (never unpickled).

    A training checkpoint's inner dict (`ema`, `model` or `state_dict`) is found. A missing, truncated or unsafe file
    is a UserError.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from None
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be read as a file of plain tensors ({reason})") from None
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name")
    return tensors


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load `state` into `module`; a UserError names the keys missing or left over, and the shapes that differ."""
    own = module.state_dict()
    problems = [f"{k} is missing" for k in own if k not in state]
    problems += [f"{k} is left over" for k in state if k not in own]
    problems += [
        f"{k} is {tuple(state[k].shape)}, the model's {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{source} does not fit this {type(module).__name__}: {'; '.join(problems[:4])}{more}")
    module.load_state_dict(state)
