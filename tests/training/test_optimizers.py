"""The optimizer and the learning rate of a recipe: against torch's own, skipped, resumed, and of one's own."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_runs import PoisonedDigits, assert_same, load_parts, small_recipe, small_run, weights
from torch import nn

from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.files.manifest import write_manifest
from dic_repa.models import DiC
from dic_repa.models.layers import layout_of
from dic_repa.recipe import OptimizerSection, load_recipe
from dic_repa.training import train
from dic_repa.training.dry_run import dry_run
from dic_repa.training.inputs import data_order
from dic_repa.training.optimizers import build_optimizer, clip_gradients, optimizers, skips_on_device, state_bytes
from dic_repa.training.schedules import LearningRate
from dic_repa.training.step import StepGuard

STEPS, WARMUP = 21, 5
OWN = "torch.optim:NAdam"  # which does not know how to skip a step by itself
needs_bitsandbytes = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")


def rates(*overrides):
    keys = [f"train.steps={STEPS}", f"schedule.warmup_steps={WARMUP}", "optimizer.learning_rate=0.4"]
    rate = LearningRate(load_recipe("digits-baseline", [*keys, *overrides]))
    return [rate(step) for step in range(STEPS)]


def torchs(*schedulers):
    """The rates of torch's schedulers, one after the other, from the warm-up's end on."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    found = []
    for make, steps in schedulers:
        scheduler = make(optimizer)
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    return found


def test_the_rate_rises_in_the_warm_up():
    for name in ("constant", "cosine", "linear", "wsd"):
        assert rates(f"schedule.name={name}")[: WARMUP + 1] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4, 0.4])


def test_the_falling_rates_are_torchs():
    lr, after = torch.optim.lr_scheduler, STEPS - WARMUP
    cosine = torchs((lambda o: lr.CosineAnnealingLR(o, after - 1, eta_min=0.04), after))
    assert rates("schedule={name: cosine, warmup_steps: 5, options: {final: 0.1}}")[WARMUP:] == pytest.approx(cosine)
    linear = torchs((lambda o: lr.LinearLR(o, 1.0, 0.25, after - 1), after))
    assert rates("schedule={name: linear, warmup_steps: 5, options: {final: 0.25}}")[WARMUP:] == pytest.approx(linear)
    stable = torchs((lambda o: lr.ConstantLR(o, 1.0), 9), (lambda o: lr.LinearLR(o, 1.0, 0.0, 6), 7))
    wsd = rates("schedule={name: wsd, warmup_steps: 5, options: {decay: 0.4}}")[WARMUP:]
    assert wsd == pytest.approx(stable, abs=1e-12)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.name=cosin"], "unknown learning-rate schedule 'cosin'; did you mean cosine"),
        (
            ["schedule={name: cosine, options: {fin: 1}}"],
            "schedule 'cosine'.*did you mean final",
        ),
        (["schedule={name: wsd, options: {decay: 0}}"], "decay 0: give"),
        (["schedule={name: linear, options: {final: 2}}"], "final 2: give"),
        (["optimizer.name=adamv"], "unknown optimizer 'adamv'; did you mean adam"),
        (["optimizer.options={epsilon: 1}"], "optimizer 'adamw' does not take these options: .*epsilon"),
        (["optimizer={name: sgd, betas: [0.5, 0.9]}"], "optimizer.betas: sgd does not take it"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        small_run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_groups_keep_the_ratio_of_their_rates():
    recipe = load_recipe("digits-baseline", ["train.steps=21", "schedule={name: cosine, warmup_steps: 5}"])
    fast, slow = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [fast], "lr": 0.3}, {"params": [slow], "lr": 0.1}], lr=1.0)
    rate = LearningRate(recipe)
    for step in (0, 7, 20):
        told = rate.apply([optimizer], step)
        shares = [group["lr"] / told * recipe.optimizer.learning_rate for group in optimizer.param_groups if told]
        assert shares == pytest.approx([0.3, 0.1][: len(shares)])
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]


NETWORK = {"embedding": nn.Embedding(3, 4), "conv": nn.Conv2d(4, 4, 3), "norm": nn.GroupNorm(2, 4)}


@pytest.mark.parametrize("name", ["adamw", "torch.optim:NAdam"])
def test_weights_alone_decay_where_it_is_asked(name):
    """Without a gradient's push, a step leaves 1 - rate * decay of what decays, and the rest as it is."""
    for on, decaying in (("matrices", {"conv.weight", "out.weight"}), ("all", None)):
        model = copy.deepcopy(nn.ModuleDict({**NETWORK, "out": nn.Linear(4, 2)}))
        model.register_parameter("positions", nn.Parameter(torch.ones(1, 5, 4)))
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        options = {} if name == "adamw" else {"options": {"decoupled_weight_decay": True}}
        section = OptimizerSection(name=name, learning_rate=0.1, weight_decay=0.5, decay_on=on, **options)
        optimizer = build_optimizer(section, model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for key, value in model.named_parameters():
            left = 0.95 if decaying is None or key in decaying else 1.0
            torch.testing.assert_close(value, left * before[key], msg=f"{on}: {key}")


def test_adamw_is_torchs():
    weight, other = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    section = OptimizerSection(learning_rate=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    ours = build_optimizer(section, nn.ParameterList([weight]))
    theirs = torch.optim.AdamW([other], 0.1, (0.8, 0.9), weight_decay=0.2)
    for step in range(4):
        for parameter, optimizer in ((weight, ours), (other, theirs)):
            parameter.grad = torch.full_like(parameter, math.cos(step))
            optimizer.step()
    torch.testing.assert_close(weight, other)


FOLDED, APART = ("adamw", "adam", "sgd"), ("muon", OWN)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def accelerator(request):
    AcceleratorState._reset_state(reset_partial_state=True)  # the device of a test before this one
    yield Accelerator(cpu=request.param == "cpu")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", [*FOLDED, *APART])
def test_clipping_is_torchs_whether_the_optimizer_does_it_or_not(name, accelerator):
    """Of six steps two are clipped and one has no finite norm, which changes nothing."""
    torch.manual_seed(0)
    section = OptimizerSection(name=name, learning_rate=0.1)
    start = nn.Sequential(nn.Linear(4, 8), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(8, 4))
    ours, theirs = (copy.deepcopy(start).to(accelerator.device) for _ in range(2))
    optimizer, plain = accelerator.prepare(build_optimizer(section, ours)), build_optimizer(section, theirs)
    guard = StepGuard(accelerator, optimizer.optimizer)
    for step, size in enumerate((0.01, 3.0, 0.02, float("inf"), 5.0, 0.01)):
        for mine, other in zip(ours.parameters(), theirs.parameters()):
            mine.grad = size * torch.randn_like(mine)
            other.grad = mine.grad.clone()
        raw = ours[0].weight.grad.clone()
        norm = clip_gradients(ours, 1.0, optimizer, accelerator)
        assert torch.equal(raw, ours[0].weight.grad) == (name in FOLDED or size < 1)  # no pass of its own
        assert norm == nn.utils.clip_grad_norm_(theirs.parameters(), 1.0) or size > 9
        guard.judge(step + 1, [{"loss": norm.new_zeros(())}], norm)
        optimizer.step()
        optimizer.zero_grad()
        if size < 9:
            plain.step()
        for mine, other in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert guard.counts.tolist() == [0, 1]  # none of the last, one of all is skipped
    assert optimizer.state_dict().keys() == {"state", "param_groups"}


def test_without_a_limit_nothing_is_clipped(accelerator):
    layer = nn.Linear(30, 2).to(accelerator.device)
    optimizer = accelerator.prepare(torch.optim.SGD(layer.parameters(), 1.0, fused=True))
    for limit, moved in ((1.0, 1.0), (None, 60.0**0.5)):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.ones_like(layer.weight)
        assert clip_gradients(layer, limit, optimizer, accelerator).item() == pytest.approx(60**0.5)
        optimizer.step()
        assert (layer.weight - before).norm().item() == pytest.approx(moved)


def test_bytes_of_state():
    kept = {
        name: state_bytes(OptimizerSection(name=name)) for name in ("adamw", "adam", "sgd", "muon", "torch.optim:NAdam")
    }
    assert kept == {"adamw": 8, "adam": 8, "sgd": 4, "muon": 4, "torch.optim:NAdam": 8}
    assert state_bytes(OptimizerSection(name="sgd", options={"momentum": 0})) == 0


@pytest.mark.parametrize(("name", "share"), [("adamw", 2), ("sgd", 1)])
def test_the_dry_run_foretells_the_state(name, share, tmp_path):
    """What it says against the bytes of state in the run's own checkpoint."""
    recipe = small_recipe(f"optimizer.name={name}", "train.steps=1")
    said = dry_run(recipe, tmp_path / "run")["memory_estimate"]
    run = train(recipe, tmp_path / "run")
    kept = [tensor for key, tensor in weights(run.newest_checkpoint()).items() if key.startswith("optimizer")]
    assert said["optimizer"] == share * said["weights"] == sum(tensor.nbytes for tensor in kept if tensor.ndim)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", OWN])
def test_a_bad_step_is_skipped(name, tmp_path, monkeypatch):
    """After a second step of bad data, weights and the optimizer's state are as after the first."""
    keys = [f"optimizer.name={name}", "data.name=poisoned-digits", "train.checkpoint_every=1"]
    second = list(itertools.islice(data_order(0, 8000, 4), 2))[1]
    monkeypatch.setattr(PoisonedDigits, "poisoned", frozenset(second))
    run = small_run(tmp_path / "run", *keys, "train.steps=2")
    first, after = (
        {key: value for key, value in weights(run.checkpoint_path(step)).items() if not key.startswith("ema")}
        for step in (1, 2)
    )
    assert_same(after, first)
    start = small_run(tmp_path / "start", *keys, "train.steps=1", "optimizer.learning_rate=1e-30")
    last = "denoiser.output.conv2.bias"
    assert not torch.equal(weights(start.checkpoint_path(1))[last], first[last])  # the first step did change them


@needs_bitsandbytes
def test_8_bits_leave_the_weights_where_and_as_they_are():
    model = DiC(16, (1,) * 5, in_channels=1, num_classes=3)
    weight = model.output.conv1.weight
    place, before = weight.data_ptr(), weight.detach().clone()
    optimizer = build_optimizer(OptimizerSection(name="adamw-8bit"), model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert layout_of(weight) == torch.channels_last
    assert weight.data_ptr() == place
    assert not torch.equal(weight, before)


@needs_bitsandbytes
def test_8_bits_go_where_32_go():
    """Of a small network's 20 steps, the weights end a twentieth of their way from where AdamW leads; other betas lead
    elsewhere. Each moment keeps a byte for a weight and a float for 256 of them."""
    torch.manual_seed(0)
    x, target = torch.randn(256, 64), torch.randn(256, 64)
    start = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    ends = {}
    for name, betas in (("adamw-8bit", (0.9, 0.999)), ("adamw", (0.9, 0.999)), ("adamw", (0.5, 0.999))):
        model = copy.deepcopy(start)
        optimizer = build_optimizer(OptimizerSection(name=name, learning_rate=3e-3, betas=betas), model)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        ends[name, betas[0]] = model[0].weight.detach() - start[0].weight.detach()
    way = ends["adamw", 0.9]
    off = [((ends[key] - way).norm() / way.norm()).item() for key in (("adamw-8bit", 0.9), ("adamw", 0.5))]
    assert 0 < off[0] < 0.05 < off[1]
    assert state_bytes(OptimizerSection(name="adamw-8bit")) == pytest.approx(2 * (1 + 4 / 256), rel=0.02)


def test_8_bits_need_their_package_and_whole_weights(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"needs the package bitsandbytes; .*pip install 'dic-repa\[low-bit\]'"):
        build_optimizer(OptimizerSection(name="adamw-8bit"), nn.Linear(2, 2))
    layer = nn.Linear(2, 2)
    layer.weight.device_mesh = None  # which a sharded weight has
    with pytest.raises(UserError, match="does not take sharded weights"):
        build_optimizer(OptimizerSection(name="adamw-8bit"), layer)


MUON = "optimizer={name: muon, weight_decay: 0.1, decay_on: matrices}"
LOW_BIT = pytest.param("optimizer.name=adamw-8bit", marks=needs_bitsandbytes)


@pytest.mark.parametrize("key", ["schedule.name=cosine", "optimizer.name=sgd", MUON, LOW_BIT, f"optimizer.name={OWN}"])
def test_a_resumed_run_is_the_uninterrupted_one(key, tmp_path):
    whole = small_run(tmp_path / "whole", key)
    cut = small_run(tmp_path / "cut", key)
    shutil.rmtree(cut.checkpoint_path(8))
    small_run(cut.path, key, resume=True)
    assert_same(weights(cut.checkpoint_path(8)), weights(whole.checkpoint_path(8)))


def test_the_state_goes_on_with_its_parameters_in_other_groups(tmp_path):
    """What decays decides the order of the state. A decay too small to change a weight lets both runs be compared."""
    keys = ["optimizer.weight_decay=1e-20", "train.steps=4", "train.checkpoint_every=2"]
    whole = small_run(tmp_path / "whole", *keys)
    cut = small_run(tmp_path / "cut", *keys)
    shutil.rmtree(cut.checkpoint_path(4))
    small_run(cut.path, *keys, "optimizer.decay_on=matrices", resume=True, allow_change=True)
    ended = [load_parts(run.checkpoint_path(4), "model") for run in (cut, whole)]
    assert_same(*ended)
    orders = [torch.load(run.checkpoint_path(4) / "optimizer.pt")["parameters"] for run in (cut, whole)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize(("before", "after"), [("adamw", "sgd"), ("sgd", "adamw")])
def test_another_optimizer_goes_on_from_the_weights_alone(before, after, tmp_path, capsys):
    run = small_run(tmp_path / "run", f"optimizer.name={before}", "train.steps=4")
    with pytest.raises(UserError, match=f'optimizer.name: "{before}" -> "{after}"'):
        small_run(run.path, f"optimizer.name={after}", resume=True)
    small_run(run.path, f"optimizer.name={after}", resume=True, allow_change=True)
    assert "state of another optimizer" in capsys.readouterr().err
    kept = torch.load(run.checkpoint_path(8) / "optimizer.pt", weights_only=True)["state"][0]
    assert set(kept) == ({"momentum_buffer"} if after == "sgd" else {"step", "exp_avg", "exp_avg_sq"})


def test_a_falling_rate_is_another_run_with_other_steps(tmp_path):
    run = small_run(tmp_path / "run", "schedule.name=cosine", "train.steps=4", "train.checkpoint_every=4")
    with pytest.raises(UserError, match=r"train.steps: 4 -> 8"):
        small_run(run.path, "schedule.name=cosine", "train.steps=8", resume=True)


def test_which_skip_on_the_device():
    found = {name: skips_on_device(build_optimizer(OptimizerSection(name=name), nn.Linear(2, 2)))
             for name in (*optimizers.names(), "torch.optim:NAdam") if name != "adamw-8bit"}  # fmt: skip
    assert found == {"adam": True, "adamw": True, "muon": True, "sgd": True, "torch.optim:NAdam": False}


def test_a_run_of_earlier_keys_is_resumed_and_sampled(tmp_path):
    keys = ["optimizer.learning_rate=3e-3", "schedule.warmup_steps=3", "sample.steps=2", "sample.num=4"]
    whole, cut = small_run(tmp_path / "whole", *keys), small_run(tmp_path / "cut", *keys)
    shutil.rmtree(cut.checkpoint_path(8))
    for file in (cut.path / "recipe.yaml", cut.checkpoint_path(4) / "ema" / "recipe.yaml"):
        raw = yaml.safe_load(file.read_text())
        optimizer, schedule = raw.pop("optimizer"), raw.pop("schedule")
        raw["train"] |= {key: optimizer[key] for key in ("learning_rate", "weight_decay", "betas")}
        raw["train"]["warmup_steps"] = schedule["warmup_steps"]
        file.write_text(yaml.safe_dump(raw))
    (cut.checkpoint_path(4) / "manifest.json").unlink()
    write_manifest(cut.checkpoint_path(4))
    with pytest.raises(SystemExit, match="0"):
        main(["sample", str(cut.path), "--out", str(tmp_path / "samples")])
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 4
    small_run(cut.path, *keys, resume=True)
    assert_same(weights(cut.checkpoint_path(8)), weights(whole.checkpoint_path(8)))


def test_keys_of_earlier_versions(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("dic_repa.recipe.files.detail", said.append)
    old = tmp_path / "recipe.yaml"
    old.write_text(
        "base: digits-urepa\ntrain: {learning_rate: 3e-3, betas: [0.5, 0.9], warmup_steps: 7, steps: 5}\n"
        "train.weight_decay: 0.25\n"
    )
    recipe = load_recipe(old)
    assert f"{old}: train.warmup_steps is schedule.warmup_steps today" in said
    assert (recipe.optimizer.learning_rate, recipe.optimizer.betas, recipe.optimizer.weight_decay) == (
        3e-3,
        (0.5, 0.9),
        0.25,
    )
    assert (recipe.schedule.warmup_steps, recipe.train.steps) == (7, 5)
    with pytest.raises(UserError, match=r"unknown key 'train.learning_rate'; did you mean optimizer.learning_rate"):
        load_recipe("digits-urepa", ["train.learning_rate=1e-3"])


def test_what_is_measured_before_a_run_draws_none_of_its_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    state_bytes(OptimizerSection())
    assert torch.equal(torch.get_rng_state(), before)
