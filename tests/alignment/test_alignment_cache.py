"""The feature cache: what it holds, when it is used again, and when it must not be."""

from __future__ import annotations

import json
import pickle
import shutil

import datasets as hf
import numpy as np
import pytest
import torch
from pictures import picture, write_tree
from safetensors.torch import load_file
from torch import nn

from dic_repa.alignment import cache as cache_module
from dic_repa.alignment.cache import HASHED_IMAGES, WithTokens, cache_key, feature_cache, spread
from dic_repa.data import Digits, datasets
from dic_repa.data.sources import ImageFolder
from dic_repa.encoders import create_encoder
from dic_repa.encoders.digits import DigitsViT
from dic_repa.errors import UserError
from dic_repa.recipe import load_recipe
from dic_repa.training import train


class FewDigits(Digits):
    """The first digits, so that a cache is filled in no time."""

    def __len__(self):
        return 70


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DIC_REPA_CACHE", str(tmp_path / "features"))
    return tmp_path / "features"


@pytest.fixture
def data():
    return FewDigits()


@pytest.fixture
def encoder():
    return create_encoder("digits-vit")


@pytest.fixture
def batches(monkeypatch):
    """The sizes of the batches that the digit encoder is given."""
    sizes, forward = [], DigitsViT.forward
    monkeypatch.setattr(DigitsViT, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    return sizes


def build(encoder, data, **options):
    return feature_cache("digits-vit", options, encoder, data)


def test_it_holds_the_encoders_tokens(folder, data, encoder):
    cache = build(encoder, data)
    tokens = encoder(data.images[:70])
    for index in (0, 33, 69):
        assert cache[index].dtype == torch.float16
        torch.testing.assert_close(cache[index].float(), tokens[index], rtol=1e-3, atol=1e-3)
    assert [file.name for file in folder.iterdir()] == [cache.file.name]
    assert np.load(cache.file, mmap_mode="r").shape == (70, 49, 96)
    sample = WithTokens(data, {"tokens.0": cache})[3]
    assert sample.keys() == {"x", "image", "label", "tokens.0"}
    torch.testing.assert_close(pickle.loads(pickle.dumps(cache))[5], cache[5])


def test_it_is_filled_once(folder, data, encoder, batches):
    build(encoder, data)
    assert sorted(batches) == [1, 1, 1, 1, 6, 64]  # the probes, and all 70
    batches.clear()
    build(create_encoder("digits-vit"), FewDigits())
    assert batches == [1, 1, 1, 1]


def test_the_key_covers_encoder_weights_preprocessing_and_data(data, encoder):
    key = cache_key("digits-vit", {}, encoder, data)
    assert cache_key("digits-vit", {}, create_encoder("digits-vit"), FewDigits()) == key
    assert cache_key("digits-vit", {"weights": "elsewhere"}, encoder, data) == key  # the same weights, moved
    assert cache_key("digits-vit", {"layer": 1}, encoder, data) != key
    assert cache_key("other", {}, encoder, data) != key
    changed = create_encoder("digits-vit")
    changed.model.blocks[1].mlp.fc1.weight[3, 3] += 1e-4
    assert cache_key("digits-vit", {}, changed, data) != key
    normalised = create_encoder("digits-vit")
    normalised.mean += 0.01  # no part of the saved weights
    assert cache_key("digits-vit", {}, normalised, data) != key
    other = FewDigits()
    other.images = other.images.clone()
    other.images[0, 0, 3, 3] += 1 / 255
    assert cache_key("digits-vit", {}, encoder, other) != key
    assert cache_key("digits-vit", {}, encoder, FewDigits("held-out")) != key
    assert cache_key("digits-vit", {}, encoder, Digits()) != key  # more of them


@pytest.mark.parametrize("kind", ["folder", "linked", "zip", "disk", "parquet", "hub"])
def test_the_key_covers_images_that_are_not_hashed(tmp_path, monkeypatch, encoder, kind):
    """One of 70 is replaced, under its name and label, beside those of which the key has the pixels."""
    tree, place = write_tree(tmp_path / "tree", {"cat": 30, "dog": 40}, (16, 16)), str(tmp_path / "place")
    load = hf.load_dataset
    rows = lambda: load("imagefolder", data_dir=str(tree), split="train", cache_dir=str(tmp_path / "cache"))  # noqa: E731
    if kind == "folder":
        place = str(tree)
    elif kind == "linked":
        (tmp_path / "place").mkdir()
        for name in ("cat", "dog"):
            (tmp_path / "place" / name).symlink_to(tree / name)
    elif kind == "hub":
        place = "somebody/pictures"
        monkeypatch.setattr(hf, "load_dataset", lambda name, split: rows())

    def key():
        if kind == "zip":
            shutil.make_archive(place, "zip", tree)
        elif kind == "disk":
            rows().save_to_disk(place)
        elif kind == "parquet":
            (tmp_path / "place").mkdir(exist_ok=True)
            rows().to_parquet(f"{place}/train.parquet")
        return opened()

    def opened():
        return cache_key("digits-vit", {}, encoder, ImageFolder(place + ".zip" * (kind == "zip"), size=16))

    before = key()
    assert opened() == before
    unseen = next(i for i in range(30, 70) if i not in spread(70, HASHED_IMAGES))
    picture(99, (16, 16)).save(tree / f"dog/{unseen - 30:03d}.png")
    assert key() != before


@pytest.mark.parametrize("damage", ["cut", "empty", "others"])
def test_a_file_that_does_not_agree_is_made_anew(folder, data, encoder, damage):
    file = build(encoder, data).file
    whole = file.read_bytes()
    if damage == "others":  # a change that the key cannot see, such as in code that the encoder calls
        np.save(file, np.load(file)[::-1])
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    assert build(encoder, data).file == file
    assert file.read_bytes() == whole


def test_an_eighth_of_zeros_is_found_when_it_is_read(folder, data, encoder):
    """Where the few tokens that are compared with the encoder's are whole."""
    cache = build(encoder, data)
    row, whole = cache.array[0].nbytes, cache.file.read_bytes()
    start = len(whole) - 70 * (row + 4)
    assert start + 70 * row == cache.array.offset + cache.array.nbytes
    zeroed = set(range(30, 39))
    assert not zeroed & set(spread(70, cache_module.PROBED_IMAGES))
    cache.file.write_bytes(whole[: start + 30 * row] + bytes(9 * row) + whole[start + 39 * row :])
    again = build(encoder, data)
    with pytest.raises(UserError, match=rf"{cache.file} is damaged: the tokens of image 33 .*; remove it"):
        again[33]
    assert again[29].any()
    assert again.damaged() == sorted(zeroed)
    cache.file.write_bytes(whole[: start + 70 * row])  # as an earlier version wrote it, without checksums
    older = build(encoder, data)
    assert older.sums is None
    assert older.damaged() == []
    assert older[33].any()


def test_random_images_are_refused(folder, encoder):
    class Flipped(FewDigits):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"image": torch.rand(1, 28, 28)}

    with pytest.raises(UserError, match=r"another image each time.*cache: false"):
        build(encoder, Flipped())


def test_nothing_is_left_of_a_cache_that_fails(folder, data, encoder, monkeypatch):
    class Loud(nn.Module):
        embed_dim = 4

        def token_grid(self, size):
            return 1, 1

        def forward(self, images):
            return torch.full((len(images), 1, 4), 1e5)

    with pytest.raises(UserError, match="exceed what float16 holds"):
        feature_cache("loud", {}, Loud(), data)
    assert list(folder.iterdir()) == []

    usage = cache_module.shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"takes 0\.0 GB.*DIC_REPA_CACHE"):
        build(encoder, data)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, data, encoder):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIC_REPA_CACHE", str(tmp_path / "file" / "features"))
    with pytest.raises(UserError, match=r"cannot be made.*set DIC_REPA_CACHE"):
        build(encoder, data)


def test_training_with_it_is_training_without_the_encoder(folder, tmp_path, monkeypatch, batches):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setitem(datasets._entries, "few-digits", FewDigits)
    tiny = ["train.steps=4", "train.batch_size=8", "train.micro_batch=4", "train.sample_every=0", "train.log_every=1"]
    tiny += ["model.width=8", "model.depths=[1,1,1,1,1]", "data.name=few-digits"]

    def run(name, *overrides):
        batches.clear()
        done = train(load_recipe("digits-urepa", [*tiny, *overrides]), tmp_path / name)
        lines = [json.loads(line) for line in done.metrics_file.read_text().splitlines()]
        return lines, load_file(done.newest_checkpoint() / "model.safetensors")

    plain, weights = run("plain")
    assert batches.count(4) == 8
    run("filling", "alignments.0.cache=true")
    cached, cached_weights = run("cached", "alignments.0.cache=true", "data.workers=1")
    assert set(batches) == {1}  # the probes alone
    for before, after in zip(plain, cached):
        for term in ("loss", "denoising", "alignment.0.token", "alignment.0.manifold"):
            assert after[term] == pytest.approx(before[term], abs=2e-3)
    worst = max((weights[key] - cached_weights[key]).abs().max() for key in weights)
    assert (
        worst < 0.05
    )  # float16 tokens, and Adam's first steps, which are as long as the learning rate whatever happens
