"""What the command line says to small mistakes, in this process: one line, before any work is done."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from dic_repa.cli import main
from dic_repa.cli.sample import parse_classes
from dic_repa.conditions import ClassLabels
from dic_repa.errors import UserError
from dic_repa.files.atomic import write_aside
from dic_repa.files.pictures import save_png
from dic_repa.models import DiC
from dic_repa.recipe import load_recipe, to_yaml


@pytest.mark.parametrize("group", [[], ["bench"]])
def test_a_group_alone_prints_its_help(group, capsys):
    with pytest.raises(SystemExit) as exit:
        main(group)
    said = capsys.readouterr()
    assert exit.value.code == 0
    assert said.err == ""
    assert "\nVerbs:\n" in said.out


def test_unknown_verbs_of_groups(mistake):
    assert mistake("bench", "modl").endswith("unknown bench verb 'modl'; did you mean model?")
    assert mistake("recipes", "digits").endswith("; known: diff, explain, show")
    assert mistake("encoders", "dinov2-vit-b").endswith("; known: check")
    assert mistake("solvers", "heun").endswith("; known: compare")


def test_a_metric_without_its_reference_is_told_before_training(mistake, tmp_path):
    said = mistake("train", "digits-baseline", "--set=evaluate.also=[fid]", "--set=train.steps=1")
    assert "fid compares with real images: give a reference (--reference, or evaluate.reference" in said
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_is_told_before_the_work(mistake, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "recipe.yaml").write_text(to_yaml(load_recipe("digits-baseline")))
    for command in (
        ["report", "runs", "--out", "folder"],
        ["solvers", "compare", "nowhere", "--out", "folder"],
        ["evaluate", "nowhere", "--reference", "digits", "--out", "folder"],
        ["evaluate", "nowhere", "--reference", "digits", "--save-statistics", "folder"],
    ):
        assert mistake(*command) == "error: folder is a folder; name a file"
    for command in (["probe", "nowhere", "--out"], ["tune", "nowhere", "--out"], ["prepare", "nowhere"]):
        assert mistake(*command, "file") == "error: file is a file; name a folder"
        assert mistake(*command, "file/x") == "error: file/x cannot be written: file is a file"
    assert (tmp_path / "folder" / "precious").exists()


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("")
    with pytest.raises(UserError, match="is a folder; name a file"), write_aside(tmp_path / "folder") as aside:
        aside.write_text("")
    assert [file.name for file in tmp_path.rglob("*")] == ["folder", "precious"]


def test_an_autoencoder_that_is_not_here_is_told_without_a_warning(mistake, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("a.png,0\n")
    assert "cannot be fetched from the hub" in mistake("prepare", tmp_path, "out", "--autoencoder=someone/vae")
    assert not [warning for warning in recwarn if "local_dir_use_symlinks" in str(warning.message)]


def test_classes_by_number_and_by_name():
    names = ("cat", "dog", "0-1", "7", "tench, Tinca tinca")
    for text, classes in (
        ("1", [1]),
        ("0-2,4", [0, 1, 2, 4]),
        ("dog, cat", [1, 0]),
        ("none", [5]),
        ("tench, Tinca tinca", [4]),
        ("0-1", [0, 1]),
    ):
        assert parse_classes(text, ClassLabels(5, names)) == classes
    for text, said in (("dgo", "did you mean dog"), ("7", "the classes 0 to 4"), ("2-1", "numbers and ranges")):
        with pytest.raises(UserError, match=said):
            parse_classes(text, ClassLabels(5, names))
    with pytest.raises(UserError, match="not 'x'"):
        parse_classes("x", ClassLabels(2))


def test_counts_out_of_range(mistake, tmp_path):
    assert "takes whole numbers from 1" in mistake("solvers", "compare", "run", "--evaluations", "0")
    said = mistake("train", "digits-baseline", "--set=sample.num=1000000000000")
    assert "sample.num: it is 1,000,000,000,000, over the limit of 10,000,000" in said


def test_what_is_no_recipe(mistake, tmp_path):
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").write_text(to_yaml(load_recipe("digits-baseline")))
    (tmp_path / "README.md").write_text("")
    assert mistake("train", "runs/mine").endswith("runs/mine is a run; name its recipe, runs/mine/recipe.yaml")
    assert "README.md is not a recipe: name a file that ends in .yaml" in mistake("train", "README.md")


def test_what_is_no_run(mistake, tmp_path):
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").write_text(to_yaml(load_recipe("digits-baseline")))
    for verb in ("sample", "report", "ema"):
        assert mistake(verb, "runs").endswith("; did you mean runs/mine?")
        assert mistake(verb, "runs/mine/checkpoints").endswith("; did you mean runs/mine?")
    for verb in (["sample"], ["report"], ["ema"], ["tune"], ["probe"], ["evaluate"], ["evaluate", "--metrics", "fid"]):
        assert mistake(*verb, "mine").endswith("; did you mean runs/mine?")
    for name in ("mien", "runs/mien"):
        assert mistake("sample", name).endswith(f"there is no run or checkpoint folder {name}; did you mean runs/mine?")
    assert mistake("convert", "mine", "small").endswith("; did you mean runs/mine?")
    assert mistake("sample", "yours").endswith("there is no run or checkpoint folder yours")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_bytes(b"")
    (tmp_path / "one" / "config.json").write_text("{}")
    assert mistake("sample", "one/model.safetensors").endswith("is a file; name its folder, one")
    assert "`dic-repa convert` makes a folder of" in mistake("sample", "two/model.safetensors")
    assert "is not a run, so it is not overwritten" in mistake("train", "digits-baseline", "--out", "two")


def test_an_interrupt_while_sampling_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    DiC(8, (1, 1, 1, 1, 1), in_channels=1, num_classes=10).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "recipe.yaml").write_text(to_yaml(load_recipe("digits-baseline", ["sample.steps=1"])))
    arguments = ["sample", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--num", "4", "--batch-size", "2"]

    def interrupted(folder, *_):
        save_png(torch.zeros(1, 16, 16), folder.file(0))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dic_repa.sampling.folder.fill", interrupted)
        with pytest.raises(SystemExit) as exit:
            main(arguments)
    assert exit.value.code == 130
    assert f"1 of 4 images are in {tmp_path / 'out'}, and the same command goes on" in capsys.readouterr().err
    for _ in range(2):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0
    assert "sampling" not in capsys.readouterr().out.splitlines()[-1]  # the second time there is nothing to do
    assert len(list((tmp_path / "out").glob("0*.png"))) == 4


def test_a_run_without_a_judge_is_told_before_any_is_sampled(mistake, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text(to_yaml(load_recipe("digits-baseline", ["evaluate=null"])))
    assert "has no `evaluate` section to say how to judge it; give a --reference" in mistake("evaluate", "mine")
