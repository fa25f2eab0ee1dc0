"""Which of a denoiser's parameters train: all, or those that `train.freeze` leaves, or the adapters of `train.lora`."""

import fnmatch
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from dic_repa.errors import UserError, did_you_mean, first_few
from dic_repa.models.adapters import BASE, adaptable_layers, add_adapters
from dic_repa.recipe import TrainSection


def freeze(denoiser: nn.Module, settings: TrainSection) -> None:
    """Take the parameters out of the training that the recipe freezes; of a run with adapters, all but `lora.also`.

    Raises:
        UserError: a pattern names no parameter, or nothing is left.
    """
    names = [name for name, _ in denoiser.named_parameters()]
    frozen = select(names, settings.freeze, "train.freeze", "parameter")
    if settings.lora:
        if frozen:
            raise UserError("train.freeze: train.lora freezes all parameters but lora.also already; leave one out")
        frozen = set(names) - select(names, settings.lora.also, "train.lora.also", "parameter")
    elif len(frozen) == len(names):
        raise UserError("train.freeze freezes the whole denoiser, so nothing would train; leave a part of it out")
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for module in denoiser.modules():
        if frozen and isinstance(module, nn.GroupNorm) and trainable(module):
            module.register_forward_pre_hook(_with_gradient)


def _with_gradient(_norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Let a norm behind frozen layers have a gradient of its input: torch 2.6 on a CPU crashes where it has none."""
    x = inputs[0]
    if x.requires_grad or x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return (x.detach().requires_grad_(), *inputs[1:])


def adapt(denoiser: nn.Module, settings: TrainSection) -> None:
    """Give the denoiser the adapters of `train.lora`, if the recipe has them; `freeze` comes before.

    Raises:
        UserError: a pattern names no layer, or peft is not installed.
    """
    if settings.lora is None:
        return
    lora, trained = settings.lora, trainable(denoiser)
    layers = adaptable_layers(denoiser)
    chosen = select(layers, lora.targets, "train.lora.targets", "convolution or linear layer")
    chosen -= {name.removesuffix(".weight") for name in trained}  # all of such a layer trains
    if not chosen:
        raise UserError("train.lora.also trains all layers of train.lora.targets in full; leave some to the adapters")
    add_adapters(denoiser, [name for name in layers if name in chosen], lora.rank, lora.alpha)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in trained)


def select(names: Sequence[str], patterns: Iterable[str], key: str, what: str) -> set[str]:
    """The `names` that match one of the shell patterns; a UserError for a pattern that matches none, with near ones."""
    found: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise UserError(f"{key}: no {what} of the denoiser is named '{pattern}'{_near(pattern, names)}")
        found.update(matched)
    return found


def _near(pattern: str, names: Iterable[str]) -> str:
    parts = [name.split(".") for name in names]
    above = {".".join(part[:n]) + ".*" for part in parts for n in range(1, len(part))}
    words = [(part, n) for part in parts for n in range(1, len(part)) if not part[n].isdecimal()]
    inside = {f"*.{part[n]}" + ".*" * (n < len(part) - 1) for part, n in words}
    near = did_you_mean(pattern, {*names, *above, *inside})
    tops = {part[0] + ".*" * (len(part) > 1) for part in parts}
    return near if near.startswith("; did") else did_you_mean("", tops)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, for the optimizer."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trainable(model: nn.Module) -> list[str]:
    """The names of the parameters that train, in the model's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def check_fresh(denoiser: nn.Module, fresh: Collection[str]) -> None:
    """A UserError if parameters with new values, which `train.init_from` did not have, would never train."""
    trained = {name.replace(BASE, ".") for name in trainable(denoiser)}
    if stuck := [name for name, _ in denoiser.named_parameters() if name in fresh and name not in trained]:
        raise UserError(
            f"{first_few(stuck, 5)} would stay at new random values, since train.init_from lacks them or a part of "
            "them; take them out of train.freeze, or into train.lora.also"
        )


def describe_trainable(denoiser: nn.Module, settings: TrainSection) -> str:
    """For the header: how many of the denoiser's parameters train; '' if all do."""
    sizes = {name: parameter.numel() for name, parameter in denoiser.named_parameters()}
    trained = trainable(denoiser)
    if len(trained) == len(sizes):
        return ""
    count = sum(sizes[name] for name in trained) / 1e6
    if settings.lora is None:
        return f"{count:.4g} M parameters; frozen: {first_few(settings.freeze, 5)}"
    layers = sum(".lora_A." in name for name in trained)
    also = f", and {first_few(settings.lora.also, 5)}" if settings.lora.also else ""
    return f"{count:.4g} M parameters: adapters of rank {settings.lora.rank} on {layers} layers{also}"
