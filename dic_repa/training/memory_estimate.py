"""What a training step will need of a GPU's memory, from shapes alone.

The step's forward pass is run on fake tensors, which have shapes and no memory, and what autograd keeps for the
backward pass is added up. An estimate of the eager mode: the workspaces of cuDNN, the allocator's fragmentation and the
gradients of activations come on top, and torch.compile saves some.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dic_repa.alignment import AlignedDenoiser
from dic_repa.conditions import NoCondition, condition_of_model
from dic_repa.limits import check_limit
from dic_repa.objectives import Batch
from dic_repa.protocols import Objective
from dic_repa.recipe import Recipe, TrainSection
from dic_repa.training.optimizers import state_bytes

NORMS = (F.group_norm, F.layer_norm)


class FloatNorms(TorchFunctionMode):
    """Autocast on a GPU runs norms in float32, on a CPU it does not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in NORMS:
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))


def estimate_memory(
    shapes: dict, objective: Objective, settings: TrainSection, processes: int, rows: int, optimizer_bytes: float
) -> dict[str, int]:
    """Bytes by purpose, for one process.

    Args:
        shapes: as `dry_run.build_shapes` returns them; the model is left on fake tensors.
        rows: of one pass.
        optimizer_bytes: that the optimizer keeps for each weight; 8 are AdamW's two moments.
    """
    model, mixed = shapes["model"], settings.precision != "no"
    weights, trained = 4 * count_parameters(model), 4 * shapes["parameters"]["trained"]
    averages = 4 * shapes["parameters"]["denoiser"] * (1 + len(settings.more_ema_decays) + len(settings.power_ema))
    sharded = settings.sharding != "none" and processes > 1
    share = processes if sharded else 1
    several_passes = rows < settings.batch_size // processes
    return {
        "weights": weights // share,
        "gradients": trained // share,
        # DDP's buffers. Of one pass, the gradients are views of them; several add up their own first.
        "exchange of gradients": trained if processes > 1 and not sharded and several_passes else 0,
        "optimizer": int(optimizer_bytes * trained / 4) // share,
        "averages": averages // share,
        "encoders": 4 * sum(shapes["parameters"]["encoders"].values()),
        "activations": activation_bytes(model, objective, shapes["tokens"], (rows, *shapes["data"]), mixed),
    }


def check_memory(recipe: Recipe, denoiser: nn.Module, device: torch.device, share: int, shape: tuple) -> None:
    """A UserError before a CPU is asked for more memory than there is; a GPU says that itself.

    Args:
        share: samples of a step in this process, each of this `shape`.
    """
    if device.type == "cpu":
        settings = recipe.train
        copies = 3 + len(settings.more_ema_decays) + len(settings.power_ema)  # weights, gradients, averages
        weights = (4 * copies + state_bytes(recipe.optimizer)) * count_parameters(denoiser)
        what = "the memory for weights, gradients, optimizer, averages and a batch, in bytes,"
        check_limit("memory", int(weights) + 16 * share * math.prod(shape), what)


def activation_bytes(
    model: AlignedDenoiser, objective: Objective, tokens: Sequence[tuple[int, int] | None], shape: tuple, mixed: bool
) -> int:
    """What autograd keeps of one pass; under mixed precision with the weights' half-precision copies."""
    batch, condition = shape[0], condition_of_model(model.denoiser) or NoCondition()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # views share what they look at
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), FloatNorms() if mixed else nullcontext():
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)).train()  # to_empty takes no fakes
        # Autograd keeps nothing of it, and fake tensors have no forward mode.
        model.derivative = lambda x, *_: torch.zeros_like(x)  # type: ignore[method-assign]
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        draws = objective.draw(shape, torch.Generator())
        targets = [torch.empty(batch, *token) if token else None for token in tokens]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with autocast:
                out = objective(model, Batch(torch.empty(shape), condition.blank(batch), draws, model.denoiser))
            loss = sum((values.mean() for values in out.others.values()), out.loss.mean())
            for alignment, projection, target in zip(model.alignments, out.projections, targets):
                loss = loss + alignment.loss(projection, target, out.time)[0]
        return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in own)


def count_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
