"""Recipes that are wrong on purpose or by accident: one line, at once, and nothing taken in another sense."""

from __future__ import annotations

import time

import pytest

from dic_repa.errors import UserError
from dic_repa.limits import ENVIRONMENT
from dic_repa.recipe import Recipe, load_recipe, to_yaml, validate

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]" for i in range(1, 12)]
)
CHAIN = "\n".join(["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 99)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: 1}\nmodel: {}\ntrain: {seed: 1}\n", "in line 3: the key 'train' is given in line 1 already"),
        ("train: {steps: 1, seed: 2, steps: 3}", "in line 1: the key 'steps' is given in line 1 already"),
        ("train: &a {b: *a}", r"the alias \*a stands for nothing, or for what it is in"),
        ("train: [*nowhere]", r"the alias \*nowhere stands for nothing"),
        (BOMB, "the number of its values, with what aliases stand for, is .*values="),
        (CHAIN, "the depth of its nesting is 100, over the limit of 50"),
        ("a: " + "[" * 500 + "]" * 500, "the depth of its nesting is 501, over the limit of 50"),
        ("train: {steps: " + "9" * 5000 + "}", "cannot be read"),
        ("train: {seed: " + "9" * 30 + "}", "more than 18 digits"),
        ("train: {steps: !!int ''}", "cannot be read"),
        ("description: !!binary aGVsbG8=", "could not determine a constructor"),
        ('description: "\\e[31mred"', r"in line 1: a text has the character '\\x1b'"),
        ('data: {path: "a\\0b"}', r"in line 1: a text has the character '\\x00'"),
        ("train: {steps: 1:30}", "train.steps should be a valid integer, not '1:30'"),
        ("train: {steps: yes}", "train.steps should be a valid integer, not True"),
        ("optimizer: {learning_rate: on}", "optimizer.learning_rate should be a valid number, not True"),
        ("train: {steps: 2001-13-45}", "train.steps should be a valid integer, not '2001-13-45'"),
        ("train: {steps: 1e20}", "train.steps: it is over 10.15, over the limit of 1,000,000,000,000"),
        ("data: {workers: 10000}", "data.workers: it is 10,000, over the limit of 256; .*--limit workers=10000"),
        ("data: {size: 1000000000}", "data.size: it is 1,000,000,000, over the limit of 16,384"),
        ("model: {depths: [100000, 1, 1, 1, 1]}", "model.depths.0: it is 100,000, over the limit of 300"),
        ("alignments: [" + "{encoder: a}, " * 100 + "]", "alignments: it is 100, over the limit of 64"),
        ("sample: {num: 1e9}", "sample.num: it is 1,000,000,000, over the limit of 10,000,000"),
        ("sample: {steps: 1e6}", "sample.steps: it is 1,000,000, over the limit of 10,000"),
        ("train: {batch_size: 1e9}", "train.batch_size: it is 1,000,000,000, over the limit of 1,000,000"),
        ("optimizer: adam\ntrain: {learning_rate: 1e-3}", "optimizer should be a valid dictionary"),
        ("optimizer: {learning_rate: 1}\ntrain: {learning_rate: 2}", "unknown key 'train.learning_rate'"),
        ("paper: {row: x, results: {FID: yes}}", "paper.results.FID should be a valid number"),
        ("\n".join(f"key{i}: 1" for i in range(3000)), "and 2995 more mistakes"),
    ],
)
def test_one_line(text, said, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text + "\n")
    begin = time.perf_counter()
    with pytest.raises(UserError, match=said) as caught:
        load_recipe(file)
    assert time.perf_counter() - begin < 8  # of a busy machine
    assert str(file) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1300


def test_a_limit_is_lifted(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("data: {workers: 300}\n")
    monkeypatch.setenv(ENVIRONMENT, "workers=300")
    assert load_recipe(tmp_path / "mine.yaml").data.workers == 300


def test_the_list_of_limits_holds_in_python_too():
    recipe = Recipe()
    with pytest.raises(UserError, match="workers: it is 10,000, over the limit of 256"):
        recipe.data.workers = 10_000
    with pytest.raises(UserError, match="over the limit"):
        validate({"train": {"steps": 10**400}})


def test_bases_in_a_chain_and_in_a_ring(tmp_path):
    for i in range(100):
        (tmp_path / f"r{i}.yaml").write_text(f"base: r{i + 1}.yaml\n")
    with pytest.raises(UserError, match="the number of recipes that it is based on is 33, over the limit of 32"):
        load_recipe(tmp_path / "r0.yaml")
    (tmp_path / "r2.yaml").write_text("base: r0.yaml\n")
    with pytest.raises(UserError, match="name each other as their base"):
        load_recipe(tmp_path / "r0.yaml")


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "mine.yaml").open("wb") as file:
        file.truncate(10**12)  # sparse: it takes no space
    with pytest.raises(UserError, match="its length is 1,000,000,000,000, over the limit of 1,000,000"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize("key", ["alignments.².tap=x", "alignments." + "9" * 5000 + ".tap=x", "a." * 5000 + "b=1", ""])
def test_keys_that_are_none(key):
    with pytest.raises(UserError):
        load_recipe("digits-urepa", [key])


def test_text_that_looks_like_a_number_survives_a_round_trip(tmp_path):
    texts = ["1:30", "010", "0x1F", "2001-01-01", "1e3", "yes", "null", "0b11", "1_0", ".5", "0o7"]
    recipe = Recipe(description="1:30", plugins=texts)
    (tmp_path / "mine.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "mine.yaml") == recipe
