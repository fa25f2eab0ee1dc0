"""Parameters, gradients and optimizer state cut up among the processes (FSDP2), stage by stage.

Torch's own `fully_shard` does it, even if Accelerate was launched with an FSDP2 configuration: so it also works on CPU
processes (gloo), and the averaged weights are cut like the denoiser. Each process saves its own rows
(`files/shards.py`), and reads its own from any checkpoint, so that they load in any number of processes.
"""

import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dic_repa.errors import UserError
from dic_repa.files.shards import Rows, Stored


def wants_sharding(sharding: str, accelerator: Accelerator) -> bool:
    """Whether the recipe or the launcher's configuration asks for sharding, and there are several processes."""
    # Accelerate ignores its FSDP configuration on CPUs, so the environment is read too.
    launched = accelerator.is_fsdp2 or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return (sharding == "fsdp2" or launched) and accelerator.num_processes > 1


def shard(model: nn.Module, denoiser: Any, accelerator: Accelerator) -> Any:
    """Shard `model` in place: each stage of its `denoiser` is gathered for its turn, all else at the root.

    A UserError for processes on CPUs, which torch 2.6 cannot shard on.
    """
    if accelerator.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise UserError("train.sharding fsdp2 needs torch 2.7 or newer on CPUs; take none")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Heads give views of feature maps, which nothing changes in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    model.to(memory_format=torch.contiguous_format)  # it takes no others
    if accelerator.device.type == "cuda":
        # A GPU's half-precision convolutions are channels_last inside. They then reorder the weights, which are small
        # compared with the activations; so the activations keep their order.
        denoiser.layout = torch.channels_last
    for stage in stages(denoiser):
        fully_shard(stage, mesh=mesh)
    # Also the root's: after sampling from averaged weights they must be shards again for their next update.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if hasattr(model, "derivative"):  # gathered for it, too
        register_fsdp_forward_method(model, "derivative")
    return model


def stages(model: nn.Module) -> list[list[nn.Module]]:
    """The innermost module lists with parameters: DiC's encoder, middle and decoder stages; a transformer's blocks."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and [*module.parameters()]]
    return [list(each) for each in lists if sum(isinstance(inner, nn.ModuleList) for inner in each.modules()) == 1]


def cut_like(whole: Tensor | Stored, like: Any) -> Tensor:
    """`whole`, cut up and laid out in memory as `like` is, if that has its shape; of a `Stored`, no more is read.

    No process waits for another.
    """
    if like is None or tuple(like.shape) != tuple(whole.shape):
        return whole[...]
    if not hasattr(like, "device_mesh"):
        tensor = whole[...]
        return torch.empty_like(like, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    from torch.distributed.tensor import DTensor

    own, first = like.to_local(), first_row(like)
    rows = whole[first : first + own.shape[0]]
    rows = torch.empty_like(own, dtype=rows.dtype).copy_(rows)  # a fused optimizer takes no other layout
    spec = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, **spec)


def first_row(cut: Any) -> int:
    """Where this process's rows of a tensor begin, which `fully_shard` has cut into as many chunks as processes."""
    chunk = -(-cut.shape[0] // cut.device_mesh.size())
    return min(cut.device_mesh.get_local_rank() * chunk, cut.shape[0])


def to_cpu(tree: Any, main: bool) -> Any:
    """A copy in CPU memory of all tensors in nested dicts and lists: of those that are cut up, this process's `Rows`.

    The others are alike in all processes; those that are not `main` have None in their place.
    """

    def copied(tensor: Any) -> Tensor | Rows | None:
        tensor = tensor.detach()
        if hasattr(tensor, "placements") and all(placement.is_shard(0) for placement in tensor.placements):
            return Rows(tensor.to_local().to("cpu", copy=True), first_row(tensor))
        if hasattr(tensor, "full_tensor"):  # such as an optimizer's sums over rows: all processes exchange them
            tensor = tensor.full_tensor()
        return tensor.to("cpu", copy=True) if main else None

    return tree_map_only(Tensor, copied, tree)
