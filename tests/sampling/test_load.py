"""`dic_repa.load` and `.sample` give, as PIL images, what `dic-repa sample` writes."""

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import TINY
from PIL import Image

from dic_repa import DiC, load
from dic_repa.cli.sample import command
from dic_repa.errors import UserError
from dic_repa.recipe import load_recipe, to_yaml


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    recipe = load_recipe("digits-urepa", [*(option.removeprefix("--set=") for option in TINY), "sample.seed=3"])
    folder = tmp_path_factory.mktemp("load") / "checkpoint"
    model = DiC(width=8, depths=(1, 1, 1, 1, 1), in_channels=1, num_classes=10)
    for parameter in model.parameters():  # no zero gate hides the label
        parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder


def test_images_are_those_of_the_command(checkpoint, tmp_path):
    options = ["--classes", "3,7", "--num", "2", "--solver", "ab2", "--steps", "3", "--scale", "2"]
    result = CliRunner().invoke(command, [str(checkpoint), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    images = load(checkpoint).sample(classes=["3", 7], solver="ab2", steps=3, guidance=2)
    for i, image in enumerate(images):
        with Image.open(tmp_path / "out" / f"{i:06d}.png") as written:
            assert np.array_equal(np.array(image), np.array(written))
    assert not np.array_equal(np.array(images[0]), np.array(images[1]))


def test_classes_go_in_turn_and_a_seed_counts(checkpoint):
    loaded = load(checkpoint)
    first, again, other = (loaded.sample(num=2, steps=2, seed=seed, guidance={"scale": 1.0}) for seed in (1, 1, 2))
    named = loaded.sample(["0", "1"], steps=2, seed=1, guidance=1)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    assert [image.tobytes() for image in first] == [image.tobytes() for image in named]
    assert first[0].tobytes() != other[0].tobytes()
    assert (first[0].size, first[0].mode) == ((16, 16), "L")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": ["cat"]}, "unknown class 'cat'"),
        ({"classes": [11]}, "11"),
        ({"solver": "hein"}, "heun"),
        ({"steeps": 3}, "steeps"),
    ],
)
def test_what_does_not_fit_is_one_line(checkpoint, given, message):
    with pytest.raises(UserError, match=message):
        load(checkpoint).sample(**given)
