"""Whether a block computes by Triton's kernels (`kernels.py`): it is its plain code that they must agree with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.errors import first_line
from dic_repa.runtime.progress import warn

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FEWEST = 2**21  # values of a feature map; with fewer, starting these kernels takes longer than torch's own take
LARGEST_GROUP = 256  # channels of a norm's group that one program adds up
KERNELS = ("auto", "off")


def set_kernels(denoiser: nn.Module, kernels: str = "auto") -> None:
    """Let the blocks of `denoiser` compute by Triton's kernels where they can ('auto'), or never ('off')."""
    blocks: list[Any] = [module for module in denoiser.modules() if hasattr(module, "kernels")]
    for block in blocks:
        block.kernels = kernels != "off"


def use_kernels(block: Any, x: Tensor) -> bool:
    """Whether `block` computes by kernels: of a large feature map x (B, C, H, W) in channels_last on a GPU.

    Not with hooks inside, such as a tap's, or with layers of other classes, such as adapters: these want to be called.
    Not where torch differentiates by its functional transforms.
    """
    return bool(block.kernels) and fits(x) and _plain(block) and not _transformed() and kernels_work(x.get_device())


def fits(x: Tensor) -> bool:
    large = x.is_cuda and x.dtype in DTYPES and x.numel() >= FEWEST
    return large and x.is_contiguous(memory_format=torch.channels_last)


def _plain(block: Any) -> bool:
    norms, convolutions = (block.norm1, block.norm2), (block.conv1, block.conv2)
    if any(type(norm) is not nn.GroupNorm for norm in norms) or any(type(c) is not nn.Conv2d for c in convolutions):
        return False
    hooked = any(len(each._forward_hooks) or len(each._forward_pre_hooks) for each in (*norms, *convolutions))
    return not hooked and all(norm.num_channels // norm.num_groups <= LARGEST_GROUP for norm in norms)


def _transformed() -> bool:
    # Where torch.compile traces, this has been asked before (`compiled._never_compiled`).
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result
def kernels_work(device: int) -> bool:
    """Whether the GPU of that number gives by kernels what it gives without; a warning says why not."""
    return _tried(device)


@functools.cache
def _tried(device: int) -> bool:
    try:
        for dtype in (torch.float32, torch.bfloat16):
            compare_with_plain(torch.device("cuda", device), dtype)
    except Exception as error:  # a missing package, the compilers' own errors, or a difference
        warn(f"Triton's kernels do not work on cuda:{device} ({first_line(error)}); computing without them")
        return False
    return True


def compare_with_plain(device: torch.device, dtype: torch.dtype) -> None:
    """An AssertionError where output or gradient of both kernels, on a small feature map, differ from torch's own by
    more than the type's rounding."""
    from dic_repa.models.kernels import gated_residual, norm_gelu  # needs Triton

    rounding = 1e-3 if dtype == torch.float32 else 0.03
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        generator = torch.Generator(device).manual_seed(0)
        values = torch.randn(2, 12, 12, 96, generator=generator, device=device).to(dtype).permute(0, 3, 1, 2)
        x, exact = values.requires_grad_(), values.float().detach().requires_grad_()
        norm = nn.GroupNorm(8, 96, device=device)
        m, b = values.detach()[:, :, 0, 0], values.detach()[0, :, 0, 1]  # for scale, shift and gate; for the biases
        ours = gated_residual(x, norm_gelu(x, norm, m, m, b), m, b)
        wide, bias = m[:, :, None, None].float(), b[:, None, None].float()
        plain = exact + wide * (F.gelu(norm(exact + bias) * (1 + wide) + wide) + bias)
        torch.testing.assert_close(ours.float(), plain, rtol=rounding, atol=rounding)
        upstream = values.detach().flip(0)
        gradients = [torch.autograd.grad(y, leaf, upstream.to(y.dtype))[0] for y, leaf in ((ours, x), (plain, exact))]
        torch.testing.assert_close(gradients[0].float(), gradients[1], rtol=rounding, atol=rounding)
