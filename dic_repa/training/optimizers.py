"""The optimizers by name, and what each keeps for a weight.

An optimizer is made as `factory(parameters, lr=..., weight_decay=..., betas=..., **options)`; it need not take
`weight_decay` and `betas`, and is given the `model` if it takes that. Any of torch.optim will do, as
`torch.optim:NAdam`. One that takes `found_inf`, as the fused ones do, skips a step on the device, so that the host need
not wait for it; the fused ones also clip the gradients while they read them, by `grad_scale`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from dic_repa.errors import UserError
from dic_repa.models.adapters import quiet_bitsandbytes
from dic_repa.recipe.schema import OptimizerSection
from dic_repa.registry import Registry
from dic_repa.training.muon import Muon
from dic_repa.training.trainable import select, trained_parameters

optimizers = Registry("optimizer", key="optimizer.name")


@optimizers.register("adamw")
def adamw(parameters, lr, weight_decay=0.0, betas=(0.9, 0.999), **options) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay: what DiC, SiT, REPA and U-REPA are trained with."""
    return torch.optim.AdamW(parameters, lr, betas, weight_decay=weight_decay, fused=True, **options)


@optimizers.register("adamw-8bit")
def adamw_8bit(parameters, lr, weight_decay=0.0, betas=(0.9, 0.999), **options) -> torch.optim.Optimizer:
    """AdamW that keeps its moments in 8 bits, by bitsandbytes: a quarter of AdamW's memory (arXiv 2110.02861).

    Raises:
        UserError: bitsandbytes is not installed, or the model is sharded.
    """
    parameters = list(parameters)
    if any(hasattr(parameter, "device_mesh") for parameter in parameters):
        raise UserError(
            "optimizer adamw-8bit does not take sharded weights; take adamw, whose moments are divided among "
            "the processes, or train.sharding: none"
        )
    quiet_bitsandbytes()
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        hint = "install it: pip install 'dic-repa[low-bit]', or take adamw"
        raise UserError(f"optimizer adamw-8bit needs the package bitsandbytes; {hint}") from None
    optimizer = AdamW8bit(parameters, lr, betas, weight_decay=weight_decay, **options)
    keep_layouts(optimizer)
    return optimizer


def keep_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Let the weights stay where and as they are in memory: bitsandbytes puts contiguous copies in their place, and by
    the layout of weights that of all activations is chosen."""
    kept: list[tuple[nn.Parameter, Tensor]] = []

    def before(*_: Any) -> None:
        weights = (parameter for group in optimizer.param_groups for parameter in group["params"])
        kept[:] = [(weight, weight.data) for weight in weights if not weight.is_contiguous()]

    def after(*_: Any) -> None:
        for weight, data in kept:
            if weight.data_ptr() != data.data_ptr():
                weight.data = data.copy_(weight.data)
        kept.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


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


@optimizers.register("muon")
def muon(
    parameters, lr, weight_decay=0.0, betas=(0.9, 0.999), momentum: float = 0.95, others_rate: float = 1.0,
    others: Sequence[str] = (), model: nn.Module | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    """Orthogonalised momentum for hidden layers and convolutions, AdamW for the rest, at the same learning rate.

    Args:
        others_rate: the learning rate of the rest, as a share of the matrices'.
        others: patterns of further parameters that are AdamW's, such as '*.modulation.*'.
    """
    parameters = list(parameters)
    hidden = hidden_matrices(model or nn.ParameterList(parameters), others)
    known = {id(parameter) for parameter in hidden}
    rest = [parameter for parameter in parameters if id(parameter) not in known]
    return Muon(hidden, rest, lr, weight_decay, betas, momentum, others_rate)


def build_optimizer(section: OptimizerSection, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe's `optimizer` section, over the parameters of `model` that train.

    Raises:
        UserError: for an unknown name, options that it does not take, and a key of the section that it has no use for.
    """
    takes = inspect.signature(optimizers.find(section.name)).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    given = {"lr": section.learning_rate, **({"model": model} if "model" in takes else {})}
    for key in ("weight_decay", "betas"):
        value = getattr(section, key)
        if key in takes:
            given[key] = value
        elif value != OptimizerSection.model_fields[key].default:
            hint = "; name it in optimizer.options" if takes_any else ""
            raise UserError(f"optimizer.{key}: {section.name} does not take it{hint}")
    optimizer = optimizers.create(section.name, trained_parameters(model), **given, **section.options)
    if section.weight_decay and section.decay_on == "matrices":
        spare_vectors(optimizer, model)
    return optimizer


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights that train and map vectors to vectors: of linear layers and convolutions.

    That is, all of at least two dimensions and two rows that are no table of embeddings: biases, the scales of norms,
    and positions (1, N, D) are none.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [p for p in trained_parameters(model) if p.ndim > 1 and p.shape[0] > 1 and id(p) not in tables]


def hidden_matrices(model: nn.Module, others: Sequence[str] = ()) -> list[nn.Parameter]:
    """What Muon trains: the `matrices` but for the denoiser's first and last layer, and those of the patterns `others`.

    Its authors (github.com/KellerJordan/Muon) leave embeddings, a ConvNet's first layer and the last one to AdamW. A
    middle head's last layer is one, too. A denoiser of further such layers names them in `end_layers`.

    Raises:
        UserError: a pattern of `others` names no parameter.
    """
    denoiser = getattr(model, "denoiser", model)
    head = getattr(denoiser, "middle_head", None)
    own = set(head.modules()) if head is not None else set()
    layers = [
        module.weight
        for module in denoiser.modules()
        if module not in own
        and not isinstance(module, nn.Embedding)
        and getattr(getattr(module, "weight", None), "ndim", 0) > 1
    ]
    named = dict(model.named_parameters())
    chosen = select(list(named), others, "optimizer.options.others", "parameter")
    more = [getattr(denoiser.get_submodule(name), "weight", None) for name in getattr(denoiser, "end_layers", ())]
    ends = [*layers[:1], *layers[-1:], *more, *([head.linear.weight] if head is not None else [])]
    left = {id(layer) for layer in ends} | {id(named[name]) for name in chosen}
    return [parameter for parameter in matrices(model) if id(parameter) not in left]


def spare_vectors(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Let nothing but the `matrices` decay: the others move to groups of their own, without weight decay."""
    decaying = {id(parameter) for parameter in matrices(model)}
    for group in list(optimizer.param_groups):
        spared = [parameter for parameter in group["params"] if id(parameter) not in decaying]
        if spared:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in decaying]
            optimizer.add_param_group({**group, "params": spared, "weight_decay": 0.0})


def optimized_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the parameters in the optimizer's order, which is that of its state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer leaves a step out by its flag `found_inf`."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def scales_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer divides gradients by its `grad_scale` while it reads them, as torch's fused ones do; with
    sharded weights none is asked to."""
    if not skips_on_device(optimizer) or not all(group.get("fused") for group in optimizer.param_groups):
        return False
    first = next(parameter for group in optimizer.param_groups for parameter in group["params"])  # all are alike
    return first.device.type in ("cpu", "cuda") and not hasattr(first, "device_mesh")


def clip_gradients(
    model: nn.Module, limit: float | None, optimizer: AcceleratedOptimizer, accelerator: Accelerator
) -> Tensor:
    """The norm of all gradients of `model`, a scalar. Where it is above `limit`, they are scaled down to that: by the
    optimizer's coming step if it can do so in passing, and else now.

    As torch.nn.utils.clip_grad_norm_ does it, gradient * min(limit / (norm + 1e-6), 1).
    """
    own: Any = optimizer.optimizer
    if accelerator.scaler is not None or not scales_gradients(own):
        norm: Any = accelerator.clip_grad_norm_(model.parameters(), limit or float("inf"))
        return getattr(norm, "full_tensor", lambda: norm)()  # the whole norm, where the model is sharded
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    own.grad_scale = ((norm.float() + 1e-6) / limit).clamp(min=1.0) if limit else None
    return norm


def state_bytes(section: OptimizerSection) -> float:
    """Bytes that the optimizer keeps for each weight, found by one step on the hidden layer of a small network."""
    with torch.random.fork_rng(devices=[]):  # a run's initial weights come from its seed alone
        layers = [nn.Linear(256, 256, bias=False) for _ in range(3)]
    weight = layers[1].weight
    optimizer = build_optimizer(section, nn.Sequential(*layers))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in kept if value.numel() > 1) / weight.numel()
