"""Muon (Keller Jordan et al., 2024): momentum whose matrix is orthogonalised before each step; AdamW for the rest.

torch has Muon from 2.9 on, for parameters of two dimensions alone. This one takes convolutions, works with every torch,
skips a step on the device, shares the work among processes, and is one optimizer with its AdamW. The tests hold its
update against torch's.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from dic_repa.training.sharding import cut_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic, the steepest at 0 that stays near 1
RMS = 0.2  # of a matrix's step at learning rate 1, about that of AdamW's: arXiv 2502.16982, section 2.2


class Muon(torch.optim.Optimizer):
    """M <- mu M + (1 - mu) G; W <- W - lr (0.2 sqrt(max(m, n)) UV' + weight_decay W).

    U S V' is the singular value decomposition of (1 - mu) G + mu M, an m x n matrix; a convolution's kernel is the
    matrix (out, in * height * width). UV' is found by five Newton-Schulz iterations, on a GPU in bfloat16 and on a CPU
    in float32. The factor makes the step about as large as AdamW's, so that both take the same learning rate (arXiv
    2502.16982).

    Of several processes, which all have the same gradients or shards of them, each does it for its share of the
    matrices, and sends them to the others.

    Args:
        matrices: parameters of two or more dimensions.
        others: all other parameters; AdamW's, with `betas`.
        others_rate: their learning rate as a share of `lr`.
    """

    _step_supports_amp_scaling = True  # it takes `found_inf` and `grad_scale`, as torch's fused optimizers do

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter], lr: float = 1e-3,
        weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999), momentum: float = 0.95,
        others_rate: float = 1.0,
    ):  # fmt: skip
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum}: give the share that is kept, from 0 to below 1")
        rest = {"params": list(others), "lr": lr * others_rate}
        self.adamw = torch.optim.AdamW([rest], lr, betas, weight_decay=weight_decay, fused=True)
        groups = [{"params": list(matrices), "momentum": momentum}, *self.adamw.param_groups]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """Change the weights by the gradients; not at all where `found_inf` is set."""
        if closure is not None:
            raise TypeError("Muon takes no closure")
        skip, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for group in self.param_groups:
            if "momentum" in group:
                self._step_matrices(group, skip, scale)
        # It works on this optimizer's groups and state, which loading replaces.
        self.adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self.adamw.state, self.adamw.found_inf, self.adamw.grad_scale = self.state, skip, scale  # type: ignore[attr-defined]
        self.adamw.step()

    def _step_matrices(self, group: dict[str, Any], skip: Tensor | None, scale: Tensor | None) -> None:
        kept = 1.0 if skip is None else 1.0 - skip
        several = distributed.is_available() and distributed.is_initialized()
        processes, own = (distributed.get_world_size(), distributed.get_rank()) if several else (1, 0)
        moved = [p for p in group["params"] if p.grad is not None]
        moved.sort(key=lambda p: tuple(p.shape))  # so that a turn's cost alike
        for first in range(0, len(moved), processes):
            turn = moved[first : first + processes]
            steps = [self._direction(p, group["momentum"], kept, skip, scale) for p in turn]
            if len(turn) == 1:  # all processes do it, rather than wait
                steps = [orthogonal(steps[0])]
            elif own < len(turn):
                steps[own] = orthogonal(steps[own])
            for source, (p, step) in enumerate(zip(turn, steps)):
                if len(turn) > 1:
                    distributed.broadcast(step, source)
                rate = group["lr"] * RMS * max(step.shape) ** 0.5
                weight = local(p)
                weight.mul_(1 - group["lr"] * group["weight_decay"] * kept)
                weight.sub_(local(cut_like(step.view(p.shape), p)) * (rate * kept))

    def _direction(
        self, p: nn.Parameter, momentum: float, kept: float | Tensor, skip: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        """Nesterov's direction as the whole matrix, in the precision in which it is orthogonalised."""
        grad: Any = p.grad
        if scale is not None:
            local(grad).div_(scale)
        if skip is not None:
            local(grad).masked_fill_(skip > 0, 0.0)
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        mean = self.state[p]["momentum_buffer"]
        local(mean).lerp_(local(grad), (1 - momentum) * kept)
        direction = grad.lerp(mean, momentum)
        direction = getattr(direction, "full_tensor", lambda: direction)()  # the whole, where the model is sharded
        return direction.flatten(1).to(torch.bfloat16 if direction.is_cuda else torch.float32).contiguous()


def orthogonal(matrix: Tensor) -> Tensor:
    """UV' of a matrix (m, n) = U S V', nearly: a singular value of 0.003 of the norm or more gets to 0.68 to 1.21.

    Five times X <- a X + b (XX')X + c (XX')^2 X, from X of norm 1, on the side that makes XX' small.
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).contiguous()


def local(tensor: Any) -> Tensor:
    """This process's rows of a sharded tensor; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
