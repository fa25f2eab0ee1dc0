"""`Aligner`: alignment in any training loop, of any module, without a change to it.

aligner = Aligner(unet, [{"encoder": "dinov2-vit-b", "tap": "mid_block"}], image_size=256, example=(x, t))
optimizer = torch.optim.AdamW([*unet.parameters(), *aligner.parameters()], 1e-4)
prediction = unet(noisy, t).sample                     # your own line, unchanged
loss = mse(prediction, target) + aligner(images, t)    # reads what the taps kept
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from dic_repa.alignment.alignment import Alignment, Projected, check_teacher
from dic_repa.alignment.cache import WithTokens
from dic_repa.alignment.frozen_encoders import Teachers
from dic_repa.alignment.heads import heads
from dic_repa.alignment.schedules import Constant
from dic_repa.alignment.self_teachers import teachers
from dic_repa.alignment.taps import Example, Taps, call, quiet_run, suggest_taps
from dic_repa.errors import UserError, unknown_name
from dic_repa.models.layers import Modules
from dic_repa.protocols import Samples

OWN_KEYS = ("encoder", "encoder_options", "tap", "head", "head_options", "select")  # the others are an Alignment's


class Aligner(nn.Module):
    """REPA, U-REPA, iREPA and their like for any model: `aligner(images, t)` after each of the model's forward passes
    is the loss to add. Its parameters are the heads, for the optimizer; its `state_dict` holds them alone.

    It works under DDP and FSDP2 (wrap model and aligner, each by itself), gradient accumulation, gradient checkpointing
    and autocast. Its losses are in float32 whatever comes in.

    Args:
        model: any module, which is not changed but for forward hooks; also wrapped in DDP, or compiled if it has not
            run yet.
        alignments: what is aligned to what, a mapping each, with these keys:
            `encoder`, a name of `dic-repa encoders`, with `encoder_options`, or an encoder (`protocols.Encoder`);
            in its place `teacher`, such as {'name': 'layer-sync', 'tap': 'up_blocks.0'}, or neither for a loss that
            compares with nothing, such as 'dispersive' (with `head`: 'identity');
            `tap`, the submodule whose output is aligned, by default the first of `suggest_taps`;
            `head` ('mlp') with `head_options`, and `weight` (0.5), `manifold_weight` (3), `loss`, `target`,
            `time_weight` and `schedule` as in a recipe (see `Alignment`);
            `select`, a function of what the tap gives, to a feature map (B, C, h, w) or tokens (B, h * w, C), where
            the first map of a tuple or dataclass is not the right one.
            Or ready `Alignment`s: then tokens are given at each call.
        image_size: pixels of a side, or (H, W), of the images that the encoders will see.
        example: what the model is called with, a tuple or a mapping of keyword arguments; it runs once, without
            gradients and in eval mode, to size the heads.
        seed: of the heads' initial weights. torch's global random state stays as it is, so that a run with an aligner
            draws the same numbers as one without.

    Raises:
        UserError: unknown names or keys, or a tap that gives no feature map.
    """

    def __init__(
        self,
        model: nn.Module,
        alignments: Sequence[Mapping[str, Any] | Alignment],
        image_size: int | tuple[int, int] | None = None,
        example: Example | None = None,
        seed: int = 0,
    ):
        super().__init__()
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        self._teachers: Teachers | None = None  # no submodule: frozen, not saved, not wrapped
        self._select: list[Callable[[Any], Any] | None] = [None] * len(alignments)
        built = [each for each in alignments if isinstance(each, Alignment)]
        if len(built) < len(alignments):
            on_gpu = {each.device for each in model.parameters() if each.is_cuda}
            with torch.random.fork_rng(devices=on_gpu):  # the model may draw random numbers in its run
                torch.default_generator.manual_seed(seed)  # that of the CPU alone, where heads are made
                built = self._build(model, alignments, image_size, example)
        self.alignments = Modules(built)
        self._taps = Taps(model, {name for alignment in built for name in (alignment.tap, alignment.same_pass) if name})
        self._scales: tuple[int | None, list[float]] = (None, [])
        self._checked = False
        self._terms: dict[str, Tensor] = {}

    def _build(self, model: nn.Module, alignments: Sequence[Any], image_size: Any, example: Any) -> list[Alignment]:
        if example is None or image_size is None or not all(isinstance(each, Mapping) for each in alignments):
            raise UserError(
                "Aligner takes a list of mappings such as {'encoder': 'dinov2-vit-b', 'tap': 'mid_block'}, with "
                "image_size, the pixels of the images' side, and example, what the model is called with: (x, t)"
            )
        self._teachers = Teachers((image_size, image_size) if isinstance(image_size, int) else tuple(image_size))
        specs = [check_spec(each) for each in alignments]
        if not all(spec.get("tap") for spec in specs):
            best = suggest_taps(model, example)[0]
            specs = [spec | {"tap": spec.get("tap") or best} for spec in specs]
        self._select = [spec.get("select") for spec in specs]
        names = [spec["tap"] for spec in specs]
        taught = [teachers.create(spec["teacher"]).tap if spec.get("teacher") else None for spec in specs]
        taps = Taps(model, {*names, *filter(None, taught)})
        try:
            with quiet_run(model):
                call(model, example)
            outputs = taps.take()
            features = self._features(taps, names, outputs)
            maps = [taps.feature_map(outputs[name], name) if name else None for name in taught]
        finally:
            taps.remove()
        return [build_alignment(*each, self._teachers) for each in zip(specs, features, maps)]

    def forward(
        self,
        images: Tensor | None,
        t: Tensor,
        step: int | None = None,
        tokens: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The weighted sum of all alignments' losses for the model's last forward pass, a scalar in float32.

        Args:
            images: (B, 1 or 3, H, W), the clean images of that pass in [0, 1], or uint8; None if the tokens are given.
            t: (B,), the pass's times in [0, 1], 0 for data and 1 for noise; of DDPM's steps, the step divided by their
                number.
            step: the optimizer's step, from 0 on, where an alignment has a schedule.
            tokens: (B, N, D) for each alignment in place of an encoder's pass, such as those of `cached`.

        Raises:
            UserError: the model did not run before, or a tap did not run once in it; images of another number or size
                than they should be; images or times that are out of range at the first call.
        """
        outputs = self._taps.take()
        features = self._features(self._taps, [alignment.tap for alignment in self.alignments], outputs)
        self._check(features, images, t)
        scales = self.scales(step)
        given = self._tokens(images, scales) if tokens is None else [tokens] if isinstance(tokens, Tensor) else tokens
        if len(given) != len(self.alignments):
            raise UserError(f"{len(given)} tensors of tokens were given for {len(self.alignments)} alignments")
        loss, self._terms = self.compare(self._project(features, outputs, t), given, t, scales)
        return loss

    def _tokens(self, images: Tensor | None, scales: Sequence[float]) -> Sequence[Tensor | None]:
        """The encoders' tokens of the images."""
        if any(alignment.by_averaged for alignment in self.alignments):
            raise UserError(
                "the averaged weights are yours to run: aligner(images, t, tokens=[averaged_tokens(ema, tap, ...)])"
            )
        if not any(alignment.takes_tokens for alignment in self.alignments):
            return [None] * len(self.alignments)
        if images is None:
            raise UserError("an aligner needs images, or the encoders' tokens of them: aligner(None, t, tokens=[...])")
        return self._encoders().encode(images, scales)

    def scales(self, step: int | None) -> list[float]:
        """The schedules' factors at a step, one for each alignment; asked once for all passes of a step."""
        for alignment in self.alignments if step is None else ():
            if not isinstance(alignment.schedule, Constant):
                raise UserError(f"the schedule of tap '{alignment.tap}' needs the step: aligner(images, t, step=...)")
        if step is None or self._scales[0] != step:
            self._scales = step, [alignment.schedule(step or 0) for alignment in self.alignments]
        return self._scales[1]

    def project(self, t: Tensor) -> list[Tensor | Projected]:
        """Each head's tokens (B, N, D) of the last forward pass, with the target of the same pass where there is
        one."""
        outputs = self._taps.take()
        features = self._features(self._taps, [alignment.tap for alignment in self.alignments], outputs)
        return self._project(features, outputs, t)

    def _project(self, features: Sequence[Tensor], outputs: Mapping[str, Any], t: Tensor) -> list[Tensor | Projected]:
        projected: list[Tensor | Projected] = []
        for alignment, feature in zip(self.alignments, features):
            if taught_by := alignment.same_pass:
                teacher = self._taps.feature_map(outputs[taught_by], taught_by)
                projected.append(alignment.project_with_target(feature, teacher, t))
            else:
                projected.append(alignment.project(feature, t))
        return projected

    def _features(self, taps: Taps, names: Sequence[str], outputs: Mapping[str, Any]) -> list[Tensor]:
        """Each alignment's feature map (B, C, h, w), of the taps' `outputs`; `names` are those of their taps."""
        return [
            taps.feature_map(select(outputs[name]) if select else outputs[name], name)
            for name, select in zip(names, self._select)
        ]

    def compare(
        self,
        projections: Sequence[Tensor | Projected],
        tokens: Sequence[Tensor | None],
        t: Tensor,
        scales: Sequence[float],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all losses, and their terms, detached, by their names in the log."""
        total, named = torch.zeros((), device=t.device), dict[str, Tensor]()
        for i, alignment in enumerate(self.alignments):
            loss, terms = alignment.loss(projections[i], tokens[i], t, scales[i])
            alignment.observe(terms)
            total = total + loss
            named |= {f"alignment.{i}.{name}": value for name, value in terms.items()}
        return total, named

    def encode(self, images: Tensor) -> list[Tensor | None]:
        """Each alignment's target tokens (B, N, D) of images (B, C, H, W) in [0, 1] or uint8, to be given later."""
        return self._encoders().encode(images)

    def cached(self, data: Samples, workers: int = 0) -> WithTokens:
        """`data`, whose samples have an `image` (C, H, W), with each alignment's tokens beside it, as `tokens.0` and so
        on, computed once into the feature cache: `aligner(None, t, tokens=[batch["tokens.0"]])`."""
        return self._encoders().cached(data, workers)

    def _encoders(self) -> Teachers:
        if self._teachers is None:
            raise UserError("an aligner of ready alignments has no encoders: give tokens=[...]")
        return self._teachers

    @property
    def logs(self) -> dict[str, float]:
        """The means of the last call's terms, for any tracker; reading them waits for the device."""
        return {name: value.item() for name, value in self._terms.items()}

    def remove(self) -> None:
        """Take the hooks off the model, which is then as it was; the aligner cannot be used again."""
        self._taps.remove()

    def _check(self, features: Sequence[Tensor], images: Tensor | None, t: Tensor) -> None:
        """Raise what a user can get wrong in a call; what waits for the device is looked at in the first one alone."""
        for tap, feature in zip((alignment.tap for alignment in self.alignments), features):
            for what, given in (("images", images), ("times", t)):
                if given is not None and len(given) != len(feature):
                    raise UserError(
                        f"{len(given)} {what} for {len(feature)} feature maps of tap '{tap}': give the aligner the "
                        "same batch as the model"
                    )
            trains = any(parameter.requires_grad for parameter in self._taps.modules[tap].parameters())
            if trains and torch.is_grad_enabled() and not feature.requires_grad:
                raise UserError(
                    f"tap '{tap}' has no gradient, so that nothing would be aligned: run the model with gradients, and "
                    "checkpoint with use_reentrant=False"
                )
        if images is not None and self._teachers and tuple(images.shape[-2:]) != self._teachers.image_size:
            raise UserError(
                f"the images are {images.shape[-2]}x{images.shape[-1]}, but the aligner was made with image_size "
                f"{self._teachers.image_size}"
            )
        for what, given, mend in (("images", images, "images / 2 + 0.5"), ("times", t, "t / 1000")):
            if given is not None and given.is_floating_point() and not self._checked:
                low, high = given.min(), given.max()
                if not -0.01 <= low <= high <= 1.01:
                    raise UserError(f"the {what} are in [{low:g}, {high:g}], but must be in [0, 1]; perhaps {mend}")
        self._checked = True


def check_spec(given: Mapping[str, Any]) -> dict[str, Any]:
    """An alignment as a mapping of its own; a UserError for a key that is not known, or none for the encoder."""
    known = OWN_KEYS + tuple(key for key in inspect.signature(Alignment).parameters if key != "head")
    if wrong := [key for key in given if key not in known]:
        raise unknown_name("key of an alignment", str(wrong[0]), known)
    return dict(given)


def build_alignment(spec: Mapping[str, Any], feature: Tensor, taught: Tensor | None, encoders: Teachers) -> Alignment:
    """The alignment that a mapping says, for a tap that gives `feature` (B, C, h, w) and a teacher that gives `taught`
    (B, D, h, w), if it has one; its encoder joins the others."""
    check_teacher(spec["tap"], spec.get("loss", "u-repa"), spec.get("teacher"), bool(spec.get("encoder")))
    encoder = encoders.add(spec.get("encoder"), spec.get("encoder_options", {}))
    _, width, *grid = (feature if taught is None else taught).shape
    if encoder:
        width, grid = encoder.embed_dim, [*encoder.token_grid(encoders.image_size)]
    head = heads.create(spec.get("head", "mlp"), feature.shape[1], width, tuple(grid), **spec.get("head_options", {}))
    given = {key: value for key, value in spec.items() if key not in OWN_KEYS}
    return Alignment(spec["tap"], head, **given).to(feature.device)
