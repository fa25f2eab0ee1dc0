"""`dic-repa bench sample`: the whole sampler, from noise to decoded images, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import timeit
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from dic_repa.bench.device import look_inside
from dic_repa.bench.model import randomise
from dic_repa.bench.timing import Settings, case_label, measure
from dic_repa.conditions import create_condition
from dic_repa.data.autoencoders import load_spec
from dic_repa.data.latent_files import DEFAULT_AUTOENCODER
from dic_repa.errors import UserError, first_line
from dic_repa.models import measure_cost
from dic_repa.models.compiled import GRAPH_MODES
from dic_repa.recipe import Recipe, load_training_recipe
from dic_repa.recipe.build import build_decoder, build_denoiser, build_objective
from dic_repa.samplers import solver_info
from dic_repa.sampling.sampler import Sampler
from dic_repa.training.dry_run import with_random_data

GUIDANCE = {"doubled": True, "one-by-one": False}


class SampleCase:
    """One batch of a sampler, decoded."""

    def __init__(self, label: str, sampler: Sampler, gmacs: float):
        self.label, self.sampler, self.gmacs = label, sampler, gmacs
        self.batch = sampler.settings.batch_size
        self.labels = torch.arange(self.batch) % max(1, sampler.condition.count)

    @property
    def operations(self) -> float:
        return 2 * self.gmacs * self.sampler.evaluations  # which are known when it has run

    def __call__(self) -> list[Tensor]:
        return list(self.sampler(self.labels))

    def facts(self, device: torch.device) -> dict[str, Any]:
        found = {"evaluations": self.sampler.evaluations, "decode_share": self.decode_share(device)}
        graphs = device.type == "cuda" and self.sampler.settings.compile in GRAPH_MODES
        return found if graphs else found | look_inside(self.shortened(), device)

    def shortened(self) -> SampleCase:
        """The same in two steps: a profile of hundreds would take minutes and gigabytes."""
        changes: dict = {"steps": 2, "grid": None}
        if solver_info(self.sampler.settings.solver).kind == "adaptive":
            changes |= {"solver": "heun", "rtol": None, "atol": None, "options": None}
        settings = self.sampler.settings.model_copy(update=changes)
        return SampleCase(self.label, dataclasses.replace(self.sampler, settings=settings), self.gmacs)

    def decode_share(self, device: torch.device) -> float:
        """The time of decoding as a share of a whole call's."""
        x = torch.randn(self.batch, *self.sampler.shape, device=device)
        decoding = timeit.timeit(lambda: self.sampler.to_images(x), timer=timer, number=1)
        return decoding / timeit.timeit(self, timer=timer, number=1)


def bench_sample(
    recipes: Sequence[str], settings: Settings, overrides: Sequence[str] = (), guidance: Sequence[str] = ("doubled",)
) -> dict:
    """Time the sampler of each training recipe, with random weights, as the settings say: all its steps, guidance, and
    decoding. The solver's state is float32 throughout.

    `guidance` names ways of `GUIDANCE`; a recipe without guidance takes only the first. Returns as `measure`; rows have
    `evaluations` of the network for each image, and `decode_share`. Memory and the share of the convolutions are those
    of two steps.
    """
    device, cases = settings.device, []
    notes: list[str] = []
    for name in recipes:
        recipe = load_training_recipe(name, overrides)
        options = with_random_data(recipe, notes).data.options
        torch.manual_seed(0)
        condition = create_condition(options["num_classes"], options.get("condition"))
        denoiser = randomise(build_denoiser(recipe.model, options["channels"], condition)).to(device)
        gmacs = measure_cost(denoiser, recipe.data.size).macs / 1e9
        decode = _decoder(recipe, device, notes)
        guided = recipe.sample.guidance is not None and recipe.sample.guidance.scale != 1
        ways = guidance if guided else guidance[:1]
        for kind, mode, way, batch in itertools.product(settings.precisions, settings.compiles, ways, settings.batches):
            changes = {"batch_size": batch, "num": batch, "precision": kind, "compile": mode}
            section = recipe.sample.model_copy(deep=True, update=changes)
            if guided and section.guidance:
                section.guidance.doubled = GUIDANCE[way]
            shape = (denoiser.in_channels, recipe.data.size, recipe.data.size)
            sampler = Sampler(denoiser, build_objective(recipe.objective), section, shape, None, decode)
            label = case_label(name, kind, mode, way if len(ways) > 1 else "")
            cases.append(SampleCase(label, sampler, gmacs))
    return measure(cases, settings, "sampling", warmup=1) | {"notes": [*dict.fromkeys(notes)]}


def _decoder(recipe: Recipe, device: torch.device, notes: list[str]) -> Callable[[Tensor], Tensor]:
    """The recipe's decoder; one like Stable Diffusion's with random weights if its own are not on this machine."""
    try:
        return build_decoder(recipe.data, device)
    except UserError as error:
        why = first_line(error)
        notes.append(f"decoding by Stable Diffusion's decoder with random weights, for latents of that shape ({why})")
    from diffusers import AutoencoderKL

    spec = load_spec(DEFAULT_AUTOENCODER)
    with contextlib.suppress(UserError):  # what is known of it without its weights
        spec = load_spec(recipe.data.autoencoder or spec.name)
    widths = (128, 256, 512, *(512,) * 6)[: spec.downsample.bit_length()]
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }
    sizes = {"block_out_channels": widths, "layers_per_block": 2, "latent_channels": spec.channels}
    model: Any = AutoencoderKL(**blocks, **sizes)
    model.to(device).eval().requires_grad_(False)
    return lambda x: (model.decode(x / 0.18215).sample / 2 + 0.5).clamp(0, 1)
