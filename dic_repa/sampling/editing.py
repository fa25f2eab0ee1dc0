"""What a loaded model does with images that are given: encode, invert, interpolate, judge, edit and fill in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dic_repa.conditions import Condition
from dic_repa.errors import UserError
from dic_repa.recipe.build import build_autoencoder, build_objective
from dic_repa.samplers import initial_noise, log_likelihood, sample
from dic_repa.samplers.editing import inpaint, noised, slerp
from dic_repa.samplers.likelihood import Likelihood
from dic_repa.sampling.drawing import Classes, Drawing, as_output, check_output
from dic_repa.sampling.given import Given, is_list, read_images, read_mask

if TYPE_CHECKING:
    from dic_repa.protocols import Autoencoder
    from dic_repa.recipe import SampleSection

Images = Given | Iterable[Given]


class Editing(Drawing):
    """The methods of `dic_repa.load(...)` that take images.

    Common arguments:

        images       PIL images, paths of image files, or a tensor (N, C, H, W), uint8 or float in [0, 1]; of the
                     model's size
        classes      one name or number for all images, or one for each; None for none (the null class)
        conditions   (N, ...), the vectors or tokens of a model that is conditioned on them, in place of classes
        guidance     as in `sample`
        settings     further keys of a recipe's `sample` section, such as solver, steps and seed. Where the recipe's
                     solver does not do for a method, it is heun
    """

    def encode(self, images: Images) -> Tensor:
        """The denoiser's data (N, C, h, w) of images: pixels in [-1, 1], or the mean of the autoencoder's latents.

        Raises:
            UserError: there is no image, or one is of another size or other channels than the model's.
        """
        return self._encode(images)[0]

    def decode(self, x: Tensor, output: str = "pil") -> list[Image.Image] | Tensor:
        """The images of the denoiser's data (N, C, h, w), as `sample` gives them."""
        check_output(output)
        sampler = self.sampler(self._settings(("ode",), None, {}))
        return as_output([sampler.to_images(x.to(self.device)).cpu()], output)

    def invert(
        self,
        images: Images,
        classes: Classes = None,
        guidance: float | dict[str, Any] | None = None,
        conditions: Tensor | np.ndarray | None = None,
        **settings: Any,
    ) -> Tensor:
        """The noise (N, C, h, w) from which `sample(noise=...)` makes the images: the ODE, from data to noise.

        As exact as the solver and its steps; with dopri5 to its tolerances.

        Raises:
            UserError: as `encode`; the solver cannot go backward, or the model needs classes.
        """
        x = self.encode(images)
        labels, condition = self._labels(len(x), classes, conditions)
        return self._invert(x, labels, condition, self._settings(("ode",), guidance, settings))

    def interpolate(
        self,
        a: Given | int,
        b: Given | int,
        steps: int = 8,
        classes: Classes = None,
        guidance: float | dict[str, Any] | None = None,
        conditions: Tensor | np.ndarray | None = None,
        output: str = "pil",
        solver_steps: int | None = None,
        **settings: Any,
    ) -> list[Image.Image] | Tensor:
        """`steps` images from `a` to `b`, along the arc between their noises, all of one class.

        Args:
            a: an image, which is inverted; or a seed, for the first image that `sample` makes of it.
            b: the other end, likewise.
            steps: how many images, both ends included.
            classes: one for all, or one for each of the `steps`; the images a and b are inverted with the first and
                the last.
            solver_steps: those of the solver.

        Raises:
            UserError: as `invert`; fewer than two images are asked for.
        """
        check_output(output)
        if steps < 2:
            raise UserError(f"steps={steps}: the images from a to b are at least two")
        labels, condition = self._labels(steps, classes, conditions)
        chosen = self._settings(("ode",), guidance, settings | ({"steps": solver_steps} if solver_steps else {}))
        begin, end = (self._noise_of(image, labels[[k]], condition, chosen) for image, k in ((a, 0), (b, -1)))
        noise = slerp(begin, end, torch.linspace(0, 1, steps).tolist())
        return self._draw(chosen, labels, condition, output, noise)

    def log_likelihood(
        self,
        images: Images,
        classes: Classes = None,
        conditions: Tensor | np.ndarray | None = None,
        seed: int = 0,
        batch_size: int = 64,
        **options: Any,
    ) -> Likelihood:
        """The likelihood of images under the model's ODE: `bits_per_dim` (N,), `log_prob` (N,) in nats, and the noise.

        The bits are those of 8-bit pixels, with uniform noise of one level added; behind an autoencoder they are of the
        density of its latents, which compares with that of the same autoencoder only.

        Args:
            seed: of that noise, and of the estimate of the divergence.
            options: of `dic_repa.samplers.log_likelihood`: solver, steps, rtol, atol, probes, divergence.

        Raises:
            UserError: as `encode`, and as `dic_repa.samplers.log_likelihood`.
        """
        x, autoencoder = self._encode(images)
        labels, condition = self._labels(len(x), classes, conditions)
        rows, bin_width = condition.rows(labels).to(self.device), 1.0
        if autoencoder.spec.name == "none":
            bin_width = 2 / 255  # of the levels in [-1, 1]
            spread = [np.random.Generator(np.random.Philox(key=[k, seed])).random(x.shape[1:]) for k in range(len(x))]
            x = x + (torch.from_numpy(np.stack(spread)).to(x) - 0.5) * bin_width
        velocity = build_objective(self.recipe.objective).velocity_model(self.denoiser)
        found = []
        for part in range(0, len(x), batch_size):
            places = range(part, min(part + batch_size, len(x)))
            field = OfRows(velocity, rows[part : part + batch_size])
            given = {"seed": seed, "indices": places, "bin_width": bin_width, **options}
            found.append(log_likelihood(field, x[part : part + batch_size], **given))
        names = ("log_prob", "bits_per_dim", "noise")
        return Likelihood(
            **{name: torch.cat([getattr(each, name) for each in found]) for name in names}, nfe=found[0].nfe
        )

    def edit(
        self,
        images: Images,
        strength: float = 0.6,
        classes: Classes = None,
        guidance: float | dict[str, Any] | None = None,
        conditions: Tensor | np.ndarray | None = None,
        output: str = "pil",
        **settings: Any,
    ) -> list[Image.Image] | Tensor:
        """Other images of the same layout: noise is added up to the time `strength`, then the model takes it away
        (SDEdit, Meng et al. 2022).

        Args:
            strength: above 0, where all stays as it is, to 1, where nothing of the image is left.
            classes: what the images become; of one image, several.
            settings: `steps` are those from the time `strength` to the data.

        Raises:
            UserError: as `encode`; the solver cannot start there, or the model needs classes.
        """
        check_output(output)
        if not 0 < strength <= 1:
            raise UserError(f"strength={strength}: give a number above 0 and at most 1")
        x = _one_for_each(self.encode(images), classes)
        labels, condition = self._labels(len(x), classes, conditions)
        path = build_objective(self.recipe.objective).path

        def solve(rows: list[int], velocity: Any, noise: Tensor, solver: str, **options: Any) -> Any:
            return sample(velocity, noised(x[rows], noise, strength, path), solver, start=strength, **options)

        return self._draw(self._settings(("ode", "sde"), guidance, settings), labels, condition, output, solve=solve)

    def inpaint(
        self,
        images: Images,
        mask: Image.Image | Tensor | str,
        classes: Classes = None,
        guidance: float | dict[str, Any] | None = None,
        conditions: Tensor | np.ndarray | None = None,
        output: str = "pil",
        resample: int = 10,
        **settings: Any,
    ) -> list[Image.Image] | Tensor:
        """The images with what the mask marks painted anew, to fit to the rest: RePaint (Lugmayr et al. 2022).

        At each step the known part is replaced by the image with as much noise; each step is taken `resample` times,
        with noise added in between, so that new and known part agree (1: once, without that).

        Args:
            mask: what is painted anew is white, true or 1: a PIL image, or a tensor (H, W) or (N, 1, H, W), of the
                images' size. Behind an autoencoder a latent is new where one of its pixels is; the known part is then
                what the autoencoder makes of it.

        Raises:
            UserError: as `encode`; the mask is of another size or white nowhere, or the solver has no fixed steps.
        """
        check_output(output)
        x, autoencoder = self._encode(images)
        x = _one_for_each(x, classes)
        pixels = autoencoder.spec.downsample
        chosen = read_mask(mask, len(x), (x.shape[-2] * pixels, x.shape[-1] * pixels))
        new = torch.nn.functional.max_pool2d(chosen.float(), pixels).bool().to(self.device)
        labels, condition = self._labels(len(x), classes, conditions)
        by = self._settings(("ode",), guidance, settings)

        def solve(rows: list[int], velocity: Any, noise: Tensor, solver: str, **options: Any) -> Any:
            options |= {"resample": resample, "seed": by.seed, "indices": rows}
            given = {name: value for name, value in options.items() if value is not None}  # those of an SDE are None
            return inpaint(velocity, x[rows], new[rows], noise, solver, **given)

        return self._draw(by, labels, condition, output, solve=solve)

    def _encode(self, images: Images) -> tuple[Tensor, Autoencoder]:
        autoencoder = build_autoencoder(self.recipe.data, self.device, self.data, self.recipe.sample.autoencoder)
        size = self.recipe.data.size * autoencoder.spec.downsample
        channels = self.denoiser.in_channels if autoencoder.spec.name == "none" else 3
        found = read_images(images, channels, (size, size)).to(self.device)
        parts = [autoencoder.encode(part).float() for part in found.split(self.recipe.sample.decode_batch)]
        return autoencoder.spec.normalise(autoencoder.spec.mean(torch.cat(parts))), autoencoder

    def _invert(self, x: Tensor, labels: Tensor, condition: Condition, settings: SampleSection) -> Tensor:
        def solve(rows: list[int], velocity: Any, _noise: Tensor, solver: str, **options: Any) -> Any:
            return sample(velocity, x[rows], solver, direction="backward", **options)

        sampler = replace(self.sampler(settings), condition=condition)
        return torch.cat(list(sampler.solved(labels, solve=solve))) / sampler.objective.path.noise_scale

    def _noise_of(self, end: Given | int, labels: Tensor, condition: Condition, settings: SampleSection) -> Tensor:
        if isinstance(end, int | np.integer):
            shape = (self.denoiser.in_channels, self.recipe.data.size, self.recipe.data.size)
            return initial_noise(shape, int(end), [0])[0].to(self.device)
        x = self.encode(end)
        if len(x) != 1:
            raise UserError(f"each end is one image, not {len(x)}")
        return self._invert(x, labels, condition, settings)[0]


def _one_for_each(x: Tensor, classes: Classes) -> Tensor:
    """A single image (1, C, h, w) as often as there are classes."""
    return x.expand(len(classes), -1, -1, -1) if is_list(classes) and len(x) == 1 else x  # type: ignore[arg-type]


class OfRows:
    """A velocity model (x, t, y) for the conditions `y` of some rows, as solvers take it."""

    def __init__(self, model: Any, y: Tensor):
        self.model, self.y, self.path = model, y, model.path
        self.time_range = getattr(model, "time_range", (0.0, 1.0))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t, self.y)
