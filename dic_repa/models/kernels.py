"""GroupNorm with GELU, and the gated end of a block, as operations of their own for GPUs, by Triton.

    norm_gelu        GELU(GroupNorm(x + bias) (1 + scale) + shift)     without bias, or without scale and shift, too
    gated_residual   x + gate (h + bias)

They read and write feature maps as often as they must: the first 3 times forwards (for the statistics, then the values)
and 5 times backwards, the second 3 and 3 times. Statistics and arithmetic are float32, whatever the feature maps are. A
bias is that of the convolution before, which then adds none. They are registered with torch, so that autograd,
torch.compile and checkpointing see them; their derivatives have none.

Imported only where a block uses them: Triton is not everywhere.
"""

from typing import Any

import torch
import triton
from torch import Tensor, nn

from dic_repa.models import triton_kernels

INTERPRETED = not isinstance(triton_kernels.apply_gelu, triton.JITFunction)  # on a CPU, with TRITON_INTERPRET=1
ROWS = 32  # of a tile
PROGRAMS = 1024  # that keep a GPU busy
MOST_CHUNKS = 64


def _register(name: str) -> Any:
    """A decorator: what torch.compile sees through, to the kernels. It cannot see through interpreted ones."""
    operation = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    return operation(f"dic_repa::{name}", mutates_args=())


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    launched = kernel if INTERPRETED else torch.library.wrap_triton(kernel)
    launched[grid](*arguments, **constants)


def _compute(x: Tensor) -> torch.dtype:
    """Of the arithmetic: float32, or float64 for derivatives that are compared with differences."""
    return torch.promote_types(x.dtype, torch.float32)


class _Plan:
    """How a feature map (B, C, H, W) is divided among programs."""

    def __init__(self, x: Tensor):
        self.images, self.channels, height, width = x.shape
        self.rows = height * width
        self.block = min(128, triton.next_power_of_2(self.channels))
        blocks = triton.cdiv(self.channels, self.block)
        wanted = min(MOST_CHUNKS, triton.cdiv(PROGRAMS, self.images * blocks), triton.cdiv(self.rows, ROWS))
        self.chunk_rows = ROWS * triton.cdiv(triton.cdiv(self.rows, wanted), ROWS)
        self.chunks = triton.cdiv(self.rows, self.chunk_rows)
        self.grid = (self.images, self.chunks, blocks)
        self.compute = _compute(x)
        self.constants = {"DOUBLE": self.compute == torch.float64}
        self.tile = {**self.constants, "BLOCK_R": ROWS, "BLOCK_C": self.block}
        self.sizes = (self.rows, self.channels, self.chunk_rows)

    def group(self, groups: int) -> dict[str, Any]:
        """The constants of a kernel whose programs have a group each."""
        size = self.channels // groups
        blocks = {"BLOCK_K": triton.next_power_of_2(self.chunks), "BLOCK_G": triton.next_power_of_2(size)}
        return {**self.constants, **blocks, "GROUP": size}


def _step(rows: Tensor | None) -> int:
    """From a row (C,) to the next in memory: the parts of a modulation lie side by side."""
    return 0 if rows is None else rows.stride(0)


def _new(x: Tensor, plan: _Plan, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=plan.compute)


@_register("norm_gelu")
def _norm_gelu(
    x: Tensor, weight: Tensor, shift_of_norm: Tensor, scale: Tensor | None, shift: Tensor | None, bias: Tensor | None,
    groups: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `norm_gelu` returns, and the coefficients (4, B, C) that its backward pass needs."""
    plan = _Plan(x)
    images, channels = plan.images, plan.channels
    means = _new(x, plan, images, plan.chunks, channels)
    squares = torch.empty_like(means)
    _launch(triton_kernels.statistics, plan.grid, x, means, squares, *plan.sizes, **plan.tile)
    found = _new(x, plan, 4, images, channels)
    _launch(
        triton_kernels.coefficients, (images, groups), means, squares, weight, shift_of_norm,
        x if scale is None else scale, x if shift is None else shift, x if bias is None else bias, found, _step(scale),
        plan.rows, channels, plan.chunks, plan.chunk_rows,
        MODULATED=scale is not None, BIASED=bias is not None, EPS=eps, **plan.group(groups),
    )  # fmt: skip
    y = torch.empty_like(x)
    _launch(triton_kernels.apply_gelu, plan.grid, x, found, y, *plan.sizes, **plan.tile)
    return y, found


@_norm_gelu.register_fake
def _(x, weight, shift_of_norm, scale, shift, bias, groups, eps):
    return torch.empty_like(x), x.new_empty((4, *x.shape[:2]), dtype=_compute(x))


@_register("norm_gelu_backward")
def _norm_gelu_backward(
    x: Tensor, dy: Tensor, found: Tensor, weight: Tensor, shift_of_norm: Tensor, scale: Tensor | None, groups: int
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and for each channel of an image (7, B, C): two coefficients of it, and the gradients of
    the norm's weight and bias, of scale and shift, and of the bias before."""
    plan = _Plan(x)
    images, channels = plan.images, plan.channels
    sums = _new(x, plan, 3, images, plan.chunks, channels)
    _launch(triton_kernels.gradient_sums, plan.grid, x, dy, found, sums, *plan.sizes, **plan.tile)
    more = _new(x, plan, 7, images, channels)
    _launch(
        triton_kernels.gradient_coefficients, (images, groups), sums, found, weight, shift_of_norm,
        x if scale is None else scale, more, _step(scale), plan.rows, channels, plan.chunks,
        MODULATED=scale is not None, **plan.group(groups),
    )  # fmt: skip
    dx = torch.empty_like(x)
    _launch(triton_kernels.gradient_of_input, plan.grid, x, dy, found, more, dx, *plan.sizes, **plan.tile)
    return dx, more


@_norm_gelu_backward.register_fake
def _(x, dy, found, weight, shift_of_norm, scale, groups):
    return torch.empty_like(x), found.new_empty((7, *x.shape[:2]))


def _keep_for_norm_gelu(ctx, inputs, output):
    x, weight, shift_of_norm, scale, shift, bias, ctx.groups, _ = inputs
    ctx.save_for_backward(x, output[1], weight, shift_of_norm, scale)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (scale, shift, bias)]


def _differentiate_norm_gelu(ctx, dy, _):
    x, found, weight, shift_of_norm, scale = ctx.saved_tensors
    dx, more = _norm_gelu_backward(x, _like(dy, x), found, weight, shift_of_norm, scale, ctx.groups)
    dtypes = [weight.dtype, shift_of_norm.dtype, *ctx.dtypes]
    of_images = [more[2].sum(0), more[3].sum(0), more[4], more[5], more[6].sum(0)]
    gradients = [None if dtype is None else each.to(dtype) for each, dtype in zip(of_images, dtypes)]
    return dx, *gradients, None, None


_norm_gelu.register_autograd(_differentiate_norm_gelu, setup_context=_keep_for_norm_gelu)


@_register("gated_residual")
def _gated_residual(x: Tensor, h: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    plan, y = _Plan(x), torch.empty_like(x)
    biased = bias is not None
    given = (x, h, gate, bias if biased else x, y, _step(gate))
    _launch(triton_kernels.gate, plan.grid, *given, *plan.sizes, BIASED=biased, **plan.tile)
    return y


@_gated_residual.register_fake
def _(x, h, gate, bias):
    return torch.empty_like(x)


@_register("gated_residual_backward")
def _gated_residual_backward(dy: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of h, and for each channel of an image the sums of dy h and of dy: (2, B, C)."""
    plan, dh = _Plan(h), torch.empty_like(h)
    sums = _new(h, plan, 2, plan.images, plan.chunks, plan.channels)
    _launch(triton_kernels.gate_gradients, plan.grid, dy, h, gate, dh, sums, _step(gate), *plan.sizes, **plan.tile)
    return dh, sums.sum(2)


@_gated_residual_backward.register_fake
def _(dy, h, gate):
    return torch.empty_like(h), h.new_empty((2, *h.shape[:2]), dtype=_compute(h))


def _keep_for_gated_residual(ctx, inputs, output):
    _, h, gate, bias = inputs
    ctx.save_for_backward(h, gate, bias)


def _differentiate_gated_residual(ctx, dy):
    h, gate, bias = ctx.saved_tensors
    dh, (products, slopes) = _gated_residual_backward(_like(dy, h), h, gate)
    if bias is None:
        return dy, dh, products.to(gate.dtype), None
    return dy, dh, (products + bias * slopes).to(gate.dtype), (gate * slopes).sum(0).to(bias.dtype)


_gated_residual.register_autograd(_differentiate_gated_residual, setup_context=_keep_for_gated_residual)


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """As the kernels read it beside `x`: of its type, and in channels_last, as it mostly is."""
    return tensor.to(x.dtype).contiguous(memory_format=torch.channels_last)


def norm_gelu(
    x: Tensor, norm: nn.GroupNorm, scale: Tensor | None = None, shift: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """GELU(norm(x + bias) (1 + scale) + shift), of x (B, C, H, W), in channels_last and of its type.

    scale and shift are (B, C), both or neither and laid out alike, with rows without gaps; bias is (C,).
    """
    y, _ = _norm_gelu(_like(x, x), norm.weight, norm.bias, scale, shift, bias, norm.num_groups, norm.eps)
    return y


def gated_residual(x: Tensor, h: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + gate (h + bias), of x and h (B, C, H, W), gate (B, C) with rows without gaps, bias (C,)."""
    return _gated_residual(_like(x, x), _like(h, x), gate, bias)
