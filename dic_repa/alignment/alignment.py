"""`Alignment`: one tap of a model aligned to one encoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dic_repa.alignment.heads import heads
from dic_repa.alignment.losses import alignment_losses, targets
from dic_repa.alignment.schedules import schedules, time_weights
from dic_repa.alignment.taps import tap_channels
from dic_repa.models.pretrained import Pretrained
from dic_repa.runtime.processes import mean_over_processes

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

    def project(self, feature: Tensor, t: Tensor) -> Tensor:
        """The head's tokens (B, N, embed_dim) of a feature map (B, C, h, w) at times t (B,) in [0, 1]."""
        for parameter in self.head.parameters():  # the model may compute in half precision by itself
            if feature.dtype != parameter.dtype and not torch.is_autocast_enabled(feature.device.type):
                feature = feature.to(parameter.dtype)
            break
        return self.head(feature, t)

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

    def observe(self, terms: dict[str, Tensor]) -> None:
        """Tell a schedule that asks for it the similarity of one pass, the mean over all processes."""
        if "token" in terms and hasattr(self.schedule, "observe"):
            self.schedule.observe(mean_over_processes(-terms["token"]))
