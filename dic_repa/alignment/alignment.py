"""`Alignment`: one tap of a model aligned to one encoder, or to another tap; or a loss of the tap alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dic_repa.alignment.heads import IdentityHead, heads, to_tokens
from dic_repa.alignment.losses import alignment_losses, targets
from dic_repa.alignment.schedules import schedules, time_weights
from dic_repa.alignment.self_teachers import teachers
from dic_repa.alignment.taps import tap_shape
from dic_repa.errors import UserError
from dic_repa.models.pretrained import Pretrained
from dic_repa.runtime.processes import mean_over_processes

Spec = str | Mapping[str, Any] | Callable  # a registered name, a mapping of `name` and arguments, or the thing itself


class Projected(NamedTuple):
    """A projection, and its target from the same pass."""

    projection: Tensor  # (B, N, D)
    target: Tensor  # (B, N, D), without gradient


class Alignment(nn.Module):
    """One tap aligned to one teacher, such as an encoder: the head, and the loss
    `weight * schedule(step) * mean(time_weight(t) * loss(projection, target))`.

    Args:
        tap: name of a submodule of the denoiser whose output is a feature map (B, C, h, w), such as 'mid.3', or tokens
            that the denoiser's `feature_map(tokens, size)` lays out as one, such as 'blocks.7' of a SiT.
        head: module of (feature, t in [0, 1]) that gives tokens (B, N, embed_dim).
        weight: lambda of the paper.
        manifold_weight: w of the paper, of the loss 'u-repa' where its own options do not say it.
        loss: what projection and target are compared by: 'u-repa' or 'smooth-l1'; 'dispersive' compares the tap's
            features of a batch with each other, without a target.
        target: what is done to the encoder's tokens first: 'tokens' (nothing) or 'spatial-norm'.
        time_weight: the weight over t: 'constant' or 'v-shape'.
        schedule: the weight over steps: 'constant', 'cosine', 'stop' or 'stop-at-similarity'.
        teacher: what gives the targets in place of an encoder: 'layer-sync' or 'self-alignment', with their `tap`.
    """

    target_shape: tuple[int, int] | None = None  # (N, D) of its targets, where `build` has found it

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
        teacher: Spec | None = None,
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
        self.teacher = teachers.create(teacher) if teacher else None
        self.needs_target = getattr(self.compare, "needs_target", True)
        if not self.needs_target and not isinstance(head, IdentityHead):
            raise UserError(f"loss '{loss_name(loss)}' compares the tap's features themselves; set head: identity")
        if not self.needs_target and teacher:
            raise UserError(f"loss '{loss_name(loss)}' compares with no teacher; leave the teacher out")
        if self.same_pass == tap:
            raise UserError(f"the tap '{tap}' is its own teacher, so that there is nothing to learn; name a later tap")

    @property
    def same_pass(self) -> str | None:
        """The tap whose output in the same pass is the target; None if the target is another's."""
        return None if self.teacher is None or self.by_averaged else self.teacher.tap

    @property
    def by_averaged(self) -> bool:
        """Whether the averaged weights give its targets, in a pass of their own."""
        return hasattr(self.teacher, "earlier")

    @property
    def takes_tokens(self) -> bool:
        """Whether its loss compares with tokens that the model's pass does not give."""
        return self.needs_target and not self.same_pass

    @classmethod
    def build(
        cls,
        denoiser: Pretrained,
        tap: str,
        embed_dim: int | None,
        grid: tuple[int, int] | None,
        size: tuple[int, int],
        head: str = "mlp",
        **options,
    ) -> Alignment:
        """The alignment of `denoiser` at `tap` to an encoder of width `embed_dim` and token `grid`; without one (None),
        to the `teacher` among the options, or to nothing.

        The `options` are those of `Alignment`, such as its `weight`; all others are the head's. The denoiser runs once
        on the meta device, with data of `size` (H, W), to find the tap's channels. A UserError lists the near names of
        an unknown tap or head, and says what a tap gives if it is not a feature map.
        """
        own = {key: options.pop(key) for key in options.keys() & inspect.signature(cls).parameters.keys()}
        channels = tap_shape(denoiser, tap, size)[0]
        if embed_dim is None or grid is None:
            taught = teachers.create(own["teacher"]).tap if own.get("teacher") else tap
            embed_dim, rows, columns = tap_shape(denoiser, taught, size)
            grid = rows, columns
        built = cls(tap, heads.create(head, channels, embed_dim, tuple(grid), **options), **own)
        built.target_shape = grid[0] * grid[1], embed_dim
        return built

    def project(self, feature: Tensor, t: Tensor) -> Tensor:
        """The head's tokens (B, N, embed_dim) of a feature map (B, C, h, w) at times t (B,) in [0, 1]."""
        for parameter in self.head.parameters():  # the model may compute in half precision by itself
            if feature.dtype != parameter.dtype and not torch.is_autocast_enabled(feature.device.type):
                feature = feature.to(parameter.dtype)
            break
        return self.head(feature, t)

    def project_with_target(self, feature: Tensor, teacher: Tensor, t: Tensor) -> Projected:
        """The head's tokens, and those of the feature map (B, D, h, w) of the teacher in the same pass."""
        return Projected(self.project(feature, t), to_tokens(teacher.detach()))

    def loss(
        self, projection: Tensor | Projected, tokens: Tensor | None, t: Tensor, scale: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of projection (B, N, D) against a teacher's tokens (B, N, D) at times t (B,) in [0, 1], a
        float32 scalar, and the means of its terms, detached, for the log; `scale` is the schedule's factor.

        At a scale of 0, or where the tokens that it needs are None, the loss is a zero that reaches the head: processes
        exchange its gradients.
        """
        if isinstance(projection, Projected):
            projection, own = projection
            tokens = own if scale else None
        if tokens is None and (self.needs_target or not scale):
            return projection.float().sum() * 0.0, {}
        per_image, terms = self.compare(projection, None if tokens is None else self.target(tokens))
        loss = self.weight * scale * (self.time_weight(t) * per_image).mean()
        return loss, {name: term.detach().mean() for name, term in terms.items()}

    def observe(self, terms: dict[str, Tensor]) -> None:
        """Tell a schedule that asks for it the similarity of one pass, the mean over all processes."""
        if "token" in terms and hasattr(self.schedule, "observe"):
            self.schedule.observe(mean_over_processes(-terms["token"]))


def loss_name(loss: Spec) -> str:
    """What a loss is called in a message."""
    named = loss.get("name") if isinstance(loss, Mapping) else loss
    return named if isinstance(named, str) else type(named).__name__


def check_teacher(tap: str, loss: Spec, teacher: Spec | None, has_encoder: bool) -> None:
    """A UserError unless the alignment of `tap` has the one teacher that its loss needs."""
    needs_target = getattr(alignment_losses.create(loss), "needs_target", True)
    if has_encoder and (teacher or not needs_target):
        what = "its own teacher" if teacher else "a loss that compares with no teacher"
        raise UserError(f"the alignment of tap '{tap}' has an encoder and {what}; leave the encoder out")
    if needs_target and not teacher and not has_encoder:
        raise UserError(
            f"the alignment of tap '{tap}' needs an encoder: a name of `dic-repa encoders`, or an encoder; or a "
            "teacher, such as {name: layer-sync, tap: mid.0}"
        )
