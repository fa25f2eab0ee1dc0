"""The model card: huggingface_hub reads what was measured out of it, and names of strangers are only text in it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt
from small_samplers import RECIPE, write_tiny_checkpoint

import dic_repa
from dic_repa.conditions import class_labels, create_condition
from dic_repa.data.autoencoders import AutoencoderSpec
from dic_repa.data.saved import SavedData
from dic_repa.errors import UserError
from dic_repa.publish import write_repository
from dic_repa.publish.card import plain
from dic_repa.publish.paths import without_paths
from dic_repa.recipe import to_yaml
from dic_repa.recipe.build import build_denoiser
from dic_repa.sampling.load import load

NASTY = "</td><script>x()</script> [a](http://b) |`c`| *d* www.e.com <img src=x> # f\n# g\n---\nh: i $$j$$ ![k](l)"
SAMPLED = {"solver": "euler", "steps": 3, "num": 50, "seed": 4, "guidance": {"scale": 2.5, "interval": [0.1, 0.6]}}


@pytest.fixture
def folder(tmp_path):
    """An inference checkpoint that was published once, so that it has scores."""
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    scored = {"metrics": {"fid": 12.3456789, "own": 0.5}, "real": {"fid": 1.5}, "num": 50, "reference": "emoji:train"}
    scores = {"step": 700, "weights": "ema", "scored": [scored | {"sample": SAMPLED, "evaluations": 5}]}
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


def card_of(folder: Path, **options) -> ModelCard:
    written = write_repository(load(folder), folder.parent / "out", "some-one/tiny", **options)
    return ModelCard.load(written / "README.md")


def test_metadata(folder):
    data = card_of(folder, license="cc-by-4.0").data
    assert metadata_load(folder.parent / "out/README.md") == data.to_dict()
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "cc-by-4.0",
        "dic-repa",
        "unconditional-image-generation",
    )
    assert data.datasets == ["ylecun/mnist"]
    assert {"dic-repa", "dic", "flow-matching", "u-repa"} <= set(data.tags)
    assert data.model_name == "tiny"
    fid, own = data.eval_results
    assert (fid.metric_type, fid.metric_name, fid.metric_value) == ("fid", "FID", 12.345679)
    assert (own.metric_type, own.metric_value) == ("own", 0.5)
    assert (fid.dataset_type, fid.dataset_split, fid.dataset_name) == ("emoji", "train", "emoji:train")
    told = {"num": 50, "solver": "euler", "steps": 3, "seed": 4, "weights": "ema", "classes": "balanced"}
    assert told.items() <= fid.metric_args.items()
    assert fid.metric_args["guidance"] == {"kind": "cfg", "scale": 2.5, "interval": [0.1, 0.6]}


def test_page(folder):
    text = card_of(folder).text
    assert "700 of 1000, of 64 images each" in text
    assert "Training stopped at step 700 of 1000." in text
    assert "digits-vit (licence of its weights: Apache-2.0) at mid.0" in text
    assert "| FID (lower is better) | 12.35 | 1.5 |" in text
    assert "50 samples (solver euler, steps 3, classes balanced, seed 4" in text
    assert "guidance kind cfg scale 2.5 interval [0.1, 0.6]), compared with emoji:train" in text.replace("\\", "")
    assert "has not said under which licence" in text
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1].replace("some-one/tiny", str(folder))
    names: dict = {}
    exec(code, names)
    assert [image.size for image in names["images"]] == [(16, 16)] * 2


def test_without_scores(tmp_path):
    card = card_of(write_tiny_checkpoint(tmp_path / "tiny"))
    assert not {"model-index", "model_name", "license"} & set(card.data.to_dict())
    assert "None were recorded for these weights." in card.text
    assert not (tmp_path / "out/scores.json").exists()


def gone(*_):
    raise UserError("it is gone")


@pytest.mark.parametrize(("kind", "says"), [("none", "no condition"), ("vector", "vectors of 3 numbers")])
def test_of_other_conditions(kind, says, tmp_path):
    condition = create_condition(condition={"kind": kind} | ({"dim": 3, "null": "zeros"} if kind == "vector" else {}))
    saved = condition.with_examples(torch.rand(2, 3), ["a", "b"]) if kind == "vector" else condition
    folder = tmp_path / "tiny"
    build_denoiser(RECIPE.model, 1, condition).save_pretrained(folder)
    (folder / "recipe.yaml").write_text(to_yaml(RECIPE))
    SavedData(None, saved).write(folder)
    text = card_of(folder).text
    assert f"images of 16x16 pixels ({says})" in text
    assert ".sample(num=10, seed=0)" in text
    assert (tmp_path / "out/grid.png").is_file()


def test_behind_an_autoencoder_that_is_elsewhere(tmp_path, capsys, monkeypatch):
    """Its place on this machine stays here; the name of its folder helps whoever looks for it."""
    monkeypatch.setattr("dic_repa.recipe.build.load_autoencoder", gone)
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    spec = AutoencoderSpec(str(tmp_path / "my-vae"), 1, 8, (0.0,), (1.0,))
    SavedData(spec, class_labels(10)).write(folder)
    text = card_of(folder).text
    assert "warning: no grid of samples: the model was trained behind the autoencoder" in capsys.readouterr().err
    assert "images of 128x128 pixels" in text
    assert "latents of the autoencoder my-vae" in text
    assert "grid.png" not in text
    assert str(tmp_path) not in (tmp_path / "out/data.json").read_text()
    assert SavedData.read(tmp_path / "out").autoencoder == replace(spec, name="my-vae")
    lacks = "The autoencoder {} is not in this repository"
    assert lacks.format("my-vae") in text
    SavedData(replace(spec, name="lite-vae"), class_labels(10)).write(folder)
    assert lacks.format("lite-vae") not in card_of(folder, overwrite=True).text  # it comes with the package


def test_code_of_ones_own(plugin_folder, monkeypatch):
    """The card says that the recipe names code; the code itself stays here."""
    Path("own_part.py").write_text("")
    folder = write_tiny_checkpoint(plugin_folder / "tiny")
    recipe = RECIPE.model_copy(deep=True)
    recipe.plugins = ["own_part"]
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    with pytest.raises(UserError, match="names code to run"):
        dic_repa.push(folder, "some-one/tiny", dry_run=True)
    written = Path(dic_repa.push(folder, "some-one/tiny", dry_run=True, trust_code=True))
    text = (written / "README.md").read_text()
    assert 'load("some-one/tiny", trust_code=True)' in text
    assert "dic-repa sample some-one/tiny --num 10 --trust-code" in text
    assert "Its recipe names code that is not in this repository" in text
    assert not list(written.glob("*.py"))


def test_names_of_strangers_are_only_text(folder):
    recipe = RECIPE.model_copy(deep=True)
    recipe.description = NASTY
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    SavedData(None, class_labels(10, [NASTY, *map(str, range(9))])).write(folder)
    scores = json.loads((folder / "scores.json").read_text())
    scores["scored"][0] |= {"reference": NASTY, "metrics": {NASTY: 1.0}, "notes": [NASTY]}
    (folder / "scores.json").write_text(json.dumps(scores))
    nasty = card_of(folder)
    assert nasty.data.eval_results[0].dataset_name == NASTY  # YAML's quotes hold it
    assert re.fullmatch(r"[\w.-]+", nasty.data.eval_results[0].dataset_type)

    def structure(text: str) -> list[str]:
        renderer = MarkdownIt("commonmark", {"html": True}).enable("table")
        tokens = [inner for token in renderer.parse(text) for inner in [token, *(token.children or [])]]
        return [f"{token.type} {token.attrs}" for token in tokens if token.type not in ("text", "text_special")]

    scores["scored"][0] |= {"reference": "a", "metrics": {"b": 1.0}, "notes": ["c"]}
    (folder / "scores.json").write_text(json.dumps(scores))
    recipe.description = "d"
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    harmless = card_of(folder, overwrite=True)
    assert structure(nasty.text) == structure(harmless.text)
    assert any(line.startswith("link_open {'href': 'https://arxiv.org") for line in structure(nasty.text))
    assert "classes=[0, 1]" in nasty.text


def test_plain_text_is_what_it_was():
    for text in (NASTY, "a_b*c*", "1. x", "<b>&amp;</b>", "`", "\\", "a | b"):
        (paragraph,) = [t for t in MarkdownIt("commonmark").parse(f"x {plain(text)}") if t.type == "inline"]
        assert "".join(child.content for child in paragraph.children) == f"x {' '.join(text.split())}"


@pytest.mark.parametrize(
    ("path", "public"),
    [
        ("/home/someone/data/cats", "cats"),
        ("/home/someone/vae/", "vae"),
        ("/someone", "private"),
        ("~/cats.zip", "private"),
        ("../../mine/cats", "cats"),
        (r"C:\Users\someone\cats", "cats"),
        ("data/cats", "data/cats"),
        ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-ema"),
        ("emoji:train", "emoji:train"),
    ],
)
def test_paths(path, public):
    assert without_paths({"a": [path], "b": 1}) == {"a": [public], "b": 1}
