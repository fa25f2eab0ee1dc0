"""The examples as people run them, at a small size; and what else people do around an `Aligner`."""

from __future__ import annotations

import ast
import csv
import functools
import importlib
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from pictures import write_tree
from places import ROOT
from safetensors.torch import load_file
from small_stable_diffusion import save_stable_diffusion

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = ROOT / "examples" / "README.md"
SMALL = {
    "diffusers_unet": "--width=8 --steps=2 --batch-size=8 --sampling-steps=1",
    "dit": "--depth=3 --heads=1 --steps=2 --batch-size=8 --sampling-steps=1",
    "lightning_module": "--width=8 --steps=2 --batch-size=8",
    "plain_unet": "--width=8 --steps=2 --batch-size=2",
    "stable_diffusion": "--steps=2 --batch-size=2",
}


@functools.cache
def command(name: str):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]


@pytest.fixture
def losses(tmp_path, monkeypatch):
    """Run an example; returns its denoising loss at each step."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)

    def run(name: str, *options: str) -> list[float]:
        found = command(name).main([*SMALL[name].split(), "--out=run", *options], standalone_mode=False)
        if name != "lightning_module":
            return found
        with open("run/metrics.csv") as file:
            return [float(row["denoising"]) for row in csv.DictReader(file)]

    return run


@pytest.mark.parametrize("name", [path.stem for path in EXAMPLES])
def test_alignment_changes_nothing_but_the_gradient(name, losses, tmp_path):
    """The same weights, images and noise with and without: so the first loss is the same, and not the second."""
    aligned, plain = losses(name), losses(name, "--no-align")
    assert aligned[0] == plain[0]
    assert aligned[1] != plain[1]
    assert list((tmp_path / "run").iterdir())


def test_sdxl_without_weights(losses):
    losses("stable_diffusion", "--xl", "--steps=1", "--batch-size=2", "--no-align")
    assert json.loads(Path("run/config.json").read_text())["addition_embed_type"] == "text_time"


@pytest.mark.parametrize(("xl", "prediction"), [(False, "v_prediction"), (True, "epsilon")])
def test_weights_from_a_folder(xl, prediction, losses, tmp_path):
    folder = save_stable_diffusion(tmp_path / "weights", xl, prediction_type=prediction)
    before = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    given = [f"--weights={folder}", f"--images={write_tree(tmp_path / 'pictures', {'night': 2, 'day': 2})}"]
    aligned, plain = losses("stable_diffusion", *given), losses("stable_diffusion", *given, "--no-align")
    assert aligned[0] == plain[0]
    after = load_file("run/diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert not before["conv_in.weight"].equal(after["conv_in.weight"])


@pytest.mark.parametrize("name", ["diffusers_unet", "dit", "lightning_module", "plain_unet"])
def test_images_of_ones_own(name, losses, tmp_path):
    folder = write_tree(tmp_path / "pictures", {"night": 2, "day": 2})
    found = losses(name, f"--images={folder}", "--size=16", "--steps=1", "--batch-size=2", "--encoder=digits-vit")
    assert all(loss > 0 for loss in found)


def test_batches_of_a_step_are_averaged(losses):
    """Half the batch twice is a step, so that there are twice as many losses, and the weights move as often."""
    assert len(losses("diffusers_unet", "--steps=2", "--accumulate=2")) == 4


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_needs_public_names_alone(path):
    text = path.read_text()
    assert len(text.splitlines()) < 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dic_repa"):
            exported = importlib.import_module(node.module).__all__
            assert {name.name for name in node.names} <= set(exported), node.module


def test_the_page_has_every_example():
    linked = re.findall(r"^\| \[(\w+\.\w+)\]\(\1\)", PAGE.read_text(), flags=re.MULTILINE)
    assert {path.name for path in EXAMPLES} <= set(linked)
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text())
    assert not [link for link in links if not (PAGE.parent / link).is_file()]


def test_every_command_that_is_named_can_be_run():
    texts = [path.read_text() for path in [*EXAMPLES, PAGE]]
    found = re.findall(r"examples/(\w+)\.py((?: +--[\w-]+(?:[ =][\w./-]+)?)*)", "\n".join(texts))
    assert len(found) > 10
    for name, options in found:
        words = shlex.split(re.sub(r"(--(?:images|weights)) \S+", r"\1 .", options))
        command(name).make_context(name, words)
