"""Plugins and data beside a recipe: found from another current folder, by the run too when it is resumed or sampled."""

from __future__ import annotations

import json

import pytest
from own_encoder import ENCODER
from pictures import write_tree
from small_runs import SMALL

from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.recipe import load_recipe
from dic_repa.trust import trusting_code

RECIPE = """
base: digits-urepa
plugins: [my_encoder]
data: {name: images, path: photos, size: 16, options: {unlabelled: true}}
alignments:
  - {encoder: my-patches, tap: mid.0, head_options: {hidden: 16}}
"""
OPTIONS = [f"--set={key}" for key in SMALL if key not in ("alignments=[]", "train.steps=8")]


@pytest.fixture
def project(tmp_path):
    """A folder with a recipe, its plugin and its data."""
    folder = tmp_path / "project"
    write_tree(folder / "photos", {"night": 4, "day": 4}, size=(16, 16))
    (folder / "my_encoder.py").write_text(ENCODER)
    (folder / "mine.yaml").write_text(RECIPE)
    return folder


@pytest.mark.slow
def test_what_is_beside_the_recipe_is_found(project, plugin_folder, dic_repa, here, tmp_path):
    here("train", "project/mine.yaml", *OPTIONS, "--set=train.steps=2")
    assert load_recipe(tmp_path / "runs/mine/recipe.yaml", only_read=True).folders == [str(project)]
    assert "path: photos\n" in (tmp_path / "runs/mine/recipe.yaml").read_text()  # as it was written
    dic_repa("train", "--resume", "runs/mine", "--set=train.steps=4", "--trust-code")
    assert json.loads((tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


@pytest.mark.slow
def test_a_run_finds_again_what_was_in_the_current_folder(project, plugin_folder, dic_repa, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit) as exit:
        main(["train", "mine.yaml", *OPTIONS, "--set=train.steps=2"])
    assert exit.value.code == 0
    dic_repa("sample", "project/runs/mine", "--num=2", "--steps=1", "--trust-code")


def test_only_folders_that_hold_what_is_missing_are_noted(project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("base: project/mine.yaml\ntrain.steps: 3\n")
    for recipe in ("project/mine.yaml", "other.yaml"):
        loaded = load_recipe(recipe)
        assert loaded.folders == [str(project)]
        assert loaded.data.place == str(project / "photos")
    assert load_recipe("digits-urepa").folders == []
    (tmp_path / "photos").mkdir()
    (tmp_path / "my_encoder.py").write_text("")
    loaded = load_recipe("project/mine.yaml")  # the current folder goes first
    assert (loaded.folders, loaded.data.place) == ([], "photos")


def test_code_that_came_with_weights_is_not_looked_for(project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (project / "mine.yaml").rename(project / "recipe.yaml")
    assert load_recipe("project/recipe.yaml").folders == [str(project)]
    (project / "config.json").write_text("{}")
    assert load_recipe("project/recipe.yaml", only_read=True).folders == []
    with pytest.raises(UserError, match=r"plugins my_encoder \(from .*project/my_encoder.py\).*--trust-code"):
        load_recipe("project/recipe.yaml")
    with trusting_code():
        assert load_recipe("project/recipe.yaml").folders == [str(project)]
