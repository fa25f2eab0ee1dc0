"""The optimizers by name, and what each keeps for a weight.

An optimizer is made as `factory(parameters, lr=..., weight_decay=..., betas=..., **options)`; it need not take
`weight_decay` and `betas`. Any of torch.optim will do, as `torch.optim:NAdam`. One that takes `found_inf`, as the fused
ones do, skips a step on the device, so that the host need not wait for it.
"""

import inspect
from collections.abc import Iterable

import torch
from torch import nn

from dic_repa.errors import UserError
from dic_repa.recipe.schema import OptimizerSection
from dic_repa.registry import Registry

optimizers = Registry("optimizer", key="optimizer.name")


@optimizers.register("adamw")
def adamw(parameters, lr, weight_decay=0.0, betas=(0.9, 0.999), **options) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay: what DiC, SiT, REPA and U-REPA are trained with."""
    return torch.optim.AdamW(parameters, lr, betas, weight_decay=weight_decay, fused=True, **options)


@optimizers.register("adam")
def adam(parameters, lr, weight_decay=0.0, betas=(0.9, 0.999), **options) -> torch.optim.Optimizer:
    """Adam, whose weight decay is a part of the gradient."""
    return torch.optim.Adam(parameters, lr, betas, weight_decay=weight_decay, fused=True, **options)


@optimizers.register("sgd")
def sgd(parameters, lr, weight_decay=0.0, momentum=0.9, **options) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum: half of Adam's memory."""
    parameters = list(parameters)
    fused = not any(hasattr(parameter, "device_mesh") for parameter in parameters)  # torch has none for shards
    return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, fused=fused, **options)


def build_optimizer(section: OptimizerSection, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a recipe's `optimizer` section, over `parameters`.

    Raises:
        UserError: for an unknown name, options that it does not take, and a key of the section that it has no use for.
    """
    takes = inspect.signature(optimizers.find(section.name)).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    given = {"lr": section.learning_rate}
    for key in ("weight_decay", "betas"):
        value = getattr(section, key)
        if key in takes:
            given[key] = value
        elif value != OptimizerSection.model_fields[key].default:
            hint = "; name it in optimizer.options" if takes_any else ""
            raise UserError(f"optimizer.{key}: {section.name} does not take it{hint}")
    return optimizers.create(section.name, parameters, **given, **section.options)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer leaves a step out by its flag `found_inf`."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def state_bytes(section: OptimizerSection) -> float:
    """Bytes that the optimizer keeps for each weight, found by one step on a small matrix."""
    weight = nn.Parameter(torch.ones(64, 64))
    optimizer = build_optimizer(section, [weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in kept if value.numel() > 1) / weight.numel()
