"""The emoji of the package: the pictures, what is held out of them, their copies, and the script that makes them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from dic_repa.data import Emoji
from dic_repa.data.emoji import picture_key

# SHA-256 of 32x32x3 pixels and the group, from a file that was made with other code from the same packages.
FIXTURE = {
    "1f44b-1f3fb": ("9f95b540eaffb54e", "People & Body"),
    "1f980": ("cc0a3208ce8c467a", "Animals & Nature"),
    "1f1eb-1f1f7": ("8b79e55782b0fcf4", "Flags"),
    "1f34e": ("822d28eef0478cf9", "Food & Drink"),
    "1f4bb": ("a9a83212c8c125bf", "Objects"),
    "26bd": ("6caed38f7a70945b", "Activities"),
    "1f600": ("3571aa2b9b935480", "Smileys & Emotion"),
    "267b-fe0f": ("906102a332583faf", "Symbols"),
    "1f680": ("4ac3d2e3194062a2", "Travel & Places"),
    "0035-fe0f-20e3": ("3d673eea4f314e5d", "Symbols"),  # its original is not square
}


@pytest.fixture(scope="module")
def train():
    return Emoji()


@pytest.fixture(scope="module")
def held_out():
    return Emoji("held-out")


def test_the_pictures_are_those_of_the_packages(train, held_out):
    assert len(train) + len(held_out) == 3374
    for name, (digest, group) in FIXTURE.items():
        data = train if name in train.names else held_out
        sample = data[data.names.index(name)]
        assert sample["image"].shape == (3, 32, 32)
        pixels = sample["image"].permute(1, 2, 0).contiguous().numpy().tobytes()
        assert hashlib.sha256(pixels).hexdigest()[:16] == digest
        assert data.class_names[sample["label"]] == group


def test_no_variant_of_a_training_picture_is_held_out(train, held_out):
    assert 0.09 < len(held_out) / 3374 < 0.16
    assert {*train.labels} == {*held_out.labels} == {*range(9)}
    assert not {image.numpy().tobytes() for image in train.images} & {i.numpy().tobytes() for i in held_out.images}
    assert not {*map(picture_key, train.names)} & {*map(picture_key, held_out.names)}


@pytest.mark.parametrize(
    "variants",
    [
        "1f44b 1f44b-1f3fb 1f44b-1f3ff",  # tones
        "1f6b6 1f6b6-1f3fc-200d-2640-fe0f-200d-27a1-fe0f",  # gender and direction
        "1f9d1 1f468-1f3fd-200d-1f9b0 1f471-1f3fb-200d-2642-fe0f",  # hair
        "1f9d1-200d-1f680 1f468-200d-1f680 1f469-1f3fe-200d-1f680",
        "1f46d 1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3fc",
        "1f46a 1f468-200d-1f467 1f469-200d-1f469-200d-1f467-200d-1f466",
        "1f431 1f63a",  # the same picture
    ],
)
def test_variants_have_one_key(variants):
    assert len({*map(picture_key, variants.split())}) == 1


def test_other_pictures_have_other_keys():
    others = "2640-fe0f 2642-fe0f 27a1-fe0f 1f9d1 1f466 1f9d1-200d-1f680 1f9d1-200d-1f692 1f1eb-1f1f7 1f1eb-1f1ee 1f436"
    assert len({*map(picture_key, others.split())}) == len(others.split())


def test_the_order_has_nothing_to_do_with_the_groups(train):
    """Any stretch of 300 samples has the groups about as often as all have."""
    shares = np.bincount(train.labels, minlength=9) / len(train)
    for start in range(0, 2700, 300):
        part = np.bincount(train.labels[start : start + 300], minlength=9) / 300
        assert np.abs(part - shares).max() < 0.1
