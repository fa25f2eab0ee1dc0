"""The recipes for other data than SD-VAE's latents: each builds, taps the middle and has the GMACs that it states."""

from __future__ import annotations

import functools
import re

import pytest
import timm  # noqa: F401 - before a test is on the meta device: in torch 2.6 what it imports cannot be
import torch
from places import ROOT

from dic_repa.alignment import Alignment
from dic_repa.conditions import ClassLabels
from dic_repa.data.autoencoders import AutoencoderSpec
from dic_repa.models import measure_cost
from dic_repa.objectives import resolution_shift
from dic_repa.recipe import ModelSection, load_recipe
from dic_repa.recipe.build import build_denoiser, build_objective
from dic_repa.sampling.sampler import check_sampling
from dic_repa.training.dry_run import build_shapes, with_random_data

# Channels and image pixels of a latent's pixel, and the shift of times.
DATA = {
    "dic-xl-e2e-sdvae": (4, 8, 1.0),
    "dic-xl-vavae": (32, 16, 1.0),
    "dic-xl-e2e-vavae": (32, 16, 1.0),
    "dic-xl-rae": (768, 16, 6.93),
    "dic-xl-pixels": (3, 1, 6.93),
}


@functools.cache  # two recipes have one network
def sketch(model: str, channels: int, size: int):
    """The denoiser on the meta device, and what it costs."""
    with torch.device("meta"):
        denoiser = build_denoiser(ModelSection.model_validate_json(model), channels, ClassLabels(1000))
    return denoiser, measure_cost(denoiser, size)


@pytest.mark.parametrize("name", DATA)
def test_it_builds_with_its_tap_and_the_stated_size(name):
    recipe, (channels, downsample, shift) = load_recipe(name), DATA[name]
    size = recipe.data.size
    assert size * downsample == 256
    (section,) = recipe.alignments
    denoiser, cost = sketch(recipe.model.model_dump_json(), channels, size)
    with torch.device("meta"):
        alignment = Alignment.build(denoiser, section.tap, 768, (16, 16), (size, size), section.head)
    assert alignment.target_shape == (256, 768)
    trunk = [
        block for block in denoiser.blocks() if denoiser.wide_head is None or block not in denoiser.wide_head.blocks
    ]
    assert trunk[len(trunk) // 2 - 1] is denoiser.get_submodule(section.tap)  # the middle one, as in the paper
    comment = (ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8").replace("\n# ", " ")
    gmacs, parameters = re.search(r"([\d.]+) GMACs and ([\d.]+) M parameters", comment).groups()
    assert cost.macs / 1e9 == pytest.approx(float(gmacs), rel=0.001)
    assert cost.macs / 1e9 == pytest.approx(116.1, rel=0.02)
    assert cost.parameters / 1e6 == pytest.approx(float(parameters), rel=0.001)
    objective = build_objective(recipe.objective)
    check_sampling(recipe.sample, objective)
    if shift > 1:
        assert objective.shift == recipe.sample.grid.options["shift"] == "auto"
        assert resolution_shift(channels * size**2) == pytest.approx(shift, abs=0.01)
    else:
        assert objective.shift == 1.0
    assert recipe.paper.differs.startswith("no number is published")


@pytest.mark.parametrize("name", ["dic-xl-e2e-vavae", "dic-xl-rae"])
def test_a_dry_run_needs_neither_data_nor_weights(name, monkeypatch):
    channels, downsample, _ = DATA[name]
    monkeypatch.setattr(
        "dic_repa.recipe.build.load_spec",
        lambda name: AutoencoderSpec(name, channels, downsample, (0.0,) * channels, (1.0,) * channels),
    )
    notes: list[str] = []
    shapes = build_shapes(with_random_data(load_recipe(name), notes), notes)
    assert shapes["data"] == (channels, 16, 16)
    assert shapes["macs"] / 1e9 == pytest.approx(116.6, rel=0.01)
    assert shapes["tokens"] == [(256, 768)]
    assert f"{channels} channels, 1000 classes and images of 256 px are assumed" in notes[0]
