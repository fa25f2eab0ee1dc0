"""The frozen encoders of an `Aligner`, in the order of its alignments; alignments of one encoder share its pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dic_repa.alignment.cache import WithTokens, feature_cache
from dic_repa.encoders import Encoder, check_tokens, create_encoder
from dic_repa.files.pictures import unit_images
from dic_repa.protocols import Samples


@dataclass
class Teacher:
    """A frozen encoder, and what it was built by."""

    name: str
    options: dict[str, Any]
    encoder: Encoder

    @property
    def device(self) -> torch.device:
        own = next(self.encoder.parameters(), None) if isinstance(self.encoder, nn.Module) else None
        return torch.device("cpu") if own is None else own.device

    def __call__(self, images: Tensor) -> Tensor:
        """The tokens (B, N, D) of images (B, C, H, W) in [0, 1], on whose device the encoder then is."""
        if isinstance(self.encoder, nn.Module) and self.device != images.device:
            self.encoder.to(images.device)
        return self.encoder(images)


class Teachers:
    """One `Teacher` for each alignment."""

    def __init__(self, image_size: tuple[int, int]):
        self.image_size = image_size
        self.all: list[Teacher | None] = []

    def add(self, encoder: str | Encoder | None, options: Mapping[str, Any]) -> Encoder | None:
        """The next alignment's encoder, frozen: an earlier one's, if that has the same name and options; or none."""
        if encoder is None:
            self.all.append(None)
            return None
        name, options = encoder if isinstance(encoder, str) else type(encoder).__name__, dict(options)
        for teacher in filter(None, self.all):
            same = isinstance(encoder, str) and (teacher.name, teacher.options) == (name, options)
            if same or teacher.encoder is encoder:
                self.all.append(teacher)
                return teacher.encoder
        made: Any = create_encoder(name, **options) if isinstance(encoder, str) else encoder
        if isinstance(made, nn.Module):
            made.eval().requires_grad_(False)
        new = Teacher(name, options, made)
        self.all.append(new)
        check_tokens(name, made, torch.zeros(1, 3, *self.image_size, device=new.device))
        return made

    @torch.no_grad()
    def encode(self, images: Tensor, scales: Sequence[float] | None = None) -> list[Tensor | None]:
        """Each alignment's target tokens (B, N, D) of images in [0, 1] or uint8; None at a scale of 0, or if it has no
        encoder."""
        images, wanted = unit_images(images), scales or [1.0] * len(self.all)
        used = {id(teacher): teacher for teacher, scale in zip(self.all, wanted) if teacher and scale}
        known = {key: teacher(images) for key, teacher in used.items()}
        return [known.get(id(teacher)) if scale else None for teacher, scale in zip(self.all, wanted)]

    def cached(self, data: Samples, workers: int = 0) -> WithTokens:
        """`data` with each alignment's tokens from the feature cache, as `tokens.N`."""
        return WithTokens(
            data,
            {
                f"tokens.{i}": feature_cache(each.name, each.options, each.encoder, data, each.device, workers)
                for i, each in enumerate(self.all)
                if each
            },
        )
