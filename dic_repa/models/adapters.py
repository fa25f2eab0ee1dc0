"""LoRA (arXiv 2106.09685) by peft: beside a frozen convolution or linear layer two small matrices that train.

The layer then computes W x + scale B A x, with A and B of `rank` rows and columns. `merge` gives the plain denoiser
with W + scale B A in place of W, which computes the same: averages and samples know of no adapters.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dic_repa.errors import UserError

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names


def adaptable_layers(denoiser: nn.Module) -> list[str]:
    """The names of the layers that can have an adapter: convolutions and linear layers as torch has them."""
    return [
        name
        for name, module in denoiser.named_modules()
        if type(module) in (nn.Conv2d, nn.Linear) and getattr(module, "groups", 1) == 1
    ]


def add_adapters(denoiser: nn.Module, layers: Iterable[str], rank: int, alpha: float) -> None:
    """Give these layers of `denoiser` adapters, which add nothing at first, and freeze all else.

    Raises:
        UserError: peft is not installed.
    """
    _peft().inject_adapter_in_model(_config(layers, rank, alpha), denoiser)
    denoiser.adapter_scale = alpha / rank  # type: ignore[assignment]  # a number, no module


def is_adapter(name: str) -> bool:
    """Whether a tensor of that name is one of an adapter's two."""
    return name.endswith((DOWN, UP))


@torch.no_grad()
def merge(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The plain denoiser's tensors, under its names and in its order, from those of one with adapters.

    Of tensors that are cut up among processes, this process's rows. All lie in memory as they do without adapters.
    """
    merged = {}
    for name, tensor in tensors.items():
        layer, is_adapted, own = name.partition(BASE)
        if is_adapted and own == "weight":
            down, up = tensors[layer + DOWN], _local(tensors[layer + UP])
            down = down.full_tensor() if hasattr(down, "full_tensor") else down
            tensor = _local(tensor)
            added = (up.flatten(1) @ down.flatten(1)).reshape(tensor.shape)
            tensor = torch.add(tensor, added, alpha=scale, out=torch.empty_like(tensor))
        if not is_adapter(name):
            merged[name.replace(BASE, ".")] = tensor
    return merged


def plain_parameters(denoiser: nn.Module) -> list[Tensor]:
    """The parameters in their order; those of a denoiser with adapters merged, as `merge` does."""
    scale: Any = getattr(denoiser, "adapter_scale", None)
    return list(denoiser.parameters() if scale is None else merge(dict(denoiser.named_parameters()), scale).values())


def save_adapters(denoiser: nn.Module, tensors: Mapping[str, Tensor], rank: int, alpha: float, folder: Path) -> None:
    """Write the adapters alone into `folder`, as `peft.PeftModel.from_pretrained(denoiser, folder)` reads them.

    Args:
        denoiser: of the same shape, without adapters; it is changed.
        tensors: of a denoiser with adapters, all of them.
    """
    layers = [name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
    model = _peft().get_peft_model(denoiser, _config(layers, rank, alpha))
    model.base_model.model.load_state_dict(tensors)
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # a form to fill in


def _config(layers: Iterable[str], rank: int, alpha: float) -> Any:
    exactly = "|".join(map(re.escape, layers))  # peft takes a list for endings of names
    return _peft().LoraConfig(r=rank, lora_alpha=alpha, target_modules=exactly, bias="none")


def quiet_bitsandbytes() -> None:
    """Let bitsandbytes, which peft imports where it is installed, not warn on a CPU that a package for other ends, of 4
    bits, is not."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _peft() -> Any:
    try:
        quiet_bitsandbytes()
        import peft
    except ImportError:
        raise UserError("train.lora needs the package peft; install it: pip install 'dic-repa[lora]'") from None
    return peft


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
