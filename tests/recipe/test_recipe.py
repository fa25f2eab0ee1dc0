"""Recipes: inheritance, overrides, and a clear line for each mistake."""

from __future__ import annotations

import pytest
import yaml

from dic_repa.errors import UserError
from dic_repa.recipe import SamplingRecipe, list_recipes, load_recipe, load_training_recipe, to_yaml


def test_shipped_recipes_load_and_survive_a_round_trip(tmp_path):
    for name, description in list_recipes().items():
        recipe = load_recipe(name)
        assert description
        (tmp_path / "again.yaml").write_text(to_yaml(recipe))
        assert load_recipe(tmp_path / "again.yaml") == recipe


def test_baseline_is_the_same_without_alignment():
    aligned, baseline = load_recipe("digits-urepa"), load_recipe("digits-baseline")
    assert aligned.alignments
    assert not baseline.alignments
    assert aligned.model_dump(exclude={"alignments", "description"}) == baseline.model_dump(
        exclude={"alignments", "description"}
    )


def test_base_beside_the_file_and_deep_merge(tmp_path):
    (tmp_path / "one.yaml").write_text("base: digits-urepa\ntrain: {steps: 7}\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\noptimizer: {learning_rate: 0.5}\n")
    recipe = load_recipe(tmp_path / "two.yaml")
    assert recipe.train.steps == 7
    assert recipe.optimizer.learning_rate == 0.5
    assert recipe.train.batch_size == load_recipe("digits-urepa").train.batch_size


def test_another_model_inherits_no_keys_of_the_base_s(tmp_path):
    for text in ("model: {name: SiT-S/2}", "model.name: SiT-S/2", "model: {name: 'mine:Net', options: {blocks: 3}}"):
        (tmp_path / "other.yaml").write_text(f"base: digits-urepa\n{text}\n")
        other = load_recipe(tmp_path / "other.yaml").model
        assert (other.width, other.depths, other.time_scale) == (None, None, 1.0)
    assert other.options == {"blocks": 3}
    (tmp_path / "larger.yaml").write_text("base: digits-ddpm\nmodel: {name: DiC-S}\n")
    assert load_recipe(tmp_path / "larger.yaml").model.learn_sigma  # of the same family: all the rest stays


def test_overrides():
    recipe = load_recipe(
        "digits-urepa",
        [
            "train.steps=200",
            "optimizer.learning_rate=1e-3",
            "alignments.0.weight=2",
            "sample.guidance.scale=3",
            "plugins=[a]",
        ],
    )
    assert recipe.train.steps == 200
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.alignments[0].weight == 2
    assert recipe.sample.guidance.scale == 3
    assert recipe.plugins == ["a"]
    assert load_recipe("digits-urepa", ["alignments=[]"]).alignments == []
    assert load_recipe("digits-urepa", ["train.precision=no"]).train.precision == "no"  # YAML's false
    assert isinstance(load_recipe("digits-cfg"), SamplingRecipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=1", "unknown key 'train.stepz'; did you mean steps?"),
        ("trian.steps=1", "unknown key 'trian'; did you mean train?"),
        ("alignments.0.tapp=x", "unknown key 'alignments.0.tapp'; did you mean tap?"),
        ("sample.guidance.intervl=1", "did you mean interval"),
        ("train.steps=0", "train.steps should be greater than or equal to 1, not 0"),
        ("train.steps=many", "train.steps should be a valid integer"),
        ("train.precision=fp8", "train.precision should be 'no', 'bf16' or 'fp16', not 'fp8'"),
        ("train.label_dropout=1.5", "train.label_dropout should be less than or equal to 1, not 1.5"),
        ("optimizer.betas=[1.0, 0.9]", "optimizer.betas.0 should be less than 1, not 1"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate should be a finite number"),
        ("train.micro_batch=5", "batch_size 64 is not a multiple of micro_batch 5"),
        ("sample.guidance.interval=[0.7, 0.2]", "interval must rise"),
        ("sample.guidance.interval=[0, 2]", "sample.guidance.interval.1 should be less than or equal to 1, not 2"),
        ("model.depths=[1, 2]", "model.depths: takes an odd number of stages, such as [6, 5, 6]"),
        ("model=3", "model should be"),
        ("alignments.4.tap=x", "there is no entry '4'; there are 1, counted from 0"),
        ("train.steps.x=1", "'train.steps' has no keys of its own"),
        ("train.steps", "--set takes key=value"),
        ("train.steps={", "is not valid YAML"),
    ],
)
def test_mistakes_name_the_key_and_what_it_takes(override, message):
    with pytest.raises(UserError) as error:
        load_recipe("digits-urepa", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(UserError, match="did you mean digits-urepa"):
        load_recipe("digits-urep")
    with pytest.raises(UserError, match="there is no recipe file"):
        load_recipe("nowhere.yaml")
    file = tmp_path / "broken.yaml"
    file.write_text("train: {steps: [1\n")
    with pytest.raises(UserError, match="not valid YAML in line 2"):
        load_recipe(file)
    file.write_text("just words")
    with pytest.raises(UserError, match="must be a mapping"):
        load_recipe(file)
    file.write_text(f"base: {file}\n")
    with pytest.raises(UserError, match="name each other as their base"):
        load_recipe(file)
    with pytest.raises(UserError, match="is a sampling recipe; use it on a finished run: dic-repa sample RUN"):
        load_training_recipe("digits-cfg")


def test_yaml_tags_construct_nothing(tmp_path):
    file = tmp_path / "evil.yaml"
    file.write_text(f"description: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(file)
    assert not (tmp_path / "made").exists()


def test_resolved_recipe_is_plain_yaml():
    raw = yaml.safe_load(to_yaml(load_recipe("digits-urepa")))
    assert raw["model"]["width"] == load_recipe("digits-urepa").model.width
    assert set(raw) >= {"model", "data", "objective", "alignments", "train", "sample", "evaluate"}
