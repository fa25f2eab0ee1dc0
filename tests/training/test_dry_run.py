"""`dic-repa train --dry-run`: what it promises is held against a run, a closed form and the models themselves."""

from __future__ import annotations

import json

import huggingface_hub.constants
import pytest
import torch
from conftest import TINY
from torch import nn

from dic_repa.alignment import AlignedDenoiser
from dic_repa.cli import main
from dic_repa.cli.train import dry_run_text
from dic_repa.models import DiC
from dic_repa.recipe import ObjectiveSection, TrainSection, load_recipe
from dic_repa.recipe.build import build_objective
from dic_repa.training import memory_estimate, train
from dic_repa.training.memory_estimate import activation_bytes


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as exit:
            main(["train", "--dry-run", *arguments])
        assert exit.value.code == 0
        assert not list(tmp_path.iterdir())  # nothing is written
        return capsys.readouterr().out

    return run


def test_small_recipe_is_run_and_its_checkpoint_foretold(dry_run, tmp_path):
    report = json.loads(dry_run("digits-urepa", *TINY, "--set=train.steps=100", "--json"))
    assert report["steps_per_second"] > 0
    assert report["images_per_second"] == pytest.approx(8 * report["steps_per_second"])
    assert report["hours_to_the_end"] == pytest.approx(100 / report["steps_per_second"] / 3600)
    assert "memory" not in report  # there is no GPU to measure
    assert "micro_batch" not in report
    assert "\nmicro_batch 8 fits" in dry_run_text(report | {"micro_batch": {"advice": "8 fits"}})
    assert report["watts"] is None
    assert report["paper"] is None

    overrides = [entry.removeprefix("--set=") for entry in TINY]
    run = train(load_recipe("digits-urepa", [*overrides, "train.steps=1"]), tmp_path / "run")
    written = sum(file.stat().st_size for file in run.newest_checkpoint().rglob("*") if file.is_file())
    assert written == pytest.approx(report["disk"]["checkpoint"], rel=0.1)  # headers weigh on so small a model


def test_classes_as_in_the_data_need_no_data(dry_run):
    report = json.loads(dry_run("digits-urepa", *TINY, "--set=sample.classes=data", "--json"))
    assert report["steps_per_second"] > 0


@pytest.mark.usefixtures("dry_run")
def test_parts_that_do_not_fit_are_told_in_a_line(monkeypatch, capsys):
    def build(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("dic_repa.training.dry_run_steps.build_parts", build)
    with pytest.raises(SystemExit) as exit:
        main(["train", "--dry-run", "digits-urepa", *TINY])
    assert exit.value.code == 2
    assert "CUDA out of memory); lower train.micro_batch (now 8)" in capsys.readouterr().err


def test_large_recipe_is_estimated_on_a_machine_without_gpu(dry_run):
    text = dry_run("dic-xl-urepa", "--processes=8", "--set=optimizer.learning_rate=2e-4")
    assert "an ESTIMATE from shapes" in text
    assert "exchange of gradients" not in text  # they are views of DDP's buffers
    assert "256, 32 a process, 32 a pass" in text
    assert "optimizer.learning_rate: 0.0002 instead of 0.0001" in text
    assert "FID_ODE 1.74" in text
    assert "the data is not here" in text
    assert "training would not begin: the autoencoder stabilityai/sd-vae-ft-ema cannot be fetched" in text
    assert "no steps were run" in text


def test_estimate_follows_the_recipe(dry_run):
    def estimate(*overrides) -> dict:
        settings = (f"--set=train.{override}" for override in ("micro_batch=8", *overrides))
        return json.loads(dry_run("dic-s", *settings, "--json"))

    plain = estimate()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in DiC.from_preset("DiC-S").parameters())
    memory = plain["memory_estimate"]
    assert plain["parameters"]["denoiser"] == parameters
    assert (memory["weights"], memory["optimizer"], memory["averages"]) == tuple(4 * parameters * k for k in (1, 2, 1))
    assert estimate("micro_batch=4")["memory_estimate"]["activations"] < 0.7 * memory["activations"]
    assert estimate("gradient_checkpointing=true")["memory_estimate"]["activations"] < 0.4 * memory["activations"]
    more = estimate("more_ema_decays=[0.99]", "keep_checkpoints=5", "keep_every=100_000", "checkpoint_every=50_000")
    assert more["memory_estimate"]["averages"] == 8 * parameters
    assert (more["disk"]["checkpoint"], more["disk"]["kept"]) == (20 * parameters, 8)


@pytest.mark.parametrize(("processes", "rows", "buffers"), [(1, 8, 0), (4, 8, 0), (4, 2, 1), (1, 2, 0)])
def test_buffers_of_ddp_are_the_gradients_themselves_where_there_is_one_pass(processes, rows, buffers, monkeypatch):
    monkeypatch.setattr(memory_estimate, "activation_bytes", lambda *_: 0)
    counts = {"denoiser": 6, "trained": 6, "encoders": {}}
    settings = TrainSection(batch_size=8 * processes)
    shapes = {"model": nn.Linear(2, 2), "parameters": counts, "tokens": [], "data": (1, 8, 8)}
    found = memory_estimate.estimate_memory(shapes, None, settings, processes, rows, 8)
    assert (found["gradients"], found["exchange of gradients"]) == (4 * 6, 4 * 6 * buffers)


class TwoConvs(nn.Module):
    in_channels, num_classes = 3, 5

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x, t, y):
        return self.second(self.first(x).relu())


def test_activations_in_closed_form():
    """Kept are the input, what lies between the convolutions (once, for both), the error and its weight by image."""
    with torch.device("meta"):
        model = AlignedDenoiser(TwoConvs())
    kept = activation_bytes(model, build_objective(ObjectiveSection()), [], (4, 3, 8, 8), mixed=False)
    assert kept == 4 * 4 * 64 * (3 + 16 + 3) + 4 * 4


def test_mistakes(mistake, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "does not divide among 3 processes" in mistake("train", "dic-s", "--dry-run", "--processes=3")
    assert "did you mean mid.3" in mistake("train", "dic-xl-urepa", "--dry-run", "--set=alignments.0.tap=mid.33")
    assert "unknown encoder" in mistake("train", "dic-xl-urepa", "--dry-run", "--set=alignments.0.encoder=dinov22")
    assert "go with --dry-run" in mistake("train", "dic-s", "--processes=3")
    (tmp_path / "images").mkdir()
    wrong = ["--set=data={name: repa, path: images, size: 32}", "--set=alignments=[]"]
    assert "neither images/ nor images.zip" in mistake("train", "dic-s", "--dry-run", *wrong)
    assert "unknown solver" in mistake("train", "dic-s", "--dry-run", "--set=sample.solver=hein")


def test_what_is_frozen_needs_no_gradient_and_no_state(dry_run):
    def report(*keys) -> dict:
        return json.loads(
            dry_run("digits-urepa", *TINY, "--json", "--set=alignments=[]", *(f"--set={k}" for k in keys))
        )

    model = DiC(8, (1, 1, 1, 1, 1), in_channels=1, num_classes=10)
    whole = sum(p.numel() for p in model.parameters())
    left = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("enc."))
    frozen = report("train.freeze=['enc.*']", "train.init_from=runs/nowhere")
    assert frozen["parameters"]["trained"] == left
    memory = frozen["memory_estimate"]
    assert [memory[name] for name in ("weights", "gradients", "optimizer")] == [4 * whole, 4 * left, 8 * left]
    assert "training would not begin: train.init_from: there is no run or" in " ".join(frozen["notes"])
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    adapters = sum(2 * (len(layer.weight) + layer.weight[0].numel()) for layer in layers)
    lora = report("train.lora.rank=2")
    assert lora["parameters"]["trained"] == lora["parameters"]["adapters"] == adapters
    assert lora["disk"]["checkpoint"] == 8 * whole + 12 * adapters
