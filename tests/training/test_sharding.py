"""Two processes against one: the same losses; what one meets, both agree on; FSDP2 cuts, and any number loads it."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from aligner_steps import gradients
from denoisers import DENOISERS, denoiser_run
from methods import METHODS, UNSHARDED, method_run
from places import SCRIPTS
from safetensors.torch import load_file, save_file
from small_runs import ALIGNED, assert_same, metrics, small_run, weights
from torch import nn
from two_processes import BEGUN, LONG

from dic_repa.errors import UserError
from dic_repa.files.manifest import find_damage
from dic_repa.models import DiC
from dic_repa.runs import RunFolder
from dic_repa.sampling.convert import convert
from dic_repa.sampling.load import load
from dic_repa.sampling.weights import checkpoint_of, read_weights, weights_folder
from dic_repa.training.sharding import cut_like, shard, stages, to_cpu

pytestmark = pytest.mark.slow  # two processes train first


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs of `two_processes.py`, and `one`, which one process has done."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 runs on CPUs from torch 2.7.0 on")
    folder = tmp_path_factory.mktemp("runs")
    done = launch("two_processes.py", 2, folder)
    assert done.returncode == 0, done.stderr[-5000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        small_run(folder / "one", *LONG, base=ALIGNED)
        for name in ("ddp-10", "sharded"):  # go on from step 10 in one process
            run = until_step_10(folder, name, f"{name}-then-one")
            power = ["train.power_ema=[0.1]"] if name == "sharded" else []
            small_run(run.path, *LONG, *power, base=ALIGNED, resume=True)
    return folder


def launch(script, processes, folder):
    command = [sys.executable, SCRIPTS / "forked.py", str(processes), SCRIPTS / script, folder]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def until_step_10(folder, name, copied):
    """A copy of a run without what came later."""
    run = RunFolder(shutil.copytree(folder / name, folder / copied))
    shutil.rmtree(run.checkpoint_path(20), ignore_errors=True)
    return run


@pytest.fixture(scope="module")
def four(runs):
    """The runs of `four_processes.py`, of which one was killed."""
    until_step_10(runs, "one", "one-then-four")
    until_step_10(runs, "sharded", "killed")
    done = launch("four_processes.py", 4, runs)
    assert "SIGKILL" in done.stderr, done.stderr[-5000:]
    return runs


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_aligner_in_somebody_elses_loop(runs, kind):
    """Model and aligner are wrapped one by one; the gradients are those of one process with the whole batch."""
    found, whole = load_file(runs / f"aligner-{kind}.safetensors"), gradients()
    for name in whole.keys() - {"loss"}:  # a process knows its own half of the loss
        torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-6, msg=name)


def test_gradients_are_exchanged_in_few_large_pieces_of_which_they_are_views(runs):
    assert (runs / "buckets.txt").read_text() == f"{200 * 2**20} True"


def losses(folder):
    return torch.tensor([record["loss"] for record in metrics(RunFolder(folder))], dtype=torch.float64)


def test_a_torch_that_cannot_shard_on_cpus_is_told(monkeypatch):
    monkeypatch.delattr("torch.cpu.Stream.record_event", raising=False)
    with pytest.raises(UserError, match=r"needs torch 2\.7 or newer on CPUs"):
        shard(nn.Linear(2, 2), nn.Linear(2, 2), SimpleNamespace(device=torch.device("cpu"), num_processes=2))


@pytest.mark.parametrize("name", ["ddp", "ddp-10-then-one", "sharded", "sharded-then-one"])
def test_twenty_losses_are_those_of_one_process(runs, name):
    torch.testing.assert_close(losses(runs / name), losses(runs / "one"), rtol=0, atol=1e-5)
    assert len(losses(runs / name)) == 20
    assert {record["gradient_norm"] > 1 for record in metrics(RunFolder(runs / name))} == {True, False}  # some clipped
    found, expected = (weights(RunFolder(runs / run).checkpoint_path(20)) for run in (name, "one"))
    assert_same(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", BEGUN)
def test_a_part_of_other_weights_is_trained_as_in_one_process(runs, tmp_path, name):
    one = small_run(tmp_path / "one", *BEGUN[name], f"train.init_from={runs / 'ddp-10'}")
    for sharding in ("none", "fsdp2"):
        run = RunFolder(runs / f"{name}-{sharding}")
        found, expected = (weights(each.checkpoint_path(4)) for each in (run, one))
        assert_same(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_trained_as_in_one_process(runs, tmp_path, name):
    one = method_run(tmp_path / "one", name)
    for sharding in ("none", *["fsdp2"] * (name not in UNSHARDED)):
        two = RunFolder(runs / f"{name}-{sharding}")
        torch.testing.assert_close(losses(two.path), losses(one.path), rtol=0, atol=1e-5)
        assert_same(weights(two.checkpoint_path(4)), weights(one.checkpoint_path(4)), rtol=1e-3, atol=1e-4)
        for file in one.checkpoint_path(4).glob("ema/autoencoder/*.safetensors"):
            again = load_file(two.checkpoint_path(4) / "ema" / "autoencoder" / file.name)
            assert_same(again, load_file(file), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_is_trained_aligned_as_in_one_process_and_resumes_and_samples(runs, tmp_path, name):
    one, two = denoiser_run(tmp_path / "one", name), RunFolder(runs / f"{name}-ddp")
    torch.testing.assert_close(losses(two.path), losses(one.path), rtol=1e-4, atol=1e-4)
    assert "alignment.0.token" in metrics(two)[-1]
    part = RunFolder(shutil.copytree(one.path, tmp_path / "part"))
    shutil.rmtree(part.checkpoint_path(20))
    denoiser_run(part.path, name, resume=True)
    for file in ("model.safetensors", "ema/model.safetensors"):
        assert (part.checkpoint_path(20) / file).read_bytes() == (one.checkpoint_path(20) / file).read_bytes()
    images = load(two.path).sample(classes=[3, 7], solver="euler", steps=2)
    assert [image.size for image in images] == [(16, 16)] * 2


def test_a_sharded_optimizer_without_a_fused_kernel_is_that_of_one_process(runs, tmp_path):
    one = small_run(tmp_path / "one", "optimizer.name=sgd")
    for step in (4, 8):
        found = weights(RunFolder(runs / "sharded-sgd").checkpoint_path(step))
        assert_same(found, weights(one.checkpoint_path(step)), rtol=1e-3, atol=1e-5)


def test_sharded_run_samples_and_its_average_loads(runs):
    run = RunFolder(runs / "sharded")
    assert [file.name for file in sorted(run.samples.iterdir())] == ["step_00000010.png", "step_00000020.png"]
    for name in ("ema", "ema-sigma_rel-0.1"):
        assert DiC.from_pretrained(run.checkpoint_path(20) / name).config["width"] == 8


def test_a_sharded_checkpoint_is_in_parts_that_its_manifest_lists_and_torch_reads(runs, tmp_path):
    folder = RunFolder(runs / "sharded").checkpoint_path(20)
    parts = [f"{name}-{process:05d}-of-00002.safetensors" for name in ("model", "optimizer") for process in (1, 2)]
    assert sorted(file.name for file in folder.glob("*.safetensors")) == parts
    sizes = {name: (folder / name).stat().st_size for name in parts}
    assert max(sizes.values()) < 1.1 * min(size for name, size in sizes.items() if name[:3] == "opt")
    assert find_damage(folder) is None
    own = weights(folder)
    for name in parts:
        copied = shutil.copytree(folder, tmp_path / name)
        content = bytearray((copied / name).read_bytes())
        content[-1] ^= 1
        (copied / name).write_bytes(content)
        assert find_damage(copied) == f"{name} has another SHA-256"
        (copied / name).unlink()
        assert find_damage(copied) == f"{name} is missing"
        if name.startswith("model"):
            with pytest.raises(UserError, match=f"is damaged: {name} is missing"):
                read_weights(copied / "ema", "raw")
            for left in copied.glob("model-*"):
                left.unlink()
            save_file({"denoiser": torch.zeros(1)}, copied / "model.safetensors")  # not of this checkpoint
            with pytest.raises(UserError, match=r"manifest\.json lists no model\.safetensors"):
                read_weights(copied / "ema", "raw")
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    if hasattr(checkpoint, "HuggingFaceStorageReader"):
        found = {name: torch.zeros_like(tensor) for name, tensor in own.items() if name.startswith("denoiser.")}
        assert len(found) > 50
        checkpoint.load(found, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder)), no_dist=True)
        assert_same(found, {name: own[name] for name in found})


def test_a_sharded_checkpoint_is_sampled_and_converted_like_any_other(runs, tmp_path):
    run = RunFolder(runs / "sharded")
    own = weights(run.checkpoint_path(20))
    expected = {name.removeprefix("denoiser."): own[name] for name in own if name.startswith("denoiser.")}
    assert_same(dict(load(run.path, weights="raw").denoiser.state_dict()), expected)
    convert(run.path, tmp_path / "small", weights="raw")
    assert_same(dict(DiC.from_pretrained(tmp_path / "small").state_dict()), expected)
    assert checkpoint_of(weights_folder(run.path)) == run.checkpoint_path(20)


def test_four_processes_load_the_checkpoint_of_one_bit_for_bit_and_go_on(four):
    same, count = map(int, (four / "loaded.txt").read_text().split())
    assert same == count > 200
    torch.testing.assert_close(losses(four / "one-then-four"), losses(four / "one"), rtol=0, atol=1e-5)
    run = RunFolder(four / "one-then-four")
    assert len(list(run.checkpoint_path(20).glob("model-*-of-00004.safetensors"))) == 4
    found, expected = (weights(run.checkpoint_path(20)), weights(RunFolder(four / "one").checkpoint_path(20)))
    assert_same(found, expected, rtol=1e-3, atol=1e-4)


def test_a_kill_while_one_of_four_writes_loses_nothing(four, monkeypatch):
    run = RunFolder(four / "killed")
    assert [folder.name for folder in run.list_checkpoints()] == ["step_00000010"]
    assert find_damage(run.checkpoint_path(10)) is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    small_run(run.path, *LONG, "train.power_ema=[0.1]", base=ALIGNED, resume=True)
    assert not list(run.path.rglob(".writing-*"))
    assert_same(weights(run.checkpoint_path(20)), weights(RunFolder(four / "sharded-then-one").checkpoint_path(20)))


def test_a_full_disk_of_one_process_is_told_once_and_costs_that_checkpoint(runs):
    said = [(runs / f"full-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "step_00000008 could not be written (process 1: [Errno 28] No space left on device)" in said[0]
    assert said[0].endswith("step_00000004 is whole")
    assert RunFolder(runs / "full").newest_checkpoint().name == "step_00000004"
    assert not list((runs / "full").rglob(".writing-*"))


def test_sharded_convolutions_have_the_layout_of_their_weights(runs):
    called, mixed = map(int, (runs / "layouts.txt").read_text().split())
    assert called > 20 * 10  # ten in the smallest denoiser, for each step
    assert mixed == 0


@pytest.mark.parametrize("name", ["poisoned", "poisoned-sharded"])
def test_both_skip_what_one_cannot_take(runs, name):
    run = RunFolder(runs / name)
    assert [record["skipped"] for record in metrics(run)] == [0, 0, 1, 1]
    steps = [weights(run.checkpoint_path(step)) for step in range(1, 5)]
    moved = [
        any(not torch.equal(before[n], after[n]) for n in before if n[:4] != "ema ")
        for before, after in itertools.pairwise(steps)
    ]
    assert moved == [True, False, True]


def test_sample_that_one_cannot_read_stops_both_with_the_steps_before_it_saved(runs):
    assert {(runs / f"damaged-{rank}.txt").read_text() for rank in (0, 1)} == {"a.png is damaged"}
    assert RunFolder(runs / "damaged").newest_checkpoint().name == "step_00000002"
    assert sorted((runs / f"prints-{rank}.txt").read_text() for rank in (0, 1)) == ["False", "True"]


def test_both_stop_after_the_same_step_when_one_is_told_to(runs):
    said = [(runs / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].endswith("has saved step 3")
    assert RunFolder(runs / "stopped").newest_checkpoint().name == "step_00000003"


def test_data_that_one_lacks_is_told_by_both(runs):
    said = [(runs / f"absent-{rank}.txt").read_text() for rank in (0, 1)]
    assert said == ["there is no data folder"] * 2
    assert not (runs / "absent").exists()


def test_stages_are_those_of_the_paper_and_leave_nothing_out_twice():
    denoiser = DiC(width=8, depths=(1, 2, 3, 2, 1), in_channels=1, num_classes=10)
    found = stages(denoiser)
    for stage in (*denoiser.enc, denoiser.mid, *denoiser.dec):
        assert list(stage) in found
    modules = [module for stage in found for module in stage]
    assert len(modules) == len(set(map(id, modules)))


def test_whole_tensors_keep_their_layout_in_memory():
    own = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last).weight
    saved = torch.randn(8, 4, 3, 3)
    laid_out = cut_like(saved, own)
    assert laid_out.stride() == own.stride()
    torch.testing.assert_close(laid_out, saved)
    tree = {"a": [saved, 3], "b": {"c": own}}
    copied = to_cpu(tree, main=True)
    assert copied["a"][1] == 3
    assert copied["a"][0].data_ptr() != saved.data_ptr()
    torch.testing.assert_close(copied["b"]["c"], own.detach())
    assert to_cpu(tree, main=False)["b"]["c"] is None
