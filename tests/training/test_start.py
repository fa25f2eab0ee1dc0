"""`train.init_from` and `train.freeze`: what is taken from other weights, what is new, and what does not train."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file
from small_runs import SMALL, assert_same, metrics, small_run, weights
from torch.nn import functional as F

from dic_repa.conditions import VectorCondition, class_labels
from dic_repa.data.saved import SavedData
from dic_repa.models import create_denoiser, load_authors_checkpoint
from dic_repa.recipe import Recipe
from dic_repa.runs import RunFolder
from dic_repa.training import train
from dic_repa.training.start import start_from

DIC = {"width": 8, "depths": (1, 1, 1, 1, 1)}
SIT = {"width": 16, "depth": 2, "num_heads": 2}
UVIT = {"width": 16, "depth": 3, "num_heads": 2, "size": 8}
FAMILIES = {"DiC": DIC, "SiT": SIT, "U-ViT": UVIT}


def denoiser(family="DiC", in_channels=1, num_classes=3, seed=0, **options):
    """One whose weights are all random: of new ones, the last layer is zero."""
    torch.manual_seed(seed)
    model = create_denoiser(family, in_channels, num_classes, **{**FAMILIES[family], **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def saved(folder, model, names=None):
    """`model` in a folder; with the names of its classes, where they are given."""
    model.save_pretrained(folder)
    if names:
        SavedData(None, class_labels(len(names), names)).write(folder)
    return folder


def start(model, place, names=None):
    condition = class_labels(model.num_classes, names) if names else model.conditioned_on
    return start_from(model, condition, Recipe(train={"init_from": str(place)}))


@torch.no_grad()
def run(model, label, size=8):
    x = torch.randn(1, model.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    return model(x, torch.tensor([0.3]), torch.tensor([label]))


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_are_taken_by_their_names(tmp_path, family):
    source = denoiser(family)
    place = saved(tmp_path / "source", source, ["cat", "dog", "owl"])
    ours = denoiser(family, num_classes=4, seed=1)
    before = run(ours, 2)
    taken = start(ours, place, ["owl", "cat", "eel", "yak"])
    for label, theirs in {0: 2, 1: 0, 4: 3}.items():  # the last is the null
        assert torch.equal(run(ours, label), run(source, theirs))
    assert not torch.equal(run(ours, 2), before)
    assert not torch.equal(run(ours, 2), run(ours, 3))
    (table,) = {name.split(".")[-2] for name in taken.fresh}
    assert table == "label"
    assert "the rows of 2 classes and the null's" in taken.taken[1]
    assert len(taken.new) == 1
    assert taken.new[0].endswith("label.weight: the rows of 2 classes")


@pytest.mark.parametrize(
    ("theirs", "ours", "rows"),
    [
        (["a", "b", "c"], ["c", "a", "b"], [2, 0, 1, 3]),  # as many, in another order
        (None, ["c", "a", "b"], [0, 1, 2, 3]),  # not known there, as in an authors' file: as they are
        (["a", "b", "c"], ["d", "e", "f"], [None, None, None, 3]),  # of other names: only the null's
        (["0", "1", "2"], ["0", "1"], [None, None, 3]),  # numbers are no names,
        (["0", "1", "2"], ["2", "x"], [2, None, 3]),  # unless the other data has names
        (None, ["a", "b"], [None, None, 3]),
    ],
)
def test_rows_of_the_label_table(tmp_path, theirs, ours, rows):
    source, model = denoiser(), denoiser(num_classes=len(ours), seed=1)
    table = model.condition[0].label.weight.detach().clone()
    start(model, saved(tmp_path / "source", source, theirs), ours)
    for mine, row in enumerate(rows):
        expected = table[mine] if row is None else source.condition[0].label.weight[row]
        assert torch.equal(model.condition[0].label.weight[mine], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_channels_have_new_first_and_last_layers(tmp_path, family):
    source, ours = denoiser(family), denoiser(family, in_channels=3, seed=1)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    taken = start(ours, saved(tmp_path / "source", source))
    ends = {"DiC": {"stem", "output.conv2"}, "SiT": {"patches.proj", "output.linear"},
            "U-ViT": {"patches.proj", "linear", "conv"}}[family]  # fmt: skip
    for name, tensor in ours.state_dict().items():
        theirs = source.state_dict()[name]
        if name.rpartition(".")[0] in ends and tensor.shape != theirs.shape:
            assert torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, theirs)
    assert {name.rpartition(".")[0] for name in taken.fresh} == ends
    assert "other channels" in taken.new[0]


@pytest.mark.parametrize("family", ["DiC", "SiT"])
def test_a_variance_is_dropped_or_new(tmp_path, family):
    both, one = denoiser(family, learn_sigma=True), denoiser(family, seed=1)
    start(one, saved(tmp_path / "both", both))
    assert torch.allclose(run(one, 1), run(both, 1)[:, :1], atol=1e-6)
    again = denoiser(family, learn_sigma=True, seed=2)
    taken = start(again, saved(tmp_path / "one", one))
    assert torch.allclose(run(again, 1)[:, :1], run(one, 1), atol=1e-6)
    assert "the half for the variance" in taken.new[0]


def test_other_sizes(tmp_path):
    for family in ("DiC", "SiT"):
        ours = denoiser(family, seed=1)
        start(ours, saved(tmp_path / family, denoiser(family)))
        assert torch.equal(run(ours, 0, 16), run(denoiser(family), 0, 16))
    source, ours = denoiser("U-ViT"), denoiser("U-ViT", seed=1, size=16)
    taken = start(ours, saved(tmp_path / "uvit", source))
    assert torch.equal(ours.positions[:, :2], source.positions[:, :2])
    grid = source.positions[:, 2:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    wide = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours.positions[:, 2:], wide)
    assert taken.taken[1:] == ["positions: interpolated"]
    assert not taken.new


def test_from_classes_to_vectors_and_nothing(tmp_path):
    place = saved(tmp_path / "source", denoiser())
    vector = VectorCondition(5)
    ours = denoiser(num_classes=0, seed=1, condition=vector.to_dict())
    taken = start_from(ours, vector, Recipe(train={"init_from": str(place)}))
    assert "for other classes" in taken.new[0]
    assert {name.split(".")[2] for name in taken.fresh} == {"label"}
    unlabelled = denoiser(num_classes=0, seed=1)
    assert not start(unlabelled, place).new
    assert torch.equal(run(unlabelled, 0), run(denoiser(), 3))


def test_a_model_of_the_hub_has_its_names_too(tmp_path, monkeypatch):
    source = denoiser()
    place = saved(tmp_path / "cached", source, ["cat", "dog", "owl"])
    monkeypatch.setattr("dic_repa.training.start.fetch_model", {"someone/pets": place}.__getitem__)
    ours = denoiser(num_classes=1, seed=1)
    taken = start(ours, "someone/pets", ["owl"])
    assert torch.equal(run(ours, 0), run(source, 2))
    assert taken.source == "someone/pets"
    assert not taken.new


def test_an_authors_file(tmp_path):
    file = DATA / "authors_dic_tiny.safetensors"
    theirs = load_authors_checkpoint(file)
    ours = create_denoiser("DiC", theirs.in_channels, theirs.num_classes, width=theirs.config["width"],
                           depths=theirs.config["depths"], learn_sigma=theirs.config["learn_sigma"])  # fmt: skip
    taken = start(ours, file)
    assert taken.taken == [f"{len(ours.state_dict())} of {len(ours.state_dict())} tensors"]
    assert_same(ours.state_dict(), theirs.state_dict())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return small_run(tmp_path_factory.mktemp("runs") / "base", "train.steps=2", "train.seed=3")


def init(base, *more):
    return [f"train.init_from={base.path}", "train.seed=4", *more]


@pytest.mark.parametrize("more", [["train.freeze=['enc.*', '*.modulation.*']"], ["train.lora.rank=2"]])
def test_a_resumed_run_equals_an_uninterrupted_one_and_reads_nothing_again(base, tmp_path, monkeypatch, more):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    here = shutil.copytree(base.path, tmp_path / "base")
    given = [f"train.init_from={here}", *more]
    whole = small_run(tmp_path / "whole", *given, "train.steps=4")
    parted = small_run(tmp_path / "parted", *given, "train.steps=2")
    shutil.rmtree(here)
    small_run(parted.path, *given, "train.steps=4", resume=True)
    assert_same(weights(parted.newest_checkpoint()), weights(whole.newest_checkpoint()))
    begun, resumed = json.loads(parted.environment_file.read_text())
    count = len(load_file(base.newest_checkpoint() / "ema/model.safetensors"))
    assert begun["start"]["taken"] == [f"{count} of {count} tensors"]
    assert begun["start"]["source"] == str(here / "checkpoints/step_00000002/ema")
    assert "start" not in resumed


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again_with_the_weights(
    base, frozen, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("dic_repa.runtime.progress._level", "normal")
    whole = frozen[0]
    begun = RunFolder(tmp_path / "begun")
    begun.create(whole.recipe())
    capsys.readouterr()
    train(begun.recipe(), begun.path, resume=True)
    assert_same(weights(begun.newest_checkpoint()), weights(whole.newest_checkpoint()))
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().err.splitlines()[:9])
    taken = load_file(base.newest_checkpoint() / "ema/model.safetensors")
    assert said["start"] == str(base.newest_checkpoint() / "ema")
    assert said["taken"] == f"{len(taken)} of {len(taken)} tensors"
    assert said["new"] == "nothing of the denoiser"
    count = sum(tensor.numel() for name, tensor in taken.items() if not name.startswith("enc."))
    assert said["trains"] == f"{count / 1e6:.4g} M parameters; frozen: enc.*"


def test_what_is_another_without_another_shape_is_noted(base):
    model = denoiser(num_classes=10, time_scale=7)
    recipe = Recipe(objective={"name": "ddpm"}, train={"init_from": str(base.path)})
    notes = start_from(model, model.conditioned_on, recipe).notes
    assert notes[0] == "time_scale was 1000.0, and is 7 here"
    assert notes[1].startswith("the objective was flow-matching {'time': 'logit-normal'}, and is ddpm")


@pytest.fixture(scope="module")
def frozen(base, tmp_path_factory):
    """A run of two steps with half of it frozen, and one with the other half: their first steps' batches are one."""
    folder, decay = tmp_path_factory.mktemp("frozen"), "optimizer.weight_decay=0.5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        given = [*init(base), "train.steps=2", decay]
        others = "[stem.*, condition.*, mid.*, dec.*, down.*, up.*, output.*]"
        return [
            small_run(folder / name, *given, *keys)
            for name, keys in {
                "first": ["train.freeze=['enc.*']"],
                "second": [f"train.freeze={others}"],
                "none": ["train.steps=1"],
            }.items()
        ]


def test_what_is_frozen_stays_and_the_rest_changes(base, frozen):
    begun = load_file(base.newest_checkpoint() / "ema/model.safetensors")
    for file in ("ema/model.safetensors", "model.safetensors"):
        after = load_file(frozen[0].newest_checkpoint() / file)
        after = {name.removeprefix("denoiser."): tensor for name, tensor in after.items()}
        for name, tensor in begun.items():
            assert torch.equal(after[name], tensor) == name.startswith("enc."), name
    state = torch.load(frozen[0].newest_checkpoint() / "optimizer.pt", weights_only=True)
    rest = {f"denoiser.{name}" for name in begun if not name.startswith("enc.")}
    assert {*state["parameters"]} == rest
    assert len(state["state"]) == len(state["parameters"])


def test_clipping_sees_only_what_trains(frozen):
    first, second, whole = (metrics(run)[0]["gradient_norm"] for run in frozen)
    assert first**2 + second**2 == pytest.approx(whole**2, rel=1e-5)
    assert min(first, second) > 0


def test_a_resumed_run_may_freeze_less_and_keeps_the_state_of_what_it_has(frozen, tmp_path):
    run = RunFolder(shutil.copytree(frozen[0].path, tmp_path / "run"))
    before = torch.load(run.newest_checkpoint() / "optimizer.pt", weights_only=True)
    recipe = frozen[0].recipe(["train.freeze=[]", "train.steps=3", "optimizer.learning_rate=1e-30"])
    train(recipe, run.path, resume=True, allow_change=True)
    after = torch.load(run.newest_checkpoint() / "optimizer.pt", weights_only=True)
    for i, name in enumerate(after["parameters"]):
        steps = int(after["state"][i]["step"])
        assert steps == (1 if name.startswith("denoiser.enc.") else 3), name
        if name in before["parameters"]:
            old = before["state"][before["parameters"].index(name)]
            assert old["exp_avg"].shape == after["state"][i]["exp_avg"].shape


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["train.init_from=runs/bse"], "there is no run or checkpoint folder runs/bse; did you mean runs/base?"),
        (["train.init_from=some/one"], "there is no folder some/one, and the hub does not give it"),
        (["train.init_from=README.md"], "train.init_from: there is no run or checkpoint folder README.md"),
        (["train.init_from=runs/base", "model.width=12"], "does not fit the recipe's model: it has width 8 and not 12"),
        (["train.init_from=runs/base", "model={name: SiT, width: 16, options: {depth: 1, num_heads: 2}}"],
         "holds a DiC, the recipe's model is a SiT: they share no weights"),
        (["train.freeze=['*.modulatin.*']"], "is named '*.modulatin.*'; did you mean *.modulation.*"),
        (["train.freeze=['xyz']"], "; known: condition.*, dec.*, down.*, enc.*, mid.*, output.*, stem.*, up.*"),
        (["train.freeze=['*']"], "train.freeze freezes the whole denoiser"),
    ],
)  # fmt: skip
def test_mistakes(base, mistake, tmp_path, keys, says):
    shutil.copytree(base.path, tmp_path / "runs/base")
    error = mistake("train", "digits-urepa", *(f"--set={key}" for key in [*SMALL, *keys]))
    assert says in error
    assert not (tmp_path / "runs/digits-urepa").exists()
