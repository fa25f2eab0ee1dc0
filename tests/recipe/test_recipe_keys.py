"""What a recipe's keys mean and take, which one is meant by another name, and numbers as people write them."""

from __future__ import annotations

import pytest
import yaml

from dic_repa.errors import UserError
from dic_repa.recipe import Recipe, SamplingRecipe, list_recipes, load_recipe
from dic_repa.recipe.keys import _ELSEWHERE, commented_yaml, find_keys, list_keys


def test_every_key_is_described():
    for schema in (Recipe, SamplingRecipe):
        assert [key.name for key in list_keys(schema).values() if not key.description] == []
    assert set(_ELSEWHERE) <= set(list_keys(Recipe))


def test_recipes_with_comments_are_the_same_recipes(tmp_path):
    for name in list_recipes():
        recipe = load_recipe(name)
        (tmp_path / "again.yaml").write_text(commented_yaml(recipe))
        assert load_recipe(tmp_path / "again.yaml") == recipe
    text = commented_yaml(load_recipe("digits-urepa"))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    for key, comment in (
        ("  ema_decay: 0.99", "  # decay of the averaged weights that are sampled from (default: 0.9999)"),
        (
            "- encoder: digits-vit",
            "  # the frozen encoder whose tokens are the targets; null: a teacher (default: null)",
        ),
    ):
        assert lines[lines.index(key) - 1] == comment


def test_explain(here, mistake):
    said = here("recipes", "explain", "alignments.tap")
    assert said.splitlines()[0] == "alignments.N.tap"
    assert "default: mid.0" in said
    assert "one of no, bf16, fp16; default: no" in here("recipes", "explain", "train.precision")
    everything = here("recipes", "explain")
    assert [line for line in everything.splitlines() if line[0] != " "] == list(list_keys(Recipe))
    assert "did you mean train.ema_decay" in mistake("recipes", "explain", "train.ema_decy")
    assert "did you mean optimizer.learning_rate?" in mistake("recipes", "explain", "lr")
    shown = here("recipes", "show", "digits-cfg", "--comments")
    assert yaml.safe_load(shown)["sample"]["guidance"]["scale"] == 1.8
    assert "# towards the class; null: none" in shown


def test_explained_types():
    keys = list_keys(Recipe)
    for name, takes in (
        ("train.steps", "whole number from 1"),
        ("train.label_dropout", "number from 0 to 1"),
        ("optimizer.betas", "list of 2: number from 0 below 1"),
        ("sample.rtol", "number above 0, or null"),
        ("sample.num", "whole number from 1"),
        ("alignments.N.target", "a name, or a mapping of name and arguments"),
        ("alignments", "list of sections"),
        ("model", "section"),
    ):
        assert keys[name].takes == takes
    assert [key.name for key in find_keys(Recipe, "sample.grid")][1:] == [
        f"sample.grid.{name}" for name in ("name", "options", "times")
    ]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("train.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("train.bs", "train.batch_size"),
        ("train.batch", "train.batch_size"),
        ("train.epochs", "train.steps"),
        ("train.max_steps", "train.steps"),
        ("train.num-steps", "train.steps"),
        ("train.iterations", "train.steps"),
        ("train.wd", "optimizer.weight_decay"),
        ("train.ema", "train.ema_decay"),
        ("train.mixed_precision", "train.precision"),
        ("train.amp", "train.precision"),
        ("train.grad_clip", "train.gradient_clip"),
        ("train.max_grad_norm", "train.gradient_clip"),
        ("train.num_workers", "data.workers"),
        ("train.workers", "data.workers"),
        ("sample.cfg", "sample.guidance.scale"),
        ("sample.cfg_scale", "sample.guidance.scale"),
        ("sample.scale", "sample.guidance.scale"),
        ("sample.num_steps", "sample.steps"),
        ("sample.sampler", "sample.solver"),
        ("data.root", "data.path"),
        ("data.image_size", "data.size"),
        ("latent.normalize", "latent.normalise"),
        ("data.scaling_factor", "latent.normalise"),
        ("data.resolution", "data.size"),
        ("alignments.0.proj_coeff", "alignments.N.weight"),
        ("num_steps", "train.steps or sample.steps"),
        ("seed", "train.seed or sample.seed"),
    ],
)
def test_what_other_tools_call_it(theirs, ours, tmp_path):
    said = rf"unknown key '{theirs}'; did you mean {ours}\?$"
    with pytest.raises(UserError, match=said):
        load_recipe("digits-urepa", [f"{theirs}=1"])
    (tmp_path / "mine.yaml").write_text(f"base: digits-urepa\n{theirs}: 1\n")
    with pytest.raises(UserError, match=said):
        load_recipe(tmp_path / "mine.yaml")


def test_numbers_as_people_write_them(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "base: digits-baseline\n"
        "train: {steps: 1e3, batch_size: 1.28e2, log_every: 1_0, seed: '1e2', ema_decay: 9e-1}\n"
        "optimizer: {learning_rate: 1e-4}\n"
        "sample: {num: 5E4, rtol: 1.e-6}\n"
        "model: {options: {groups: 1e1}}\n"
        "description: '1e3'\n"
    )
    recipe = load_recipe(tmp_path / "mine.yaml", ["train.checkpoint_every=2.5e2", "train.max_skipped=1_000"])
    train = recipe.train
    assert (train.steps, train.batch_size, train.log_every, train.seed) == (1000, 128, 10, 100)
    assert (train.checkpoint_every, train.max_skipped, recipe.sample.num) == (250, 1000, 50_000)
    assert (recipe.optimizer.learning_rate, train.ema_decay, recipe.sample.rtol) == (1e-4, 0.9, 1e-6)
    assert isinstance(recipe.model.options["groups"], int)
    assert recipe.description == "1e3"
    assert load_recipe("digits-baseline", ["train.steps=1e3"]).train.steps == 1000
    for override in (
        "train.steps=1.5",
        "train.steps=1e-1",
        "train.steps=true",
        "train.steps=2e400",
        "data.workers=true",
    ):
        with pytest.raises(UserError, match="should be a valid integer"):
            load_recipe("digits-baseline", [override])
    for override in ("optimizer.learning_rate=true", "optimizer.learning_rate=fast"):
        with pytest.raises(UserError, match=r"optimizer\.learning_rate should be a valid number"):
            load_recipe("digits-baseline", [override])


def test_what_python_assigns_is_looked_at():
    recipe = load_recipe("digits-urepa")
    before = recipe.model_copy(deep=True)
    for section, key, value, said in (
        (recipe.train, "steps", "abc", "steps should be a valid integer"),
        (recipe.train, "micro_batch", 5, "batch_size 64 is not a multiple of micro_batch 5"),
        (recipe.optimizer, "lr", 1e-4, "unknown key 'lr'; did you mean optimizer.learning_rate"),
        (recipe.sample, "guidance", {"scale": -1}, "guidance.scale should be greater than or equal to 0"),
        (recipe.alignments[0], "weight", None, "weight should be a valid number"),
        (recipe, "model", 3, "model should be a valid dictionary"),
    ):
        with pytest.raises(UserError, match=said):
            setattr(section, key, value)
    assert recipe == before
    recipe.train.steps, recipe.train.micro_batch, recipe.sample.guidance = "1e3", 16, {"scale": 2}
    assert (recipe.train.steps, recipe.train.micro_batch, recipe.sample.guidance.scale) == (1000, 16, 2.0)
    assert load_recipe("digits-urepa", ["train.steps=1e3"]).train.steps == recipe.train.steps
