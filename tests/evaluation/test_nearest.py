"""`dic-repa nearest`: planted copies are found, and nothing else; the nearest pictures are those of every distance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from dic_repa.cli import main
from dic_repa.data.digits import load_digits
from dic_repa.errors import UserError
from dic_repa.evaluation import open_images
from dic_repa.evaluation.digits import Digits
from dic_repa.evaluation.nearest import Copies, find_copies

REAL = (load_digits("train")[0][:, 0] * 255).round().byte().numpy()  # (8000, 28, 28)


def write(name: str, images: np.ndarray) -> str:
    np.savez(name, np.repeat(images[..., None], 3, axis=3))
    return name


def noisy(images: np.ndarray, deviation: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, deviation, images.shape)
    return (images + noise).clip(0, 255).round().astype(np.uint8)


@pytest.fixture(autouse=True)
def sets(tmp_path, monkeypatch):
    """100 training digits, 200 others as a bound; 40 samples, of which 6 are copies and 34 are other digits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train = REAL[:100]
    exact, alike, mirrored = train[[3, 50]], noisy(train[[7, 8, 9]], 3), train[[20], :, ::-1]
    write("train.npz", train)
    write("bound.npz", REAL[1000:1200])
    write("samples.npz", np.concatenate([exact, alike, mirrored, REAL[2000:2034]]))


def find(**options):
    return find_copies(*(open_images(f"{name}.npz") for name in ("samples", "train", "bound")), "digits", **options)


def test_planted_copies_are_found_and_nothing_else():
    found = find()
    for name in ("digits", "pixels"):
        scores = found.scores(0)[name]
        assert scores["samples"] == [0, 1, 2, 3, 4, 5]
        assert (scores["near_copies"], scores["share"]) == (6, 6 / 40)
    assert found.exact.nonzero()[:, 0].tolist() == [0, 1, 5]
    unmirrored = find(flip=False)
    assert unmirrored.exact.nonzero()[:, 0].tolist() == [0, 1]
    assert unmirrored.scores(0)["pixels"]["samples"] == [0, 1, 2, 3, 4]
    assert found.copies["pixels"].indices[:6, 0].tolist() == [3, 50, 7, 8, 9, 20]
    assert found.copies["pixels"].mirrored[:6, 0].tolist() == [False] * 5 + [True]


def test_the_nearest_are_those_of_every_distance():
    samples, train, bound = (np.load(f"{name}.npz")["arr_0"] for name in ("samples", "train", "bound"))
    found = find(flip=False)
    flat = lambda images: images.reshape(len(images), -1) / 255  # noqa: E731
    network = lambda images: Digits()(torch.from_numpy(images).movedim(-1, 1))["features"].numpy()  # noqa: E731
    for name, by, size in (("pixels", flat, 28 * 28 * 3), ("digits", network, 1)):
        distances = cdist(by(samples), by(train)) / size**0.5
        order = np.sort(distances, axis=1)[:, :3]
        np.testing.assert_allclose(found.copies[name].distances.numpy(), order, atol=1e-5)
        picked = np.take_along_axis(distances, found.copies[name].indices.numpy(), axis=1)
        np.testing.assert_allclose(picked, order, atol=1e-5)
        real = cdist(by(bound), by(train)).min(axis=1) / size**0.5
        np.testing.assert_allclose(found.copies[name].real.numpy(), real, atol=1e-5)


def test_near_is_nearer_than_all_but_a_share_of_the_real_ones():
    real = torch.arange(1.0, 201.0)
    points = torch.tensor([[0.5], [1.0], [2.0], [2.9], [3.0], [50.0]])
    near = Copies(points, torch.zeros_like(points), torch.zeros_like(points), real).near(0.01)
    assert near.tolist() == [True, True, True, True, False, False]  # of 200, two may be as near


def test_without_a_bound_the_training_pictures_are_compared_among_themselves():
    images = [open_images(f"{name}.npz") for name in ("samples", "train")]
    found = find_copies(*images, extractor="digits", flip=False)
    train = np.load("train.npz")["arr_0"].reshape(100, -1) / 255
    others = cdist(train, train) + np.diag([np.inf] * 100)
    np.testing.assert_allclose(
        found.copies["pixels"].real.numpy(), others.min(axis=1) / (28 * 28 * 3) ** 0.5, atol=1e-5
    )
    assert found.calibrated_by == "100 images of train.npz, each against the others"
    assert {0, 1, 2, 3, 4} <= set(found.scores(0)["pixels"]["samples"])


@pytest.mark.slow
def test_the_verb_in_a_process_of_its_own(dic_repa):
    options = ["--reference", "train.npz", "--bound", "bound.npz", "--no-flip", "--share", "0"]
    rows = dic_repa("nearest", "samples.npz", *options).stdout.splitlines()
    assert rows[1].split()[0] == "lite2"
    assert rows[2].split()[:4] == ["pixels", "5", "of", "40"]
    assert Path("nearest.png").is_file()


def test_as_a_user_asks_for_it(capsys, mistake, checkpoint):
    def call(*arguments) -> str:
        with pytest.raises(SystemExit) as exit:
            main(["nearest", *map(str, arguments), "--extractor", "digits"])
        shown = capsys.readouterr()
        assert exit.value.code == 0, shown.err
        return shown.out

    said = call("samples.npz", "--reference", "train.npz", "--bound", "bound.npz", "--rows", "5", "--share", "0")
    rows = [line.split() for line in said.splitlines()]
    assert rows[1][:5] == ["digits", "6", "of", "40", "0.150"]
    assert "exact copies: 3 of 40" in said
    record = json.loads(Path("nearest.json").read_text())
    assert record["copies"]["pixels"]["share"] == 0.15
    assert [row["sample"] for row in record["shown"]] == [0, 1, 2, 3, 4]
    assert record["shown"][1]["pixels"]["nearest"][0] == 50
    with Image.open("nearest.png") as picture:
        assert picture.width > 7 * 64
    call("samples.npz", "--reference", "train.npz", "--closest", "--rows", "6", "--out", "closest.png")
    shown = json.loads(Path("closest.json").read_text())["shown"]
    assert {row["sample"] for row in shown} >= {0, 1, 5}
    call(
        checkpoint, "--num", "4", "--reference", "digits", "--bound", "digits:held-out", "--out", "run.png", "--no-flip"
    )
    record = json.loads(Path("run.json").read_text())
    assert (record["samples"]["count"], record["sampling"]["sample"]["num"], record["extractor"]) == (4, 4, "digits")
    assert "did you mean digits" in mistake("nearest", "samples.npz", "--reference", "digit")
    said = mistake("nearest", "samples.npz", "--reference", "digits")
    assert "the images of samples.npz are 28x28, those of digits 16x16; crop all to one size with --resize" in said
    Path("mine.png").write_text("mine")
    assert "not written by dic-repa" in mistake("nearest", "samples.npz", "--reference", "x", "--out", "mine.png")
    with pytest.raises(UserError, match="unknown feature extractor"):
        find_copies(open_images("samples.npz"), open_images("train.npz"), extractor="lite3")
