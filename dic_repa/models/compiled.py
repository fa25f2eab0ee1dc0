"""A denoiser behind torch.compile: the whole of it, or each of its blocks by itself.

Alike blocks share their code, so compiling by block takes a small part of the time of one graph of the whole: DiC has a
graph for each width of its blocks, not for each block.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.conditions import null_of
from dic_repa.errors import UserError, first_line
from dic_repa.models.layers import RecomputableBlock
from dic_repa.models.pretrained import Pretrained
from dic_repa.runtime.progress import detail, warn

GRAPH_MODES = ("reduce-overhead", "max-autotune")
BY_BLOCK, AUTO = "blocks", "auto"
# Classes of diffusers' blocks, for its models that name none in `_repeated_blocks`.
DIFFUSERS_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "Attention")


class CompiledDenoiser(nn.Module):
    """`denoiser`, compiled for each shape that it meets; the modes are torch.compile's, and 'blocks': each block by
    itself, and only when it is called here.

    'reduce-overhead' and 'max-autotune' record CUDA graphs. The next call writes over their output, so it is copied. On
    a CPU there are no graphs, and 'reduce-overhead' is 'default'.
    """

    def __init__(self, denoiser: Pretrained, mode: str = "default"):
        super().__init__()
        allow_recompilation()
        self.denoiser, self.graphs = denoiser, mode in GRAPH_MODES
        by_block = mode == BY_BLOCK
        self.compiled = _ByBlock(denoiser) if by_block else torch.compile(denoiser, mode=mode, dynamic=False)
        self.in_channels, self.null = denoiser.in_channels, null_of(denoiser)
        self.met: set[torch.Size] = set()  # shapes that were compiled for

    @property
    def middle_head(self) -> nn.Module | None:
        return getattr(self.denoiser, "middle_head", None)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        begin = time.perf_counter()
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
            out = self.compiled(x, t, y).clone()
        else:
            out = self.compiled(x, t, y)
        if x.shape not in self.met:
            self.met.add(x.shape)
            detail(f"compiled for a batch of {len(x)}: the first call took {time.perf_counter() - begin:.1f} s")
        return out


def training_mode(wanted: bool | str, denoiser: nn.Module, device: torch.device) -> bool | str:
    """`train.compile` as it is on this device: 'auto' is by block on a GPU, if the denoiser has blocks."""
    if wanted != AUTO:
        return wanted
    return BY_BLOCK if can_compile(denoiser, device) else False


def can_compile(denoiser: nn.Module, device: torch.device) -> bool:
    """Whether torch.compile can make code for the GPU `device`, block by block."""
    return device.type == "cuda" and any(_blocks_within(denoiser, ())) and compiler_works(device)


@functools.cache
def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile works for the device, tried out once, forwards and backwards; a warning says why not.

    It needs Triton, a C compiler, Python's headers and a new enough GPU, but only a trial shows that all fit together.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(2, 8, 4, 4, device=device, requires_grad=True)
            torch.compile(lambda x: F.gelu(F.group_norm(x, 2)), dynamic=False)(x).sum().backward()
    except Exception as error:  # the compilers' own, of any kind
        why = first_line(getattr(error, "inner_exception", error))
        warn(f"torch.compile does not work on {device} ({why}); computing without it, which is slower")
        return False
    return True


def allow_recompilation(limit: int = 256) -> None:
    """Let one piece of code be compiled for many models and shapes; beyond 8, torch falls back to eager silently."""
    import torch._dynamo

    for name in ("recompile_limit", "cache_size_limit"):  # the latter until torch 2.6
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, max(limit, getattr(torch._dynamo.config, name)))


def compile_blocks(denoiser: nn.Module) -> None:
    """Compile each block of `denoiser` when it is first called: a graph for each kind of block and shape.

    Compiled is what a block computes, inside of gradient checkpointing and of hooks such as a tap's. Weights and their
    names stay as they are, and a deep copy computes with its own. A UserError for a denoiser that has no blocks.
    """
    import torch._dynamo

    # DDP's exchange goes on between blocks. Where torch makes places for it, it cuts each block's graph in two.
    torch._dynamo.config.optimize_ddp = False
    _set_compiled(find_blocks(denoiser))


def find_blocks(denoiser: nn.Module) -> list[tuple[nn.Module, str]]:
    """The blocks, each with the method that computes it; a UserError if there are none.

    Ours are `RecomputableBlock`s. Of a model of diffusers, those that its class names in `_repeated_blocks`, by default
    `DIFFUSERS_BLOCKS`. Of blocks in one another, the outer one.
    """
    blocks = list(_blocks_within(denoiser, ()))
    if not blocks:
        raise UserError(
            f"{type(denoiser).__name__} has no blocks that could be compiled one by one; compile all of it "
            "(train.compile true, sample.compile default), or derive its blocks from RecomputableBlock"
        )
    return blocks


def _blocks_within(module: nn.Module, names: Collection[str]) -> Iterator[tuple[nn.Module, str]]:
    kind: Any = type(module)
    if hasattr(kind, "_repeated_blocks"):  # diffusers'
        names = kind._repeated_blocks or DIFFUSERS_BLOCKS
    for child in module.children():
        if isinstance(child, RecomputableBlock):
            yield child, "_forward"
        elif type(child).__name__ in names:
            yield child, "forward"
        else:
            yield from _blocks_within(child, names)


def _set_compiled(blocks: list[tuple[nn.Module, str]]) -> None:
    allow_recompilation()
    for block, method in blocks:
        setattr(block, method, _CompiledMethod(block, method))


class _CompiledMethod:
    """The method of a module's class, compiled; in place of the method.

    It holds the module and not its bound method, so that what is copied or pickled with the module belongs to the copy.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        method = getattr(type(self.module), self.name)
        eager = _never_compiled(inputs) or _hooked_within(self.module)
        return (method if eager else _compiled(method))(self.module, *inputs, **options)


def _never_compiled(inputs: tuple[Any, ...]) -> bool:
    """Where only shapes are asked for, or derivatives in forward mode."""
    return inputs[0].is_meta or torch._C._functorch.peek_interpreter_stack() is not None


def _hooked_within(block: nn.Module) -> bool:
    """Whether there are hooks inside, such as a tap's: torch would run the code of an alike block without them."""
    return any(module._forward_hooks for module in block.modules() if module is not block)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


class _ByBlock:
    """Calls `denoiser`, whose blocks are compiled for the time of the call: to others it stays as it is."""

    def __init__(self, denoiser: nn.Module):
        self.denoiser, self.blocks = denoiser, find_blocks(denoiser)

    def __call__(self, *inputs: Tensor) -> Tensor:
        with self._compiled():
            return self.denoiser(*inputs)

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        before = [vars(block).get(method) for block, method in self.blocks]
        _set_compiled(self.blocks)
        try:
            yield
        finally:
            for (block, method), value in zip(self.blocks, before):
                if value is None:
                    delattr(block, method)
                else:
                    setattr(block, method, value)
