"""A small sampler, and an inference checkpoint to sample from."""

from __future__ import annotations

from pathlib import Path

import torch

from dic_repa.conditions import ClassLabels
from dic_repa.models import DiC
from dic_repa.objectives import FlowMatching
from dic_repa.recipe import SampleSection, load_training_recipe, to_yaml
from dic_repa.recipe.build import build_denoiser
from dic_repa.sampling.sampler import Sampler

RECIPE = load_training_recipe(
    "digits-urepa", ["model.width=8", "model.depths=[1,1,1,1,1]", "sample.solver=euler", "sample.steps=1"]
)
LABELS = torch.arange(4)


def small_sampler(**settings) -> Sampler:
    torch.manual_seed(0)
    denoiser = DiC(8, (1, 1, 1, 1, 1), in_channels=1, num_classes=4).requires_grad_(False)
    torch.nn.init.normal_(denoiser.output.conv2.weight, std=0.02)
    section = SampleSection(steps=3, batch_size=2, guidance={"scale": 2.0, "interval": [0.0, 0.7]}, **settings)
    return Sampler(denoiser, FlowMatching(), section, (1, 8, 8))


def images(sampler: Sampler, labels: torch.Tensor = LABELS) -> torch.Tensor:
    return torch.cat(list(sampler(labels)))


def write_tiny_checkpoint(folder: Path) -> Path:
    """An inference checkpoint of a small denoiser; random, since a new one predicts zero whatever it sees."""
    denoiser = build_denoiser(RECIPE.model, 1, ClassLabels(10))
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    denoiser.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(to_yaml(RECIPE))
    return folder
