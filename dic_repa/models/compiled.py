"""A denoiser behind torch.compile, for sampling."""

import torch
from torch import Tensor, nn

from dic_repa.conditions import null_of
from dic_repa.models.pretrained import Pretrained

GRAPH_MODES = ("reduce-overhead", "max-autotune")


class CompiledDenoiser(nn.Module):
    """`denoiser`, compiled for each shape that it meets; the modes are torch.compile's.

    'reduce-overhead' and 'max-autotune' record CUDA graphs. The next call writes over their output, so it is copied. On
    a CPU there are no graphs, and 'reduce-overhead' is 'default'.
    """

    def __init__(self, denoiser: Pretrained, mode: str = "default"):
        super().__init__()
        allow_recompilation()
        self.denoiser, self.graphs = denoiser, mode in GRAPH_MODES
        self.compiled = torch.compile(denoiser, mode=mode, dynamic=False)
        self.in_channels, self.null = denoiser.in_channels, null_of(denoiser)

    @property
    def middle_head(self) -> nn.Module | None:
        return getattr(self.denoiser, "middle_head", None)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if not self.graphs:
            return self.compiled(x, t, y)
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(x, t, y).clone()


def allow_recompilation(limit: int = 256) -> None:
    """Let one piece of code be compiled for many models and shapes; beyond 8, torch falls back to eager silently."""
    import torch._dynamo

    for name in ("recompile_limit", "cache_size_limit"):  # the latter until torch 2.6
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, max(limit, getattr(torch._dynamo.config, name)))
