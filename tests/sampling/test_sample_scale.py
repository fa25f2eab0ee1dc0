"""Sampling by the thousand: the same files whatever the processes and kills; no folder is mixed up; the `.npz`."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from places import SCRIPTS
from safetensors.torch import load_file, save_file
from small_samplers import RECIPE, small_sampler

from dic_repa.cli import main
from dic_repa.conditions import ClassLabels
from dic_repa.data.autoencoders import Pixels
from dic_repa.errors import UserError, print_rank_errors
from dic_repa.evaluation import open_images
from dic_repa.files.npz import NpzFile, write_npz
from dic_repa.recipe import DataSection, SampleSection
from dic_repa.recipe.build import build_decoder
from dic_repa.sampling import SAMPLES_FILE
from dic_repa.sampling.folder import SampleFolder, fill, sample_spec, save_trajectory
from dic_repa.sampling.labels import random_labels
from dic_repa.sampling.load import load


@pytest.fixture
def sample(checkpoint, tmp_path, monkeypatch, capsys):
    """`dic-repa sample` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(*arguments) -> None:
        with pytest.raises(SystemExit) as exit:
            main(["sample", str(checkpoint), *map(str, arguments)])
        assert exit.value.code == 0, capsys.readouterr().err
        capsys.readouterr()

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("[0-9]*.png")}


def fill_in_part(checkpoint: Path, path: Path, num: int) -> None:
    loaded = load(checkpoint)
    settings = SampleSection(**{**RECIPE.sample.model_dump(), "num": num, "batch_size": 50})
    labels = torch.arange(10).repeat(num // 10)
    folder = SampleFolder(path, sample_spec(loaded, settings, labels))
    folder.check()
    folder.begin()
    # Slowly, so that a kill has time to fall in between.
    fill(folder, loaded.sampler(settings), labels, progress=lambda count: time.sleep(0.1))


@pytest.mark.slow
def test_a_thousand_samples_from_one_process_from_two_and_after_three_kills(sample, checkpoint, tmp_path):
    options = ["--num", "1000", "--batch-size", "50"]
    sample(*options, "--out", "one")
    expected = contents(tmp_path / "one")
    assert len(expected) == 1000
    assert len(set(expected.values())) == 1000

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--"]
    command += ["dic_repa", "sample", str(checkpoint), *options, "--out", "two"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == expected
    assert (tmp_path / "two/samples.json").read_text() == (tmp_path / "one/samples.json").read_text()

    killed, forks = tmp_path / "killed", multiprocessing.get_context("fork")
    for goal in (120, 380, 610):
        process = forks.Process(target=fill_in_part, args=(checkpoint, killed, 1000))
        process.start()
        while len(list(killed.glob("0*.png"))) < goal and process.is_alive():
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert goal <= len(contents(killed)) < 1000
    sample(*options, "--out", "killed")
    assert contents(killed) == expected
    assert not list(killed.glob(".writing-*"))


def test_more_samples_are_added_and_others_refused(sample, mistake, checkpoint):
    sample("--num", "20", "--batch-size", "10", "--out", "out")
    stamps = {file.name: file.stat().st_mtime_ns for file in Path("out").glob("[0-9]*.png")}
    sample("--num", "30", "--batch-size", "10", "--out", "out")
    after = {file.name: file.stat().st_mtime_ns for file in Path("out").glob("[0-9]*.png")}
    assert len(after) == 30
    assert stamps.items() <= after.items()
    record = json.loads(Path("out/samples.json").read_text())
    Path("out/samples.json").write_text(json.dumps(record | {"sample": _without(record["sample"], "pixels")}))
    sample("--num", "30", "--batch-size", "10", "--out", "out")  # as an earlier version has it, without a key of today
    assert json.loads(Path("out/samples.json").read_text()) == record
    again = ["sample", checkpoint, "--out", "out", "--num", "30"]
    assert "out exists with other samples (sample.seed differ)" in mistake(*again, "--seed", "7")
    assert "(sample.steps differ)" in mistake(*again, "--steps", "2")
    assert "(classes differ)" in mistake(*again, "--classes", "3")
    assert "out has 30 samples, more than 5" in mistake("sample", checkpoint, "--out", "out", "--num", "5")
    Path("out/samples.json").write_text("[3]")
    assert "samples.json is damaged (it holds a list, not a mapping); pass --overwrite" in mistake(*again)
    Path("other").mkdir()
    Path("other/thesis.txt").write_text("mine")
    assert "other is not a folder of samples" in mistake("sample", checkpoint, "--out", "other")


def test_samples_away_from_other_weak_weights_are_others(sample, mistake, checkpoint):
    """A weaker model that was written over is told from what it was; one that was moved is the same."""
    weak = Path(shutil.copytree(checkpoint, "weak")) / "model.safetensors"
    weak.with_name("manifest.json").unlink()  # changed on purpose
    weights = load_file(weak)
    save_file({name: 0.9 * tensor for name, tensor in weights.items()}, weak)
    options = ["--scale", "1.5", "--batch-size", "3", "--out", "out", "--weak"]
    sample("--num", "3", *options, "weak")
    shutil.move("weak", "moved")
    sample("--num", "6", *options, "moved")
    save_file({name: 0.8 * tensor for name, tensor in weights.items()}, "moved/model.safetensors")
    again = ["sample", checkpoint, "--num", "6", *options]
    assert "out exists with other samples (weak_weights differ)" in mistake(*again, "moved")
    assert "weak_weights differ" in mistake(*again[:-1])
    Path("moved/model.safetensors").unlink()
    assert "moved" in mistake(*again, "moved")


def test_random_classes_are_of_seed_and_index(sample):
    sample("--num", "40", "--random-classes", "--out", "out")
    drawn = json.loads(Path("out/samples.json").read_text())["labels"]
    labels = random_labels(RECIPE, ClassLabels(10), 40_000)
    assert labels[:40].tolist() == drawn
    assert not torch.equal(random_labels(RECIPE, ClassLabels(10), 40, seed=1), labels[:40])
    shares = labels.bincount() / 40_000
    assert (shares - 0.1).abs().max() < 5 * (0.09 / 40_000) ** 0.5
    assert set(random_labels(RECIPE, ClassLabels(10), 50, [3, 7]).tolist()) == {3, 7}


@pytest.mark.parametrize("solver", ["heun", "euler_maruyama"])
def test_samples_of_an_earlier_version_get_no_other_noise(checkpoint, tmp_path, solver):
    spec = sample_spec(load(checkpoint), SampleSection(solver=solver, num=4, steps=2), torch.arange(4))
    folder = SampleFolder(tmp_path / "out", spec)
    folder.begin()
    record = {key: value for key, value in spec.items() if key != "step_noise"}
    (tmp_path / "out" / SAMPLES_FILE).write_text(json.dumps(record))
    if solver == "heun":
        folder.check()
    else:
        with pytest.raises(
            UserError, match=r"earlier version made .*, from other noise for the solver's steps; pass --over"
        ):
            folder.check()


def test_npz_holds_the_images_and_labels(sample):
    sample("--num", "12", "--out", "out", "--format", "both", "--batch-size", "5")
    with np.load("out/samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (12, 16, 16, 3)
        assert file["arr_0"].dtype == np.uint8
        pictures = [np.array(Image.open(f"out/{i:06d}.png").convert("RGB")) for i in range(12)]
        assert (file["arr_0"] == np.stack(pictures)).all()
        assert file["arr_1"].tolist() == [*range(10), 0, 1]
    sample("--num", "12", "--out", "alone", "--format", "npz", "--batch-size", "5")
    assert not list(Path("alone").glob("0*.png"))
    assert len(open_images("alone")) == 12
    with np.load("out/samples.npz") as one, np.load("alone/samples.npz") as other:
        assert (one["arr_0"] == other["arr_0"]).all()
    before = Path("alone/samples.npz").stat().st_mtime_ns
    sample("--num", "12", "--out", "alone", "--format", "npz", "--batch-size", "5")
    assert Path("alone/samples.npz").stat().st_mtime_ns == before


def test_adaptive_samples_depend_on_the_batch_so_it_may_not_change(sample, mistake, checkpoint):
    options = ["--solver", "dopri5", "--rtol", "0.01", "--atol", "0.01", "--out", "out"]
    sample(*options, "--num", "6", "--batch-size", "3")
    assert "sample.batch_size differ" in mistake("sample", checkpoint, *options, "--num", "6", "--batch-size", "2")


def test_a_sample_of_nan_is_named(checkpoint, tmp_path):
    loaded = load(checkpoint)
    next(loaded.denoiser.parameters()).data.fill_(torch.nan)
    settings = SampleSection(**{**RECIPE.sample.model_dump(), "num": 4})
    folder = SampleFolder(tmp_path / "out", sample_spec(loaded, settings, torch.arange(4)))
    folder.begin()
    with pytest.raises(UserError, match="sample 0 and 3 others of its batch are NaN"):
        fill(folder, loaded.sampler(settings), torch.arange(4))


def test_an_error_of_one_process_is_printed_by_it(capsys, monkeypatch):
    for rank, printed in (("1", "\nerror: disk is full\n"), ("0", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError, match="disk is full"), print_rank_errors():
            raise UserError("disk is full")
        assert capsys.readouterr().err == printed


def test_decoding_in_small_batches_changes_nothing(checkpoint):
    loaded, sizes = load(checkpoint), []
    images = {}
    for batch in (1, 3, 16):
        sampler = loaded.sampler(SampleSection(**{**RECIPE.sample.model_dump(), "decode_batch": batch}))
        decode = sampler.decode
        sampler.decode = lambda x, decode=decode: sizes.append(len(x)) or decode(x)
        images[batch] = torch.cat(list(sampler(torch.arange(7))))
    assert torch.equal(images[1], images[16])
    assert torch.equal(images[3], images[16])
    assert sizes == [1] * 7 + [3, 3, 1] + [7]


def test_an_autoencoder_is_given_what_decode_batch_says(monkeypatch, tmp_path):
    sizes = []

    class Counting(Pixels):
        def decode(self, x):
            sizes.append(len(x))
            return super().decode(x)

    monkeypatch.setattr("dic_repa.recipe.build.load_autoencoder", lambda *_: Counting())
    sampler = small_sampler(decode_batch=20)
    sampler.settings.batch_size = 25
    sampler.decode = build_decoder(DataSection(name="repa", size=8))
    list(sampler(torch.zeros(25, dtype=torch.int64)))
    assert sizes == [20, 5]
    sampler.settings.decode_batch, sampler.states = 2, [torch.zeros(4, 1, 8, 8)]
    sampler.times = [0.0]
    save_trajectory(sampler, tmp_path / "trajectory.png")
    assert sizes[2:] == [2, 2]


def test_npz_is_read_as_it_was_written_and_damage_is_told(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    write_npz(tmp_path / "a.npz", iter(np.array_split(images, 4)), images.shape, np.arange(9))
    np.savez(tmp_path / "numpy.npz", images, np.arange(9))
    np.savez_compressed(tmp_path / "packed.npz", images, np.arange(9))
    for name in ("a", "numpy", "packed"):
        file = NpzFile(tmp_path / f"{name}.npz")
        assert (file.mapped("arr_0") == images).all()
        assert (file.array("arr_1") == np.arange(9)).all()
    assert NpzFile(tmp_path / "a.npz").checksum() == NpzFile(tmp_path / "numpy.npz").checksum()
    with pytest.raises(UserError, match="9 images, but there are 4"):
        write_npz(tmp_path / "b.npz", [images[:4]], images.shape)
    assert not (tmp_path / "b.npz").exists()
    (tmp_path / "half.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"half.npz is truncated or no .npz file"):
        NpzFile(tmp_path / "half.npz")
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="it holds Python objects"):
        NpzFile(tmp_path / "objects.npz").mapped("arr_0")


def test_writing_an_npz_holds_few_images_in_memory(tmp_path):
    """A small part of `tests/scripts/measure_npz_memory.py`; docs/sampling.md has what that measures in full."""
    script = SCRIPTS / "measure_npz_memory.py"
    command = [sys.executable, str(script), str(tmp_path / "a.npz"), "--num", "2000", "--size", "128"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["file_bytes"] > 2000 * 128 * 128 * 3
    assert measured["grown_bytes"] < 60e6  # of 98 MB of images


def _without(section: dict, key: str) -> dict:
    return {name: value for name, value in section.items() if name != key}
