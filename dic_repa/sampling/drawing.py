"""Sampling with a loaded model, and what its other methods share: settings, labels, and images with a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dic_repa.conditions import Condition
from dic_repa.errors import UserError, unknown_name
from dic_repa.files.pictures import to_pil
from dic_repa.runtime.progress import progress_bar
from dic_repa.samplers import solver_info
from dic_repa.sampling import override_sampling
from dic_repa.sampling.given import chosen_classes
from dic_repa.sampling.labels import draw_labels

if TYPE_CHECKING:
    from dic_repa.data.saved import SavedData
    from dic_repa.models.pretrained import Pretrained
    from dic_repa.recipe import Recipe, SampleSection
    from dic_repa.sampling.sampler import Sampler, Solve

OUTPUTS = ("pil", "pt")
Classes = str | int | Sequence[str | int | None] | None


class Drawing:
    """The base of `Checkpoint`."""

    denoiser: Pretrained
    recipe: Recipe
    data: SavedData | None

    if TYPE_CHECKING:  # what `Checkpoint` has

        @property
        def condition(self) -> Condition: ...

        def sampler(self, settings: SampleSection) -> Sampler: ...

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    def sample(
        self,
        classes: Sequence[str | int | None] | None = None,
        conditions: Tensor | np.ndarray | None = None,
        num: int | None = None,
        guidance: float | dict[str, Any] | None = None,
        output: str = "pil",
        noise: Tensor | None = None,
        **settings: Any,
    ) -> list[Image.Image] | Tensor:
        """Images as PIL has them, by the recipe's `sample` section with the keys that are given.

        Args:
            classes: the class of each image, by its name or number, None for none; by default all classes in turn.
            conditions: (N, ...), the vector or the tokens of each image, for a model that is conditioned on them.
            num: how many images, where neither is given; 10 by default.
            guidance: the scale, 1 for none; or keys of the section `sample.guidance`: `scale`, `interval`, ...
            output: 'pil', or 'pt' for one tensor (N, C, H, W) in [0, 1] on the CPU.
            noise: (N, C, h, w), such as `invert` gives, where to start instead of the noise of the seed.
            settings: further keys of the section `sample`: `solver`, `steps`, `seed`, `batch_size`, ...

        Raises:
            UserError: there is no such class or key, or the settings do not fit together.
        """
        check_output(output)
        condition = self.condition
        if conditions is not None:
            condition, classes = condition.with_examples(conditions), range(len(conditions))
        given = [len(rows) for rows in (classes, noise) if rows is not None]
        if len(set(given)) > 1:
            raise UserError(f"{given[0]} classes or conditions for {given[1]} rows of noise: give as many")
        num = given[0] if given else 10 if num is None else num
        chosen = override_sampling(self.recipe.sample, guidance_keys(guidance), num=num, **settings)
        if classes is None:
            labels = draw_labels(self.recipe, condition, chosen)
        else:
            labels = torch.tensor([self.label(name) for name in classes])
        return self._draw(chosen, labels, condition, output, noise)

    def label(self, name: str | int | None) -> int:
        """The label of a class, by its name or number; of none, the null."""
        return self.condition.label(name)

    def _settings(
        self, processes: tuple[str, ...], guidance: float | dict[str, Any] | None, given: dict[str, Any]
    ) -> SampleSection:
        """The recipe's `sample` section with what is `given`, and a solver of one of the `processes`."""
        own = solver_info(self.recipe.sample.solver).process
        if given.get("solver") is None and own not in processes:
            given = {**given, "solver": "heun"}
        chosen = override_sampling(self.recipe.sample, guidance_keys(guidance), **given)
        if (process := solver_info(chosen.solver).process) not in processes:
            kinds = " or ".join(f"an {name.upper()}" for name in processes)
            raise UserError(
                f"'{chosen.solver}' is a solver of {process.upper()}; this needs one of {kinds}, such as heun"
            )
        return chosen

    def _labels(self, count: int, classes: Classes, conditions: Tensor | np.ndarray | None) -> tuple[Tensor, Condition]:
        condition = self.condition
        if conditions is not None:
            condition = condition.with_examples(conditions)
            if len(conditions) != count:
                raise UserError(f"{len(conditions)} conditions for {count} images: give one for each")
            return torch.arange(count), condition
        names = chosen_classes(classes, count)
        if None in names and condition.kind != "none" and self.recipe.train.label_dropout == 0:
            raise UserError(
                f"the model was trained without label dropout, so it has no null class: give {condition.choices}"
            )
        return torch.tensor([self.label(name) for name in names]), condition

    def _draw(
        self, settings: SampleSection, labels: Tensor, condition: Condition, output: str, noise: Tensor | None = None,
        solve: Solve | None = None,
    ) -> list[Image.Image] | Tensor:  # fmt: skip
        """Images for the labels by `settings`, with a progress bar if that takes long."""
        sampler = replace(self.sampler(settings), condition=condition, noise=noise)
        batches = []
        with progress_bar(total=len(labels), desc="sampling", unit="image", delay=2, leave=False) as bar:
            for images in sampler(labels, solve=solve):
                batches.append(images)
                bar.update(len(images))
        return as_output(batches, output)


def guidance_keys(guidance: float | dict[str, Any] | None) -> dict[str, Any] | None:
    """A scale alone as keys of the section `sample.guidance`."""
    return {"scale": guidance} if isinstance(guidance, int | float) else guidance


def check_output(output: str) -> None:
    """A UserError if images cannot be given out so."""
    if output not in OUTPUTS:
        raise unknown_name("output", output, OUTPUTS)


def as_output(batches: Sequence[Tensor], output: str) -> list[Image.Image] | Tensor:
    """Batches of images (B, C, H, W) in [0, 1] as PIL images, or as one tensor."""
    if output == "pt":
        return torch.cat(list(batches))
    return [to_pil(image) for batch in batches for image in batch]
