"""One writer at a time: a second command is refused, or waits, and what a dead one left is taken over."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import numpy as np
import pytest
import torch
from pictures import write_tree

from dic_repa.alignment.cache import feature_cache
from dic_repa.data import Digits
from dic_repa.encoders import create_encoder
from dic_repa.errors import UserError
from dic_repa.files.lock import holder, locked, locked_output
from dic_repa.files.outputs import LOCK, begin_folder, foreign, remove_folder
from dic_repa.recipe import SampleSection
from dic_repa.runtime.processes import start_processes
from dic_repa.sampling.folder import SampleFolder, sample_into, sample_spec
from dic_repa.sampling.labels import draw_labels
from dic_repa.sampling.load import load


@contextlib.contextmanager
def another_process(enter, place, seconds: float = 60):
    """A process that has entered `enter(place)`, killed at the end; its id. Forked: a new one imports torch anew."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        with enter(place):
            os.write(write, b"!")
            time.sleep(seconds)
        os._exit(0)
    try:
        assert os.read(read, 1) == b"!"
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(tmp_path):
    folder = tmp_path / "out"
    with another_process(locked, folder) as owner:
        assert holder(folder / LOCK).startswith(f"process {owner} on ")
        with (
            pytest.raises(UserError, match=rf"out is in use by process {owner} on .*; wait for it, or stop it"),
            locked(folder),
        ):
            pass
    assert (folder / LOCK).exists()  # left behind, and yet it locks nothing
    assert holder(folder / LOCK) is None
    with locked(folder), locked(folder):  # the same process may enter twice
        begin_folder(folder, "tune")
        assert holder(folder / LOCK) is not None
        assert foreign(folder) == []
    assert not (folder / LOCK).exists()


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a/b"):
        raise ZeroDivisionError
    assert not (tmp_path / "a/b").exists()
    with locked(tmp_path / "kept"):
        begin_folder(tmp_path / "kept", "tune")
    with another_process(locked, tmp_path / "kept"):
        pass
    remove_folder(tmp_path / "kept")  # with the lock of a dead process
    assert not (tmp_path / "kept").exists()


def test_a_link_in_a_locks_place_is_not_followed(tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError, match=r"out"), locked(tmp_path / "out"):
        pass
    assert (tmp_path / "thesis").read_text() == "years of work"


@pytest.mark.parametrize(
    ("line", "place", "enter"),
    [
        ("sample CHECKPOINT --num 4 --out PLACE", "samples", locked),
        ("sample CHECKPOINT --num 4 --out PLACE --overwrite", "samples", locked),
        (
            "evaluate --quiet CHECKPOINT --metrics fd-digits --reference digits --num 9",
            "samples/tiny-9-euler-1",
            locked,
        ),
        ("tune CHECKPOINT --num 20 --scales 2 --intervals 0:1 --out PLACE", "tune", locked),
        ("prepare tree PLACE --size 16 --autoencoder none", "prepared", locked),
        ("convert CHECKPOINT PLACE", "converted", locked_output),
        ("convert CHECKPOINT PLACE", "converted.pt", locked_output),
    ],
)
def test_two_commands_in_one_folder(tmp_path, checkpoint, mistake, line, place, enter):
    write_tree(tmp_path / "tree", {"cat": 1})
    words = {"CHECKPOINT": checkpoint, "PLACE": tmp_path / place}
    with another_process(enter, tmp_path / place) as owner:
        assert f"{place} is in use by process {owner} on " in mistake(*(words.get(w, w) for w in line.split()))
        there = [file.name for file in tmp_path.rglob("*") if file.is_file()]
        assert sorted(there) == sorted({*there} & {"000.png", LOCK, f".writing-{place}.lock"})


def test_the_samples_that_a_killed_writer_left(tmp_path, checkpoint, monkeypatch):
    """Half of an image is under another name until it is whole."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    loaded, settings = load(checkpoint), SampleSection(num=4, solver="euler", steps=1, guidance=None)
    labels = draw_labels(loaded.recipe, loaded.condition, settings)
    folder = SampleFolder(tmp_path / "out", sample_spec(loaded, settings, labels))
    sample_into(folder, loaded.sampler(settings), labels, start_processes())
    for name in (".writing-000003.png", LOCK):
        (folder.path / name).write_bytes(b"half")
    sample_into(folder, loaded.sampler(settings), labels, start_processes())
    assert not list(folder.path.glob(".writing-*"))


class FewDigits(Digits):
    def __len__(self):
        return 70


def test_a_second_run_waits_for_the_feature_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIC_REPA_CACHE", str(tmp_path))
    encoder, data = create_encoder("digits-vit"), FewDigits()
    with torch.no_grad():
        file = feature_cache("digits-vit", {}, encoder, data).file
    whole = file.read_bytes()
    file.unlink()
    dead = [tmp_path / name for name in (".writing-17-old.npy", ".writing-other.npy")]
    for left in dead:
        left.write_bytes(b"half of a cache")
    writing = tmp_path / ".writing-live.npy"
    writing.write_bytes(b"half of a cache")
    with another_process(locked_output, tmp_path / "live.npy"):
        with another_process(locked_output, file, seconds=0.5) as owner:
            cache = feature_cache("digits-vit", {}, encoder, data)
        assert f"waiting for process {owner} on " in capsys.readouterr().err
        assert file.read_bytes() == whole
        assert not any(left.exists() for left in dead)
        assert writing.exists()
    np.testing.assert_array_equal(cache[3].numpy(), np.load(file)[3])
