"""`AlignedDenoiser`: a denoiser and its alignments as one module, so that DDP and FSDP see the heads' parameters.

The hidden state is read through a forward hook on a submodule named by its path (the *tap*), so that a denoiser needs
no change to be aligned. Encoders are frozen and stay outside: they are neither saved nor wrapped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dic_repa.alignment.heads import heads
from dic_repa.alignment.losses import alignment_losses, targets
from dic_repa.alignment.schedules import schedules, time_weights
from dic_repa.errors import UserError, unknown_name
from dic_repa.models.cost import forward_on_meta
from dic_repa.models.layers import Modules
from dic_repa.models.pretrained import Pretrained

Spec = str | Mapping[str, Any] | Callable  # a registered name, a mapping of `name` and arguments, or the thing itself


class Alignment(nn.Module):
    """One tap aligned to one encoder: the head, and the loss
    `weight * schedule(step) * mean(time_weight(t) * loss(projection, target))`.

    Args:
        tap: name of a submodule of the denoiser whose output is a feature map (B, C, h, w), such as 'mid.3', or tokens
            that the denoiser's `feature_map(tokens, size)` lays out as one, such as 'blocks.7' of a SiT.
        head: module of (feature, t in [0, 1]) that gives tokens (B, N, embed_dim).
        weight: lambda of the paper.
        manifold_weight: w of the paper, of the loss 'u-repa' where its own options do not say it.
        loss: what projection and target are compared by: 'u-repa'.
        target: what is done to the encoder's tokens first: 'tokens' (nothing) or 'spatial-norm'.
        time_weight: the weight over t: 'constant' or 'v-shape'.
        schedule: the weight over steps: 'constant', 'cosine', 'stop' or 'stop-at-similarity'.
    """

    def __init__(
        self,
        tap: str,
        head: nn.Module,
        weight: float = 0.5,
        manifold_weight: float = 3.0,
        target: Spec = "tokens",
        time_weight: Spec = "constant",
        schedule: Spec = "constant",
        loss: Spec = "u-repa",
    ):
        super().__init__()
        self.tap, self.head, self.weight = tap, head, weight
        named = {"name": loss} if isinstance(loss, str) else loss
        if isinstance(named, Mapping) and named.get("name") == "u-repa":
            named = {"manifold_weight": manifold_weight, **named}
        self.compare = alignment_losses.create(named)
        self.target = targets.create(target)
        self.time_weight = time_weights.create(time_weight)
        self.schedule = schedules.create(schedule)

    @classmethod
    def build(
        cls,
        denoiser: Pretrained,
        tap: str,
        embed_dim: int,
        grid: tuple[int, int],
        size: tuple[int, int],
        head: str = "mlp",
        **options,
    ) -> Alignment:
        """The alignment of `denoiser` at `tap` to an encoder of width `embed_dim` and token `grid`.

        The `options` are those of `Alignment`, such as its `weight`; all others are the head's. The denoiser runs once
        on the meta device, with data of `size` (H, W), to find the tap's channels. A UserError lists the near names of
        an unknown tap or head, and says what a tap gives if it is not a feature map.
        """
        own = {key: options.pop(key) for key in options.keys() & inspect.signature(cls).parameters.keys()}
        channels = tap_channels(denoiser, tap, size)
        return cls(tap, heads.create(head, channels, embed_dim, tuple(grid), **options), **own)

    def loss(
        self, projection: Tensor, tokens: Tensor | None, t: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of projection (B, N, D) against an encoder's tokens (B, N, D) at times t (B,) in [0, 1], a
        float32 scalar, and the means of its terms, detached, for the log; `scale` is the schedule's factor.

        Without tokens, as at a scale of 0, the loss is a zero that reaches the head: processes exchange its gradients.
        """
        if tokens is None:
            return projection.float().sum() * 0.0, {}
        per_image, terms = self.compare(projection, self.target(tokens))
        loss = self.weight * scale * (self.time_weight(t) * per_image).mean()
        return loss, {name: term.detach().mean() for name, term in terms.items()}

    def observe(self, terms: dict[str, Tensor], reduce: Callable[[Tensor, str], Tensor]) -> None:
        """Tell a schedule that asks for it the similarity of one pass; `reduce(tensor, "mean")` is over processes."""
        if "token" in terms and hasattr(self.schedule, "observe"):
            self.schedule.observe(reduce(-terms["token"], "mean"))


@dataclass
class AlignedOutput:
    """`prediction` of the denoiser, and one projection (B, N, D) per alignment."""

    prediction: Tensor
    projections: list[Tensor]


class AlignedDenoiser(nn.Module):
    """`aligned(x, t, y)` runs the denoiser once and each alignment's head on what its tap gave.

    The denoiser is any module with `forward(x, t, y)`. Heads get `unit_time`, the time in [0, 1], if that is not t
    (DDPM counts steps).
    """

    def __init__(self, denoiser: nn.Module, alignments: list[Alignment] | tuple[Alignment, ...] = ()):
        super().__init__()
        self.denoiser = denoiser
        self.alignments = Modules(alignments)
        self._tapped: dict[str, Tensor] = {}
        for tap in {alignment.tap for alignment in alignments}:

            def keep(_module, _inputs, output, tap=tap):
                self._tapped[tap] = output

            find_tap(denoiser, tap).register_forward_hook(keep)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, unit_time: Tensor | None = None) -> AlignedOutput:
        prediction = self.denoiser(x, t, y)
        time = t if unit_time is None else unit_time
        size = (x.shape[-2], x.shape[-1])
        projections = [
            alignment.head(feature_map(self.denoiser, self._tapped[alignment.tap], size), time)
            for alignment in self.alignments
        ]
        self._tapped.clear()  # the feature maps would live on until the next step
        return AlignedOutput(prediction, projections)


def find_tap(denoiser: nn.Module, tap: str) -> nn.Module:
    """The submodule of that name; a UserError with the near names if there is none."""
    modules = dict(denoiser.named_modules())
    if not tap or tap not in modules:
        raise unknown_name("tap", tap, [name for name in modules if name])
    return modules[tap]


def feature_map(denoiser: nn.Module, hidden: Tensor, size: tuple[int, int]) -> Tensor:
    """A tap's output as a feature map (B, C, h, w), for data of `size` (H, W); of tokens by the denoiser's own
    `feature_map`."""
    lay_out = getattr(denoiser, "feature_map", None)
    return hidden if lay_out is None or getattr(hidden, "ndim", 0) != 3 else lay_out(hidden, size)


def tap_channels(denoiser: Pretrained, tap: str, size: tuple[int, int]) -> int:
    """Channels of the feature map at `tap`, found by a run on the meta device with data of `size` (H, W)."""
    shapes = []

    def note(_module, _inputs, output):
        shapes.append(tuple(getattr(feature_map(denoiser, output, size), "shape", ())))

    handle = find_tap(denoiser, tap).register_forward_hook(note)
    try:
        forward_on_meta(denoiser, *size)
    finally:
        handle.remove()
    if len(shapes) != 1 or len(shapes[0]) != 4:
        given = f"a tensor of shape {shapes[0]}" if shapes else "nothing"
        raise UserError(
            f"tap '{tap}' gives {given}, but a tap must give one feature map (B, C, h, w) per run, or tokens if the "
            "denoiser has a feature_map(tokens, size)"
        )
    return shapes[0][1]
