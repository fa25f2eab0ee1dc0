"""Encoders and heads from outside the package, in the three ways that there are, each through to trained weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from own_encoder import ENCODER
from safetensors.torch import load_file

from dic_repa.cli.encoders import command
from dic_repa.encoders import create_encoder, list_encoders
from dic_repa.errors import UserError
from dic_repa.recipe import load_recipe
from dic_repa.registry import import_plugin
from dic_repa.training import train

HEAD = '''
from torch import nn
from torch.nn import functional as F


class PooledHead(nn.Module):
    """Linear on the feature map, resized to the encoder's grid by averaging or repeating."""

    def __init__(self, channels: int, embed_dim: int, grid: tuple[int, int]):
        super().__init__()
        self.grid, self.project = grid, nn.Conv2d(channels, embed_dim, 1)

    def forward(self, feature, t):
        return F.adaptive_avg_pool2d(self.project(feature), self.grid).flatten(2).mT
'''
ENTRY_POINTS = """
[dic_repa.encoders]
their-patches = their_encoders:Patches
broken = their_encoders:Missing

[dic_repa.heads]
their-head = their_encoders:PooledHead
"""
TINY = ["train.steps=2", "train.batch_size=4", "train.sample_every=0", "model.width=8", "model.depths=[1,1,1,1,1]"]


@pytest.fixture
def folder(plugin_folder):
    return plugin_folder


def run(folder, recipe: str):
    """Train a recipe's file for two steps, and return the trained head's names with their shapes."""
    Path("mine.yaml").write_text(recipe)
    done = train(load_recipe("mine.yaml", TINY), folder / "run")
    checkpoint = done.newest_checkpoint() / "model.safetensors"
    return {name: tuple(t.shape) for name, t in load_file(checkpoint).items() if name.startswith("alignments")}


def install(folder, monkeypatch, entry_points: str = ENTRY_POINTS) -> None:
    """What pip leaves behind of a package `their-encoders` that offers entry points."""
    site = folder / "site-packages"
    info = site / "their_encoders-1.2.dist-info"
    info.mkdir(parents=True)
    (site / "their_encoders.py").write_text(ENCODER.replace('@register_encoder("my-patches")', "") + HEAD)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-encoders\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(entry_points)
    monkeypatch.syspath_prepend(site)


def test_registered_in_a_module_that_the_recipe_names(folder):
    (folder / "my_encoder.py").write_text(ENCODER)
    shapes = run(
        folder,
        """
base: digits-urepa
plugins: [my_encoder]
alignments:
  - {encoder: my-patches, encoder_options: {embed_dim: 24}, tap: mid.0, head_options: {hidden: 64}}
  - {encoder: digits-vit, tap: mid.0, head: linear, weight: 0.25}   # several at once
""",
    )
    assert shapes["alignments.0.head.layers.4.weight"] == (24, 64)
    assert shapes["alignments.1.head.layer.weight"] == (96, 32)


def test_named_as_module_and_factory(folder):
    (folder / "my_package").mkdir()
    (folder / "my_package" / "encoders.py").write_text(ENCODER)
    (folder / "my_package" / "heads.py").write_text(HEAD)
    shapes = run(
        folder,
        """
base: digits-urepa
alignments:
  - {encoder: "my_package.encoders:Patches", head: "my_package.heads:PooledHead", head_options: {}}
""",
    )
    assert shapes == {"alignments.0.head.project.weight": (32, 32, 1, 1), "alignments.0.head.project.bias": (32,)}


def test_entry_points_of_another_package(folder, monkeypatch):
    install(folder, monkeypatch)
    shapes = run(
        folder,
        """
base: digits-urepa
alignments:
  - {encoder: their-patches, encoder_options: {embed_dim: 40}, head: their-head, head_options: {}}
""",
    )
    assert shapes["alignments.0.head.project.weight"] == (40, 32, 1, 1)


def test_entry_points_are_listed_and_checked(folder, monkeypatch):
    install(folder, monkeypatch)
    assert "their-patches" in list_encoders()
    result = CliRunner().invoke(command, [], catch_exceptions=False)
    line = next(line for line in result.output.splitlines() if line.startswith("their-patches"))
    assert line.split()[1:6] == ["32", "-", "4096", "0.0", "-"]
    # A package that is broken says so in its own line, and hides no other.
    assert "their-encoders 1.2 cannot be loaded from their_encoders:Missing" in result.output
    assert "dinov2-vit-b" in result.output
    with pytest.raises(UserError, match="'their-patch'; did you mean their-patches"):
        create_encoder("their-patch")


def test_a_frozen_encoder_needs_no_care_of_its_author(folder):
    (folder / "careless.py").write_text(ENCODER)
    import_plugin("careless")
    encoder = create_encoder("careless:Patches")
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_module:Encoder", "plugin 'absent_module' was not found"),
        ("my_encoder:Patch", "my_encoder has no 'Patch' to call; did you mean Patches"),
        ("my_encoder:", "neither a known name nor of the form package.module:factory"),
        ("my encoder:Patches", "neither a known name nor of the form"),
        ("timm:", "is a family"),
    ],
)
def test_names_that_lead_nowhere(folder, name, message):
    (folder / "my_encoder.py").write_text(ENCODER)
    with pytest.raises(UserError, match=message) as error:
        create_encoder(name)
    assert "\n" not in str(error.value)


def test_what_a_plugin_misses_is_not_hidden(folder):
    (folder / "needy.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        import_plugin("needy")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "forward(self, images): return torch.zeros(len(images), 50, 32)",
            r"no grid.*7x7.*\(1, 49, 32\).*\(1, 50, 32\)",
        ),
        ("forward(self, images): return torch.zeros(len(images), 49, 31)", r"no grid.*\(1, 49, 31\)"),
        ("forward(self, images): return None", "no grid.*NoneType"),
    ],
)
def test_tokens_that_are_no_grid(folder, source, message):
    (folder / "my_encoder.py").write_text(ENCODER + f"\n\nclass Wrong(Patches):\n    def {source}\n")
    with pytest.raises(UserError, match=message):
        run(folder, yaml.safe_dump({"base": "digits-urepa", "alignments": [{"encoder": "my_encoder:Wrong"}]}))
    assert not (folder / "run").exists()


def test_what_is_no_encoder(folder):
    (folder / "my_encoder.py").write_text(
        "from dic_repa.protocols import Encoder\n\ndef build() -> Encoder:\n    return 3\n"
    )
    with pytest.raises(UserError, match="gives a int without embed_dim and token_grid"):
        run(folder, yaml.safe_dump({"base": "digits-urepa", "alignments": [{"encoder": "my_encoder:build"}]}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os:system", "os:system is a part of Python, and no encoder"),
        ("subprocess:Popen", "part of Python"),
        ("my_encoder:build", "does not say what it makes: name a class, or register the function"),
        ("my_encoder:Popen", "part of Python"),
        ("my_encoder:Other", "my_encoder:Other is no encoder: it has no __call__ and no token_grid"),
        ("torch:load", "torch:load"),
    ],
)
def test_what_is_no_part_is_not_called(folder, name, message):
    source = (
        "from subprocess import Popen\n\ndef build():\n    raise SystemExit(9)\n\nclass Other:\n    __init__ = build\n"
    )
    (folder / "my_encoder.py").write_text(source)
    with pytest.raises(UserError, match=message):
        create_encoder(name)


def test_a_plugin_is_the_same_as_its_own_computation(folder):
    (folder / "my_encoder.py").write_text(ENCODER)
    encoder, images = create_encoder("my_encoder:Patches", embed_dim=5), torch.rand(2, 3, 8, 12)
    patches = images.mean(1, keepdim=True).unfold(2, 4, 4).unfold(3, 4, 4).reshape(2, 6, 16)
    expected = patches @ encoder.project.weight.reshape(5, 16).T + encoder.project.bias
    torch.testing.assert_close(encoder(images), expected)
