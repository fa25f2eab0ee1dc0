"""Checkpoints are whole or absent, written while training goes on, and outlive kills, damage and full disks."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from places import SCRIPTS
from small_runs import assert_same, metrics, small_recipe, small_run, weights

from dic_repa.errors import UserError
from dic_repa.files.manifest import find_damage, write_manifest
from dic_repa.files.outputs import MARKER
from dic_repa.models import DiC
from dic_repa.runs import RunFolder
from dic_repa.runs.checkpoints import CHECKPOINT_FILES
from dic_repa.sampling.convert import convert
from dic_repa.sampling.load import load
from dic_repa.sampling.weights import checkpoint_of, weights_folder
from dic_repa.training import EMA, train
from dic_repa.training.checkpoint import CheckpointWriter


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of eight steps, with checkpoints at 4 and 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return small_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def copy(whole, tmp_path):
    return RunFolder(shutil.copytree(whole.path, tmp_path / "run"))


def cut_short(file):
    os.truncate(file, file.stat().st_size - 1)


def cut_in_half(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("model.safetensors", cut_short, "model.safetensors has"),
        ("optimizer.pt", flip_a_bit, "optimizer.pt has another SHA-256"),
        ("ema/config.json", flip_a_bit, "ema/config.json has another SHA-256"),
        ("state.json", lambda file: file.unlink(), "state.json is missing"),
        ("manifest.json", lambda file: file.unlink(), "it has no manifest.json"),
        ("manifest.json", cut_short, None),  # its last byte is the end of the line
        ("manifest.json", lambda file: file.write_text("[]"), "its manifest.json cannot be read"),
    ],
)
def test_damage_is_found_and_the_newest_whole_checkpoint_taken(copy, capsys, name, change, says):
    newest = copy.newest_checkpoint()
    assert newest.name == "step_00000008"
    assert find_damage(newest) is None
    change(newest / name)
    found = find_damage(newest)
    assert found is None if says is None else found.startswith(says)
    expected = "step_00000008" if says is None else "step_00000004"
    assert copy.newest_checkpoint().name == expected
    said = capsys.readouterr().err
    assert (f"warning: {newest} is damaged: " in said) == (says is not None)
    assert ("; taking step_00000004\n" in said) == (says is not None)


def test_damage_outside_a_part_does_not_matter_to_it(copy):
    cut_short(copy.checkpoint_path(8) / "optimizer.pt")
    assert copy.newest_checkpoint("ema").name == "step_00000008"
    (copy.checkpoint_path(8) / "ema-0.5").mkdir()
    (copy.checkpoint_path(8) / "ema-0.5/file").touch()
    write_manifest(copy.checkpoint_path(8))
    (copy.checkpoint_path(8) / "ema-0.5/file").write_text("of another average")
    assert copy.newest_checkpoint("ema").name == "step_00000008"
    flip_a_bit(copy.checkpoint_path(8) / "ema/model.safetensors")
    assert copy.newest_checkpoint("ema").name == "step_00000004"


def zero_a_half(file):
    half = file.stat().st_size // 2
    file.write_bytes(file.read_bytes()[:half] + bytes(file.stat().st_size - half))


@pytest.mark.parametrize("part", ["", "ema"])
@pytest.mark.parametrize(
    "change",
    [
        flip_a_bit,
        zero_a_half,
        lambda file: shutil.copy(str(file).replace("_00000008", "_00000004"), file),
        lambda file: flip_a_bit(file.with_name("data.json")),
        lambda file: (file.parents[1] / "manifest.json").unlink(),
    ],
)
def test_a_checkpoint_that_is_named_is_checked_as_one_that_is_found(copy, part, change):
    named = copy.checkpoint_path(8) / part
    assert load(named).source == copy.checkpoint_path(8) / "ema"
    change(copy.checkpoint_path(8) / "ema/model.safetensors")
    for read in (load, lambda path: DiC.from_pretrained(path / ("" if part else "ema"))):
        with pytest.raises(UserError, match=r"step_00000008 is damaged: .*; take another checkpoint, or restore"):
            read(named)


def test_a_checkpoint_of_another_step_or_run_is_noticed(copy, tmp_path, capsys):
    four, eight = copy.checkpoint_path(4), copy.checkpoint_path(8)
    shutil.rmtree(eight)
    shutil.copytree(four, eight)
    with pytest.raises(UserError, match="step_00000008 is not what its place says: it is the checkpoint of step 4;"):
        load(eight)
    assert load(copy.path).source == four / "ema"
    assert "step_00000008 is damaged: it is the checkpoint of step 4; taking step_00000004" in capsys.readouterr().err
    shutil.rmtree(eight)
    other = small_run(tmp_path / "other", "train.seed=1", "train.steps=8")
    shutil.copytree(other.checkpoint_path(8), eight)
    with pytest.raises(UserError, match="it is a checkpoint of another run"):
        load(eight / "ema")
    with pytest.raises(UserError, match=r"step_00000008 is in the way: .* another run; move it out of"):
        train(small_recipe(), copy.path, resume=True)
    assert find_damage(eight) is None  # it may be the only one that its owner has
    eight.rename(tmp_path / "elsewhere")
    load(tmp_path / "elsewhere")


def test_what_an_earlier_version_wrote_is_taken(copy):
    """Without an id of the run, or run and step in a manifest."""
    copy.id_file.unlink()
    assert load(copy.path).source.parent == copy.checkpoint_path(8)
    for step in (4, 8):
        file = copy.checkpoint_path(step) / "manifest.json"
        file.write_text(json.dumps({"files": json.loads(file.read_text())["files"]}))
    assert load(copy.checkpoint_path(8)).source.parent == copy.checkpoint_path(8)
    train(small_recipe("train.steps=10"), copy.path, resume=True)
    load(copy.checkpoint_path(10))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "recipe.yaml", "data.json"])
def test_a_converted_folder_is_checked(whole, tmp_path, name):
    convert(whole.path, tmp_path / "small")
    convert(whole.path, tmp_path / "small")  # over an older one
    load(tmp_path / "small")
    flip_a_bit(tmp_path / "small" / name)
    with pytest.raises(UserError, match=rf"small is damaged: {name} has another SHA-256; .* remove its manifest.json"):
        load(tmp_path / "small")
    with pytest.raises(UserError, match="is damaged"):
        DiC.from_pretrained(tmp_path / "small")


def test_manifest_names_no_files_outside_and_no_fifo(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    entry = {"size": 0, "sha256": ""}
    for name, says in (("pipe", "pipe is not a file"), ("../x", "cannot be read"), ("/etc/hostname", "cannot be read")):
        (tmp_path / "manifest.json").write_text(json.dumps({"files": {name: entry}}))
        assert says in find_damage(tmp_path)


def test_manifest_has_what_sha256sum_says(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    write_manifest(tmp_path)
    entry = json.loads((tmp_path / "manifest.json").read_text())["files"]["file"]
    # FIPS 180-2, appendix B.1
    assert entry == {"size": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(copy, whole):
    flip_a_bit(copy.checkpoint_path(8) / "model.safetensors")
    train(small_recipe(), copy.path, resume=True)
    assert_same(weights(copy.checkpoint_path(8)), weights(whole.checkpoint_path(8)))
    assert find_damage(copy.checkpoint_path(8)) is None
    assert [r["loss"] for r in metrics(copy)] == [r["loss"] for r in metrics(whole)]


def test_run_without_a_whole_checkpoint_does_not_begin_anew_in_silence(copy):
    for step in (4, 8):
        (copy.checkpoint_path(step) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"all checkpoints of .* are damaged.* remove .*checkpoints to begin anew"):
        train(small_recipe(), copy.path, resume=True)
    with pytest.raises(UserError, match=r"are damaged \(step_00000008: .*; step_00000004: .*\); restore one$"):
        weights_folder(copy.path)


def test_the_name_ema_alone_makes_no_average(copy, tmp_path):
    """A run may be called so, or an average that was copied elsewhere; what is beside them is not theirs."""
    copy.path.rename(tmp_path / "ema")
    with pytest.raises(UserError, match=r"is neither a run nor a checkpoint: .*; did you mean .*/ema\?"):
        load(tmp_path)
    newest = tmp_path / "ema/checkpoints/step_00000008"
    assert weights_folder(tmp_path / "ema") == newest / "ema"
    assert checkpoint_of(newest / "ema") == newest
    exported = shutil.copytree(newest / "ema", tmp_path / "exported/ema")
    assert weights_folder(exported) == checkpoint_of(exported) == exported


def test_keep_the_last_and_every_nth(tmp_path):
    every = ["train.checkpoint_every=1", "train.keep_checkpoints=2", "train.keep_every=3"]
    run = small_run(tmp_path / "run", *every)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [f"step_{step:08d}" for step in (3, 6, 7, 8)]


def test_a_removal_that_a_kill_has_cut_off_is_made_up_for(copy):
    half = copy.checkpoint_path(4)
    for name in CHECKPOINT_FILES:
        (half / name).unlink()
    copy.drop_old_checkpoints(keep=1)
    assert not half.exists()
    assert copy.newest_checkpoint() == copy.checkpoint_path(8)


@pytest.mark.parametrize("damage", [cut_in_half, lambda file: file.unlink()])
def test_a_damaged_list_of_files_keeps_no_checkpoint(copy, damage):
    folder = copy.checkpoint_path(4)
    damage(folder / MARKER)
    (folder / "notes.txt").write_text("not of the run")
    copy.drop_old_checkpoints(keep=1)
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]


def test_inference_checkpoint_of_each_average_loads_alone(tmp_path):
    run = small_run(tmp_path / "run", "train.more_ema_decays=[0.5]", "train.power_ema=[0.1]")
    folder = run.checkpoint_path(8)
    for name in ("ema", "ema-0.5", "ema-sigma_rel-0.1"):
        moved = shutil.copytree(folder / name, tmp_path / name)
        denoiser = DiC.from_pretrained(moved)
        assert denoiser(torch.zeros(1, 1, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).isfinite().all()
        total = sum(file.stat().st_size for file in moved.iterdir())
        assert total < (folder / "optimizer.pt").stat().st_size


def test_writing_goes_on_behind_the_training_one_job_at_a_time(tmp_path):
    may_end, began, order = threading.Event(), threading.Event(), []

    def slowly():
        began.set()
        may_end.wait(20)
        order.append("first written")

    with CheckpointWriter(RunFolder(tmp_path)) as writer:
        writer.start(1, slowly)
        assert began.wait(20)
        assert order == []  # the first is being written, and here we are
        threading.Timer(0.1, may_end.set).start()
        writer.start(2, lambda: order.append("second written"))
        assert order[0] == "first written"
        writer.finish()
    assert order == ["first written", "second written"]


def test_failed_write_is_told_at_once_and_raised_at_the_end_only(tmp_path, capsys):
    def fail():
        raise OSError(28, "No space left on device")

    with CheckpointWriter(RunFolder(tmp_path)) as writer:
        writer.start(1, fail)
        writer.start(2, lambda: None)
        writer.finish()  # the last one is written
        assert "step_00000001 could not be written" in capsys.readouterr().err
        writer.start(3, fail)
        with pytest.raises(UserError, match=r"No space left on device.*; there is no earlier one"):
            writer.finish()


def test_mistake_of_ours_while_writing_is_no_warning(tmp_path):
    with CheckpointWriter(RunFolder(tmp_path)) as writer:
        writer.start(1, lambda: {}["missing"])
        with pytest.raises(KeyError):
            writer.finish()


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own: `disk(size)` mounts it, or changes its options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(options):
        remount = ["-o", f"remount,{options}"] if mounted else ["-t", "tmpfs", "-o", options]
        done = subprocess.run(["mount", *remount, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        mounted.append(options)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def checkpoint_size(run):
    return sum(file.stat().st_size for file in run.checkpoint_path(4).rglob("*"))


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_full_file_system_loses_nothing(disk, whole, capsys):
    """There is room for less than two checkpoints: the first is written, the second is not, and the run goes on."""
    size = int(checkpoint_size(whole) * 1.75)  # full while torch writes the optimizer's state
    folder = disk(f"size={size}")
    every = "train.checkpoint_every=2"
    with pytest.raises(UserError, match=r"step_00000008 could not be written \(.*No space left.*\); step_00000002 is"):
        small_run(folder / "run", every)
    assert "step_00000004 could not be written" in capsys.readouterr().err
    run = RunFolder(folder / "run")
    assert [p.name for p in run.checkpoints.iterdir()] == ["step_00000002"]
    assert find_damage(run.checkpoint_path(2)) is None
    disk("size=100m")
    small_run(run.path, every, resume=True)
    assert_same(weights(run.checkpoint_path(8)), weights(whole.checkpoint_path(8)))
    assert [r["loss"] for r in metrics(run)] == [r["loss"] for r in metrics(whole)]


@pytest.mark.skipif(sys.platform != "linux", reason="mounts")
def test_read_only_checkpoint_folder_keeps_the_old_one(disk, whole, tmp_path, monkeypatch, capsys):
    """From the sixth step on no checkpoint can be written: the run goes on to its end, says so, and the old one is
    whole.
    """
    run, update = RunFolder(tmp_path / "run"), EMA.update
    disk("size=1m")  # skips the test where mounting is not permitted

    def mount(*options):
        subprocess.run(["mount", *options, str(run.checkpoints)], check=True)

    def update_and_mount(self, denoiser, step):
        if step == 6:
            while not run.list_checkpoints():  # that of step 4 may still be being written
                time.sleep(0.01)
            mount("--bind", str(run.checkpoints))
            mount("-o", "remount,bind,ro")
        update(self, denoiser, step)

    monkeypatch.setattr(EMA, "update", update_and_mount)
    says = r"step_00000008 could not be written .*step_00000004 is whole"
    try:
        with pytest.raises(UserError, match=says):
            small_run(run.path)
    finally:
        subprocess.run(["umount", "-l", str(run.checkpoints)], capture_output=True)
    assert "Read-only file system" in capsys.readouterr().err
    monkeypatch.setattr(EMA, "update", update)
    small_run(run.path, resume=True)
    assert_same(weights(run.checkpoint_path(8)), weights(whole.checkpoint_path(8)))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_kills_change_nothing(tmp_path):
    """The short form of `python tests/scripts/kill_often.py`: three kills, at moments of every run's own."""
    script = (
        "import kill_often, pathlib; kill_often.main(kills=3, steps=24, seed={seed}, folder=pathlib.Path({folder!r}))"
    )
    command = script.format(seed=random.randrange(10**6), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", command], cwd=SCRIPTS, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, command + done.stdout + done.stderr
