"""Real images by name: as the reference, and as the bound that samples are compared with."""

from __future__ import annotations

import pytest
import torch
from pictures import write_tree

from dic_repa.data import datasets
from dic_repa.data.digits import load_digits, resize
from dic_repa.errors import UserError
from dic_repa.evaluation import Measure, frechet_distance, open_images, statistics
from dic_repa.evaluation.digits import Digits as DigitsNetwork
from dic_repa.evaluation.runs import real_images
from dic_repa.recipe import load_recipe


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIC_REPA_STATISTICS", str(tmp_path / "statistics"))


def levels(split: str, size: int = 16) -> torch.Tensor:
    """The digits of a split, uint8 (N, 3, size, size)."""
    return (resize(load_digits(split)[0], size) * 255).round().byte().expand(-1, 3, -1, -1)


def all_of(images) -> torch.Tensor:
    return next(images.batches([range(len(images))]))


@pytest.mark.parametrize(
    ("name", "split"), [("digits", "held-out"), ("digits:held-out", "held-out"), ("digits:train", "train")]
)
def test_a_data_set_and_its_split_are_named(name, split):
    found = open_images(name)
    assert found.source == name
    assert (all_of(found).int() - levels(split).int()).abs().max() <= 1  # by way of [-1, 1] and back


def test_a_path_of_that_name_comes_first(tmp_path):
    write_tree(tmp_path / "digits:train", {"cat": 3})
    assert len(open_images("digits:train")) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "there is no folder, zip or tar digit, and no such data set; did you mean digits?"),
        ("digits:test", "unknown split 'test'"),
        ("prepared", "there is no folder, zip or tar prepared, and no such data set"),  # which needs a path
        ("data/digit", "there is no folder, zip or tar data/digit$"),
    ],
)
def test_what_is_no_such_data_set(name, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        open_images(name)


def test_a_data_set_of_one_size_is_cropped(monkeypatch):
    class Squares(torch.utils.data.Dataset):
        def __init__(self, split="train", size=12):
            if size != 12:
                raise UserError("squares are of 12 pixels")
            self.images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(-1, 3, 12, 12) * 40

        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"image": self.images[index], "label": torch.tensor(0)}

    monkeypatch.setitem(datasets._entries, "squares", Squares)
    assert open_images("squares").size() == (12, 12)
    cropped = all_of(open_images("squares", resize=6))
    assert torch.equal(cropped, Squares().images[..., :6, :6])


def test_in_a_recipe_a_data_set_is_of_the_size_that_is_trained_on():
    recipe = load_recipe("digits-urepa", ["data.size=20"])
    assert torch.allclose(all_of(real_images(recipe, "digits:train")).int(), levels("train", 20).int(), atol=1)
    assert real_images(recipe, "elsewhere.npz") == "elsewhere.npz"


def test_named_images_are_measured_and_their_features_cached(monkeypatch):
    samples, network = levels("train")[:200], DigitsNetwork()
    features = [network(images)["features"] for images in (samples, levels("held-out"))]
    expected = frechet_distance(*statistics(features[0]), *statistics(features[1]))
    found = Measure(["fd-digits"], "digits:held-out")([samples])
    assert found.values["fd-digits"] == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr("dic_repa.evaluation.measuring.extract", lambda *a, **k: pytest.fail("it is cached"))
    Measure(["fd-digits"], "digits:held-out")
