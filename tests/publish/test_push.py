"""`dic-repa push`: to a hub of this machine and back; what goes out, and what does not."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from fake_hub import serving
from huggingface_hub import ModelCard, constants
from PIL import Image
from places import ROOT
from safetensors.torch import load_file
from small_runs import ALIGNED, full_disk, small_run

from dic_repa.cli import main
from dic_repa.encoders import encoder_licence
from dic_repa.evaluation.runs import evaluate_run
from dic_repa.export import export
from dic_repa.files import hub
from dic_repa.files.outputs import begin_folder
from dic_repa.models import DiC
from dic_repa.recipe import load_recipe
from dic_repa.sampling.convert import convert
from dic_repa.sampling.load import load

FILES = {
    "README.md", "config.json", "data.json", "grid.png", "manifest.json", "model.safetensors", "recipe.yaml",
    "scores.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was aligned to an encoder from a file, began elsewhere, and was judged."""
    place = tmp_path_factory.mktemp("place")
    teacher = place / "teacher.safetensors"
    shutil.copy(ROOT / "encoders/weights/digits_vit.safetensors", teacher)
    judged = [key for key in ALIGNED if key != "evaluate=null"]
    keys = [f"alignments.0.encoder_options.weights={teacher}", f"folders=[{place}]", "sample.num=20", "sample.steps=2"]
    made = small_run(place / "run", *keys, "train.more_ema_decays=[0.5]", base=judged)
    evaluate_run(made.path)
    return made.path


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch, tmp_path) as served:
        yield served


def push(*arguments: object) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["push", *map(str, arguments)])
    assert exit.value.code == 0


def newest(run: Path) -> Path:
    return run / "checkpoints/step_00000008"


def test_to_the_hub_and_back(run, fake, capsys, monkeypatch, tmp_path):
    push(run, "me/digits", "--license", "apache-2.0", "--private", "--message", "the first")
    files = fake.repositories["me/digits"]["main"]
    assert f"/me/digits/commit/{fake.commit('me/digits', 'main')}" in capsys.readouterr().out
    assert set(files) == FILES
    assert fake.private["me/digits"]
    assert fake.messages == ["the first"]
    # What huggingface_hub asks the hub to check; whether the real hub agrees, only that can say.
    assert fake.validated == [{"repoType": "model", "content": files["README.md"].decode()}]

    got, own = DiC.from_pretrained("me/digits").state_dict(), load_file(newest(run) / "ema/model.safetensors")
    assert got.keys() == own.keys()
    assert all(torch.equal(got[name], own[name]) for name in own)
    theirs, ours = (load(name).sample([3, "7"], seed=1) for name in ("me/digits", run))
    assert [image.tobytes() for image in theirs] == [image.tobytes() for image in ours]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what was downloaded once is there
    hub.PINS.clear()
    assert DiC.from_pretrained("me/digits").config == DiC.from_pretrained(newest(run) / "ema").config
    command = re.search(r"^dic-repa (sample me/digits .*)$", files["README.md"].decode(), flags=re.MULTILINE)[1]
    with pytest.raises(SystemExit) as exit:
        main([*command.split(), "--batch-size=10"])
    assert exit.value.code == 0
    assert len(list(tmp_path.glob("samples/digits/0*.png"))) == 10


def test_a_branch_of_other_weights(run, fake):
    model = load(run, weights="ema-0.5")
    url = model.push_to_hub("me/digits", revision="half", dtype="float16")
    branches = fake.repositories["me/digits"]
    assert branches["main"] == {}
    assert url.endswith(fake.commit("me/digits", "half"))
    (folder := Path("half")).mkdir()
    (folder / "model.safetensors").write_bytes(branches["half"]["model.safetensors"])
    own = load_file(newest(run) / "ema-0.5/model.safetensors")
    assert all(torch.equal(t, own[name].half()) for name, t in load_file(folder / "model.safetensors").items())
    assert next(model.denoiser.parameters()).dtype == torch.float32  # the model itself is left as it is
    assert 'load("me/digits@half")' in branches["half"]["README.md"].decode()


def test_another_upload_leaves_no_scores_of_the_one_before(run, fake):
    push(run, "me/digits")
    model = load(run)
    next(model.denoiser.parameters()).data += 1
    model.push_to_hub("me/digits")
    files = fake.repositories["me/digits"]["main"]
    assert set(files) == FILES - {"scores.json"}
    assert "the weights were changed" in files["README.md"].decode()
    assert ModelCard(files["README.md"].decode()).data.eval_results is None


def test_of_a_repository_of_something_else_nothing_is_removed(run, fake):
    fake.private["me/other"] = False
    fake.repositories["me/other"] = {"main": {"scores.json": b"theirs", "manifest.json": b"theirs"}}
    model = load(run)
    next(model.denoiser.parameters()).data += 1  # so it has no scores of its own
    model.push_to_hub("me/other")
    assert fake.repositories["me/other"]["main"]["scores.json"] == b"theirs"


def test_nothing_of_this_machine_goes_out(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    push(run, "me/digits", "--folder", "out")
    names = {file.name for file in Path("out").iterdir() if not file.name.startswith(".")}
    assert names == FILES
    private = [str(run.parent), str(tmp_path), str(Path.home()), socket.gethostname(), getpass.getuser()]
    private = [f"/{word}" if word.isalpha() else word for word in private]
    assert str(run.parent) in (run / "recipe.yaml").read_text()
    for file in Path("out").iterdir():
        content = file.read_bytes()
        assert not [word for word in private if word.encode() in content], file
    before, after = load_recipe(run / "recipe.yaml"), load_recipe("out/recipe.yaml")
    assert after.folders == []
    assert after.alignments[0].encoder_options == {"weights": "teacher.safetensors"}
    before.folders, before.alignments[0].encoder_options = [], after.alignments[0].encoder_options
    assert after == before


def test_only_scores_of_these_weights(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    copied = shutil.copytree(run, tmp_path / "run")
    (file,) = (copied / "evaluation").glob("*.json")
    record = json.loads(file.read_text())
    for name, step, changes in (("a", 4, {}), ("b", 8, {"weights": "ema-0.5"})):
        other = record | {"step": step, "sample": record["sample"] | changes}
        (copied / f"evaluation/step_{step:08d}-{name}.json").write_text(json.dumps(other))
    (copied / "evaluation/step_00000008-damaged.json").write_text('{"scores": [')
    measured = {"metrics": {"prec": 0.25}, "samples": {"count": 7, "sampling": {"sample": record["sample"]}}}
    (copied / "evaluation/step_00000008-m").mkdir()
    (copied / "evaluation/step_00000008-m/metrics.json").write_text(
        json.dumps(measured | {"reference": {"path": "/home/x/photos"}, "bound": None})
    )
    push(copied, "me/digits", "--folder", "out")
    scores = json.loads(Path("out/scores.json").read_text())
    assert (scores["step"], scores["weights"]) == (8, "ema")
    assert [(s["num"], s["reference"], s["sample"]["weights"]) for s in scores["scored"]] == [
        (20, "digits", "ema"),
        (7, "photos", "ema"),
    ]
    own = scores["scored"][0]["metrics"]
    assert own == {name: record["scores"][name] for name in ("recognised", "fd-digits")}
    # What was published is published again with its scores and its picture.
    push("out", "me/digits", "--folder", "again")
    push("out", "me/digits", "--folder", "again", "--overwrite")
    assert json.loads(Path("again/scores.json").read_text()) == scores
    assert Image.open("again/grid.png").tobytes() == Image.open("out/grid.png").tobytes()


def test_adapters_go_out_merged(run, fake, tmp_path):
    """Beside what they began with: a model of the hub, which the hub then names too."""
    push(run, "me/digits")
    keys = ["train.init_from=me/digits", "train.lora={rank: 2, targets: ['mid.*']}", "sample.steps=2"]
    tuned = small_run(tmp_path / "tuned", *keys)
    folder = load(tuned.path, weights="raw").push_to_hub("me/tuned", folder="out")
    assert DiC.from_pretrained(folder).config == DiC.from_pretrained(newest(run) / "ema").config
    theirs, ours = load(folder).sample([3], seed=1), load(tuned.path, weights="raw").sample([3], seed=1)
    assert theirs[0].tobytes() == ours[0].tobytes()
    card = ModelCard.load("out/README.md")
    assert card.data.base_model == "me/digits"
    assert "| started from | the weights me/digits (taken: 81 of 81 tensors; new: nothing) |" in card.text
    assert "LoRA adapters of rank 2" in card.text
    assert "of the weights that it started from may reach" in card.text


def test_weights_of_other_code(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    convert(newest(run), Path("DiC.pt"))
    model = load("DiC.pt", recipe=run / "recipe.yaml")
    text = (Path(model.push_to_hub("me/authors", dry_run=True)) / "README.md").read_text()
    assert "Its weights come from DiC.pt, which other code made" in text
    assert "None were recorded" in text


def test_a_diffusers_folder(run, fake, capsys):
    export(load(run), "exported", format="diffusers")
    settings = json.loads(Path("exported/model_index.json").read_text())
    settings["settings"]["autoencoder"]["name"] = "/home/someone/vae"
    Path("exported/model_index.json").write_text(json.dumps(settings))
    Path("exported/notes.txt").write_text("mine")
    push("exported", "me/pipeline", "--license", "mit", "--revision", "half")
    files = fake.repositories["me/pipeline"]["half"]
    names = {str(file.relative_to("exported")) for file in Path("exported").rglob("*") if file.is_file()}
    assert set(files) == names - {"notes.txt", ".dic-repa.jsonl"}
    assert fake.validated == [{"repoType": "model", "content": files["README.md"].decode()}]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("mit", "diffusers")
    assert 'from_pretrained("me/pipeline", revision="half", trust_remote_code=True)' in card.text
    assert json.loads(files["model_index.json"])["settings"]["autoencoder"]["name"] == "vae"
    assert files["pipeline.py"] == Path("exported/pipeline.py").read_bytes()


def test_mistakes_with_exports(run, mistake):
    begin_folder("program", "export", ["denoiser.pt2", "export.json"])
    said = mistake("push", "program", "me/x", "--dry-run")
    assert "only those of the format diffusers are pushed; upload another by `hf upload me/x program`" in said
    assert "is an export, whose weights and dtype" in mistake("push", "program", "me/x", "--dry-run", "--dtype", "bf16")


def test_mistakes(run, mistake, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    said = mistake("push", run, "me/digits")
    assert "no token for the hub: log in with `hf auth login`, or set HF_TOKEN" in said
    assert "'digits' names no owner; name OWNER/NAME, such as your-name/digits" in mistake("push", run, "digits")
    assert "'me/../x' is no repository of the hub" in mistake("push", run, "me/../x", "--dry-run")
    assert "'Apache 2' is no short name of a licence" in mistake("push", run, "me/x", "--license", "Apache 2")
    assert "no run or checkpoint folder nowhere" in mistake("push", "nowhere", "me/x", "--dry-run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    assert "is not a saved model, so it is not overwritten" in mistake("push", run, "me/x", "--folder", "mine")
    assert not (tmp_path / "hub").exists()
    push(run, "me/x", "--dry-run")
    assert "hub/x exists; pass --overwrite to replace it" in mistake("push", run, "me/x", "--dry-run")


def test_a_full_disk_leaves_what_was_there(run, mistake):
    push(run, "me/x", "--folder", "out")
    before = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    with full_disk():
        assert "out could not be written" in mistake("push", run, "me/x", "--folder", "out", "--overwrite")
    assert {file.name: file.read_bytes() for file in Path("out").iterdir()} == before
    assert [file.name for file in Path().iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("status", "says"), [(401, "log in anew"), (403, "this token may not write to me/digits"), (500, "try again later")]
)
def test_a_hub_that_refuses(run, fake, status, says, mistake):
    fake.refuses = status
    assert says in mistake("push", run, "me/digits")
    assert fake.repositories == {}


def test_a_card_that_the_hub_does_not_take(run, fake, mistake):
    fake.faults = '"license" must be one of many'
    said = mistake("push", run, "me/digits", "--license", "mine-own")
    assert '"license" must be one of many); mend it' in said
    assert fake.repositories["me/digits"] == {"main": {}}


def test_without_a_connection(run, fake, mistake, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "me/digits was not uploaded" in mistake("push", run, "me/digits")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode" in mistake("push", run, "me/digits")


@pytest.mark.slow
def test_the_command_alone(run, dic_repa, tmp_path):
    done = dic_repa("push", run, "me/digits", "--dry-run")
    assert done.stdout.startswith("hub/digits: README.md, config.json")
    assert "nothing was uploaded" in done.stdout
    assert type(DiC.from_pretrained(tmp_path / "hub/digits")) is DiC


def test_licences_of_encoders():
    assert encoder_licence("dinov2-vit-b") == "Apache-2.0"
    assert encoder_licence("mae-vit-b") == "CC BY-NC 4.0"
    assert encoder_licence("timm:vit_base_patch16_224.mae") == "cc-by-nc-4.0"
    assert encoder_licence("timm:no_such_network") == encoder_licence("nobody-knows") == ""
