"""`train.lora`: peft's adapters beside frozen layers, merged wherever weights are read, and alone for peft."""

from __future__ import annotations

import sys

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import small_recipe, small_run

from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.models import create_denoiser, load_denoiser
from dic_repa.models.adapters import adaptable_layers, add_adapters, plain_parameters
from dic_repa.sampling.load import load
from dic_repa.training import EMA
from dic_repa.training.parts import build_parts

LORA = ["train.lora.rank=2", "train.lora.alpha=4", "optimizer.learning_rate=0.01", "optimizer.weight_decay=0.1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and one of three steps that adapts its weights, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        base = small_run(folder / "base", "train.steps=2")
        all_kept = ["train.steps=3", "train.checkpoint_every=1", "train.keep_checkpoints=3"]
        return base, small_run(folder / "lora", f"train.init_from={base.path}", *LORA, *all_kept)


@torch.no_grad()
def outputs(denoiser):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 1, 16, 16, generator=generator), torch.rand(4, generator=generator)
    return denoiser(x, t, torch.tensor([0, 3, 9, 10]))


def parts_of(base, *more):
    return build_parts(small_recipe(f"train.init_from={base.path}", *LORA, *more), Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DiC", {"width": 8, "depths": (1, 1, 1, 1, 1)}),
        ("SiT", {"width": 16, "depth": 1, "num_heads": 2}),
        ("U-ViT", {"width": 16, "depth": 3, "num_heads": 2, "size": 8}),
    ],
)
def test_averages_lie_in_memory_as_the_weights_do(name, options):
    """So that a GPU moves all of them in one pass: its kernels take no pair of another layout."""
    denoiser = create_denoiser(name, 1, 10, **options)
    average = EMA(denoiser)
    strides = [p.stride() for p in average.model.parameters()]
    assert strides == [p.stride() for p in plain_parameters(denoiser)]
    add_adapters(denoiser, adaptable_layers(denoiser), rank=2, alpha=4.0)
    assert strides == [p.stride() for p in plain_parameters(denoiser)]


def test_before_the_first_step_it_is_the_model_that_it_began_with(runs):
    base, _ = runs
    parts = parts_of(base)
    expected = outputs(load(base.path).denoiser)
    assert torch.equal(outputs(parts.denoiser), expected)
    assert torch.equal(outputs(parts.ema.model), expected)
    trained = [name for name, parameter in parts.denoiser.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)


def test_the_merged_weights_compute_what_peft_does_with_the_adapters_alone(runs, tmp_path):
    base, run = runs
    with pytest.raises(SystemExit, match="0"):
        main(["convert", str(run.path), str(tmp_path / "adapters"), "--lora-only"])
    with pytest.raises(SystemExit, match="0"):
        main(["convert", str(run.path), str(tmp_path / "merged"), "--weights=raw"])
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in (tmp_path / "adapters").iterdir()}
    begun = load(base.path).denoiser
    before = outputs(begun)
    adapted = outputs(PeftModel.from_pretrained(begun, str(tmp_path / "adapters")).eval())
    assert (adapted - before).abs().max() > 0.01
    for merged in (load(run.path, weights="raw").denoiser, load_denoiser(tmp_path / "merged")):
        torch.testing.assert_close(outputs(merged), adapted, rtol=0, atol=1e-5)


def test_only_the_adapters_change(runs):
    base, run = runs
    begun = load_file(base.newest_checkpoint() / "ema/model.safetensors")
    after = load_file(run.newest_checkpoint() / "model.safetensors")
    plain = {name.removeprefix("denoiser.").replace(".base_layer.", "."): t for name, t in after.items()}
    for name, tensor in begun.items():
        assert torch.equal(plain[name], tensor)
    changed = {name: tensor for name, tensor in after.items() if ".lora_B." in name}
    assert len(changed) == 31
    assert all(tensor.any() for tensor in changed.values())


def test_the_average_is_that_of_the_merged_weights(runs):
    base, run = runs
    average = load(base.path).denoiser.state_dict()
    for step in (1, 2, 3):
        merged = load(run.checkpoint_path(step), weights="raw").denoiser.state_dict()
        decay = min(0.99, (1 + step) / (10 + step))
        average = {name: decay * tensor + (1 - decay) * merged[name] for name, tensor in average.items()}
    found = load(run.path).denoiser.state_dict()
    assert found.keys() == average.keys()
    for name in found:
        torch.testing.assert_close(found[name], average[name], rtol=0, atol=1e-6)


def test_raw_weights_are_shown_merged_in_training(runs):
    parts = parts_of(runs[0])
    with torch.no_grad():
        for name, parameter in parts.denoiser.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    before = outputs(parts.ema.model)
    with parts.ema.raw(parts.denoiser):
        torch.testing.assert_close(outputs(parts.ema.model), outputs(parts.denoiser), rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs(parts.ema.model), before)


def test_targets_and_what_trains_besides(runs):
    chosen = ["train.lora.targets=['*.conv1', 'output.*']", "train.lora.also=['*.label.weight', 'output.conv2.*']"]
    parts = parts_of(runs[0], *chosen)
    trained = {name for name, parameter in parts.denoiser.named_parameters() if parameter.requires_grad}
    full = {name for name in trained if ".lora_" not in name}
    assert full == {*(f"condition.{n}.label.weight" for n in range(3)), "output.conv2.weight", "output.conv2.bias"}
    adapted = {name.partition(".lora_")[0] for name in trained - full}
    blocks = {"enc.0.0", "enc.1.0", "mid.0", "dec.0.0", "dec.1.0"}
    assert adapted == {*(f"{block}.conv1" for block in blocks), "output.conv1", "output.modulation"}


def test_mistakes(runs, mistake, monkeypatch, tmp_path):
    base, _ = runs
    train = ["train", "digits-urepa", "--set=model.width=8", "--set=model.depths=[1,1,1,1,1]"]
    train += [f"--set=train.init_from={base.path}"]
    assert "did you mean *.conv1" in mistake(*train, "--set=train.lora.targets=['*.convv1']")
    error = mistake(*train, "--set=train.lora={}", "--set=train.freeze=['enc.*']")
    assert "train.lora freezes all parameters but lora.also already" in error
    assert "has no recipe.yaml with train.lora" in mistake("convert", base.path, tmp_path / "out", "--lora-only")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'dic-repa[lora]'" in mistake(*train, "--set=train.lora={}")
    assert not (tmp_path / "runs").exists()


def test_new_rows_must_train(runs, monkeypatch):
    from dic_repa.data.digits import Digits

    monkeypatch.setattr(Digits, "num_classes", 12)
    monkeypatch.setattr(Digits, "class_names", (*"0123456789", "x", "y"))
    with pytest.raises(UserError, match=r"condition\.0\.label\.weight, .* would stay at new random values"):
        parts_of(runs[0])
    assert parts_of(runs[0], "train.lora.also=['*.label.weight']").start.new


def test_without_weights_to_begin_with_it_warns(capsys):
    build_parts(small_recipe(*LORA), Accelerator(cpu=True))
    assert "warning: train.lora without train.init_from" in capsys.readouterr().err
