"""`dic_repa.evaluate` gives the numbers of the command line, from images in memory and from folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dic_repa import evaluate
from dic_repa.cli.evaluate import command
from dic_repa.data import datasets
from dic_repa.errors import UserError

METRICS = ["fd-digits", "prec-digits"]


@pytest.fixture(scope="module")
def levels() -> torch.Tensor:
    data = datasets.create("digits", split="train")
    images = torch.stack([data[i]["x"] for i in range(0, 200, 2)])
    noisy = images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return ((noisy.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@pytest.fixture(scope="module")
def of_tensor(levels):
    return evaluate(levels, "digits:held-out", METRICS, cache=False)


def test_scores_are_those_of_the_command(levels, of_tensor, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    folder, record = tmp_path / "images", tmp_path / "metrics.json"
    folder.mkdir()
    pictures = [Image.fromarray(image[0].numpy()) for image in levels]
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i:06d}.png")
    options = ["--reference", "digits:held-out", "--metrics", ",".join(METRICS), "--no-cache", "--out", str(record)]
    result = CliRunner().invoke(command, [str(folder), *options])
    assert result.exit_code == 0, result.output
    expected = json.loads(record.read_text())["metrics"]
    for given in (folder, pictures):
        assert dict(evaluate(given, "digits:held-out", METRICS, cache=False)) == pytest.approx(expected, rel=1e-6)
    assert dict(of_tensor) == pytest.approx(expected, rel=1e-6)


def test_scores_print_as_a_table(of_tensor):
    lines = repr(of_tensor).splitlines()
    assert lines[0].split() == ["metric", "100", "images"]
    assert f"{of_tensor['fd-digits']:.2f}" in lines[1]
    assert "note: 100 samples are fewer than" in repr(of_tensor)
    assert "<td" in of_tensor._repr_html_()


def test_a_reference_in_memory(levels):
    pictures = [Image.fromarray(image[0].numpy()) for image in levels]
    same = evaluate(levels, pictures, "fd-digits", cache=False)
    assert abs(same["fd-digits"]) < 1e-3


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "the list holds no images"),
        (torch.zeros(0, 1, 16, 16), "the tensor holds no images"),
        (torch.zeros(2, 16, 16), "must be"),
        ([Image.new("L", (16, 16)), "b.png"], "image 1 of the list is a str"),
        ([Image.fromarray(np.eye(16, dtype=np.uint8)), Image.new("L", (20, 16))], "image 1 is 20x16"),
        (torch.zeros(2, 1, 8, 8), "8x8, the reference 16x16"),
        ("nowhere", "no folder, zip or tar nowhere"),
    ],
)
def test_bad_input_is_one_line(images, message):
    with pytest.raises(UserError, match=message):
        evaluate(images, "digits:held-out", ["fd-digits"], cache=False)


def test_a_run_is_no_images(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=r"is a run or a model, not images"):
        evaluate(tmp_path, "digits")
