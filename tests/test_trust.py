"""A stranger's checkpoint, with each way to name code: refused in a line that names it, opened with --trust-code."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import yaml

from dic_repa import load
from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.trust import names_code

CODE = """
from pathlib import Path
Path(r"{canary}").write_text("ran")
from dic_repa.alignment import time_weights

@time_weights.register("theirs")
class Theirs:
    def __call__(self, t):
        return t
"""
# What a recipe.yaml that came with weights may say to have code run: keys as in --set, and their values.
WAYS = {
    "plugins": {"plugins": ["evil"]},
    "a module that holds the current folder": {"plugins": ["evil"], "folders": ["."]},
    "model": {"model.name": "evil:Net"},
    "block": {"model.options": {"block": "evil:Block"}},
    "encoder": {"alignments": [{"encoder": "os:system", "tap": "mid.0"}]},
    "encoder of a plugin": {"alignments": [{"encoder": "evil:Encoder", "tap": "mid.0"}]},
    "head": {"alignments": [{"encoder": "digits-vit", "tap": "mid.0", "head": "evil:Head"}]},
    "time weight": {"alignments": [{"encoder": "digits-vit", "tap": "mid.0", "time_weight": {"name": "evil:W"}}]},
    "data": {"data.name": "evil:Data"},
    "autoencoder": {"data.autoencoder": "evil:VAE"},
    "objective": {"objective.name": "evil:Loss"},
    "time sampling": {"objective.options": {"time": {"name": "evil:Times"}}},
    "optimizer": {"optimizer.name": "evil:Adam"},
    "schedule": {"schedule.name": "evil:Falling"},
    "tracker": {"train.trackers": ["evil:Log"]},
    "solver": {"sample.solver": "evil:step"},
    "diffusion": {"sample.solver": "euler_maruyama", "sample.diffusion": "subprocess:run"},
    "guidance": {"sample.guidance": {"scale": 2.0, "kind": "evil:Guidance"}},
    "metric": {"evaluate": {"metric": "evil:score"}},
    "letters of another script": {"model.name": "evil:Né"},
    "a name of no letters": {"model.name": "evil.\u2118:\u212e"},
}
VERBS = {
    "sample": ["sample", "theirs", "--num", "2"],
    "convert": ["convert", "theirs", "small"],
    "info": ["info", "theirs/recipe.yaml"],
    "train": ["train", "theirs/recipe.yaml", "--set", "train.steps=1"],
    "dry run": ["train", "theirs/recipe.yaml", "--dry-run"],
    "resume": ["train", "--resume", "theirs"],
    "probe": ["probe", "theirs"],
    "tune": ["tune", "theirs"],
    "evaluate": ["evaluate", "theirs"],
    "nearest": ["nearest", "theirs", "--reference", "digits"],
    "demo": ["demo", "theirs", "--port", "0"],
    "bench data": ["bench", "data", "theirs/recipe.yaml"],
}


@pytest.fixture
def canary(tmp_path, plugin_folder, monkeypatch):
    """A file that is there once `evil.py`, in the current folder, has been imported."""
    file = tmp_path / "canary"
    (plugin_folder / "evil.py").write_text(CODE.format(canary=file))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return file


@pytest.fixture
def theirs(canary, checkpoint, plugin_folder):
    """A stranger's checkpoint in the current folder, and a function that changes its recipe."""
    folder = plugin_folder / "theirs"
    shutil.copytree(checkpoint, folder)

    def change(keys: dict):
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        for key, value in keys.items():
            section, _, name = key.rpartition(".")
            (recipe[section] if section else recipe)[name] = value
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    return change


def refusal(mistake, canary, arguments: list[str]) -> str:
    before = list(sys.path)
    line = mistake(*arguments)
    assert "names code to run" in line, line
    assert "add --trust-code" in line
    assert not canary.exists()
    assert sys.path == before
    return line


@pytest.mark.parametrize("way", WAYS)
def test_code_is_refused_in_a_line_that_names_it(way, theirs, canary, mistake):
    theirs(WAYS[way])
    line = refusal(mistake, canary, VERBS["sample"])
    assert "theirs/recipe.yaml" in line
    assert ("evil" in line) != ("from Python" in line)
    assert ("evil.py" in line) == ("evil" in line)


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_it(verb, theirs, canary, mistake):
    theirs(WAYS["plugins"])
    refusal(mistake, canary, VERBS[verb])


def test_a_base_beside_the_weights(theirs, canary, mistake, plugin_folder):
    recipe = plugin_folder / "theirs/recipe.yaml"
    (recipe.parent / "more.yaml").write_text(recipe.read_text().replace("plugins: []", "plugins: [evil]"))
    recipe.write_text("base: more.yaml\n")
    refusal(mistake, canary, VERBS["sample"])


def test_config_and_data_records(theirs, canary, mistake, plugin_folder):
    (plugin_folder / "theirs/manifest.json").unlink()  # a stranger's fits what they send
    config = plugin_folder / "theirs/config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"block": "evil:Block"}))
    assert "config.json" in refusal(mistake, canary, VERBS["sample"])
    config.write_text(json.dumps(content))
    autoencoder = {"name": "evil:VAE", "channels": 1, "downsample": 1, "shift": [0.0], "scale": [1.0]}
    data = {"autoencoder": autoencoder, "class_names": list("0123456789")}
    (plugin_folder / "theirs/data.json").write_text(json.dumps(data))
    assert "data.json" in refusal(mistake, canary, VERBS["sample"])


def test_trusted_code_runs_after_a_line_that_names_it(theirs, canary, plugin_folder, capsys):
    theirs(WAYS["plugins"])
    (plugin_folder / "evil.py").rename(plugin_folder / "theirs/evil.py")  # as a stranger may send it
    with pytest.raises(SystemExit) as exit:
        main(["sample", "theirs", "--num", "2", "--trust-code"])
    said = capsys.readouterr().err
    assert exit.value.code == 0, said
    assert "trusted code of theirs/recipe.yaml: plugins evil (from " in said
    assert "theirs/evil.py)" in said
    assert canary.exists()
    assert (plugin_folder / "samples").is_dir() or any(plugin_folder.rglob("000001.png"))


def test_python_trusts_by_an_argument(theirs, canary):
    theirs(WAYS["plugins"])
    with pytest.raises(UserError, match="trust_code=True"):
        load("theirs")
    assert not canary.exists()
    assert load("theirs", trust_code=True).recipe.plugins == ["evil"]
    assert canary.exists()
    with pytest.raises(UserError, match="trust_code=True"):  # it was for that call alone
        load("theirs")


def test_a_recipe_that_the_user_names_is_the_users_own(theirs, canary, plugin_folder):
    text = (plugin_folder / "theirs/recipe.yaml").read_text().replace("plugins: []", "plugins: [evil]")
    assert "evil" in text
    (plugin_folder / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["info", "mine.yaml"])
    assert exit.value.code == 0
    assert canary.exists()


def test_reading_runs_nothing(theirs, canary, plugin_folder):
    theirs(WAYS["plugins"] | {"model.name": "evil:Net"})
    (plugin_folder / "run/checkpoints").mkdir(parents=True)
    shutil.copy(plugin_folder / "theirs/recipe.yaml", plugin_folder / "run")
    for verb in (["runs", "theirs"], ["verify", "run"], ["recipes", "show", "theirs/recipe.yaml"]):
        with pytest.raises(SystemExit) as exit:
            main(verb)
        assert exit.value.code == 0
    assert not canary.exists()


def test_names_of_a_family_are_no_code():
    """Where the family is one: `fdr:digits` is a metric of this package, and elsewhere a module of anybody's."""
    assert not names_code({"evaluate": {"metric": "fdr:digits", "also": ["fdr:lite2"], "best": "fdr:digits"}})
    assert names_code({"evaluate": {"metric": "evil:digits"}})
    assert names_code({"model": {"name": "fdr:digits"}})
