"""`prepare --share`: several commands fill one data set, each with shards that nobody has, whatever happens to one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from pictures import write_tree
from prepare_slowly import SlowHalves, preparation
from prepare_slowly import run as prepare_quickly

from dic_repa.files import claims
from dic_repa.files.claims import ClaimLost, Claims, find_claims
from dic_repa.files.lock import locked
from dic_repa.files.outputs import begin_folder

FORKS = multiprocessing.get_context("fork")
SHARE = ("prepare", "tree", "out", "--size=16", "--autoencoder=none", "--shard-size=3", "--share")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "BEAT", 0.05)
    monkeypatch.setattr(claims, "LOOK", 0.02)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("source") / "tree", {"a": 10, "b": 14}, size=(40, 36))


@pytest.fixture(scope="module")
def whole(tree) -> dict[str, bytes]:
    """What one process makes: six shards of four images."""
    prepare_quickly(tree, tree.parent / "whole", seconds=0)
    return content(tree.parent / "whole")


def content(folder: Path) -> dict[str, bytes]:
    names = {"latents.json", "state.json", "dataset_info.json"}
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".arrow" or file.name in names}


def worker(tree: Path, out: Path, seconds: float):
    process = FORKS.Process(target=prepare_quickly, args=(tree, out, seconds, True))
    process.start()
    return process


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def other_machines(file: Path, token: str = "0123abcd") -> Path:
    """The claim of a process on another machine."""
    owner = {"token": token, "process": 17, "host": "node7", "place": "another machine"}
    file.write_text(json.dumps(owner))
    return file


def test_three_commands_make_what_one_makes(tree, whole, tmp_path):
    processes = [worker(tree, tmp_path / "out", 0.05) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert content(tmp_path / "out") == whole
    assert not list((tmp_path / "out").glob(".writing-*"))


def test_one_of_two_is_killed_in_the_middle_of_a_shard(tree, whole, tmp_path):
    """The other takes its shard: nothing is lost, doubled, or left behind."""
    out = tmp_path / "out"
    killed = worker(tree, out, 60)
    until(lambda: list(out.glob(".writing-*~data-*")))
    (aside,) = out.glob(".writing-*~data-*")
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert [file.name for file in out.glob(".writing-data-*.lock")] == [".writing-data-00000-of-00006.arrow.lock"]
    assert aside.exists()
    assert not find_claims(out)
    prepare_quickly(tree, out, 0, share=True)
    assert content(out) == whole
    assert not list(out.glob(".writing-*"))


def test_a_machine_that_falls_silent(tree, whole, tmp_path, monkeypatch, capsys):
    """Its claim holds as long as it is touched, and is taken over when it has not been for a while."""
    out = tmp_path / "out"
    work = preparation(tree, out, SlowHalves(0), shard_size=4, claims=Claims(out))
    work.begin()
    claim = other_machines(out / ".writing-data-00002-of-00006.arrow.lock")
    (out / ".writing-0123abcd~data-00002-of-00006.arrow").write_bytes(b"half")
    assert find_claims(out) == {claim: "process 17 on node7"}
    monkeypatch.setattr(claims, "DEAD", 0.4)
    began = time.monotonic()
    prepare_quickly(tree, out, 0, share=True)
    assert time.monotonic() - began > 0.3
    assert f"waiting for the last shards of {out}, which process 17 on node7 write" in capsys.readouterr().err
    assert content(out) == whole
    assert not list(out.glob(".writing-*"))


def test_a_command_that_was_taken_for_dead_throws_its_shard_away(tree, tmp_path):
    out = tmp_path / "out"
    work = preparation(tree, out, SlowHalves(0), shard_size=4, claims=Claims(out))
    work.begin()
    name = next(iter(work._shards))
    with Claims(out).claim(name) as others:
        assert others
        with pytest.raises(ClaimLost):
            work._write_shard(name, work._encoded(map(work._load, range(4))))
        with work.claims.claim(name) as mine:
            assert not mine
    assert not (out / name).exists()
    assert not list(out.glob(".writing-*"))
    with work.claims.claim(name) as mine:
        assert mine
        work._write_shard(name, work._encoded(map(work._load, range(4))))
    assert (out / name).exists()


def test_a_claim_is_kept_fresh_and_its_owner_found(tmp_path):
    (tmp_path / "out").mkdir()
    file = tmp_path / "out/.writing-a.lock"
    with Claims(tmp_path / "out").claim("a") as mine:
        assert mine
        os.utime(file, (1, 1))
        until(lambda: file.stat().st_mtime > time.time() - 100)
        assert find_claims(tmp_path / "out")[file].startswith(f"process {os.getpid()} on ")
        with Claims(tmp_path / "out").claim("a") as others:
            assert not others
    assert not file.exists()


def test_a_clock_that_is_wrong_kills_nobody(tmp_path, monkeypatch):
    begin_folder(tmp_path / "out", "prepared")
    now = time.time
    with Claims(tmp_path / "out").claim("a"):
        monkeypatch.setattr(time, "time", lambda: now() + 3600)
        with Claims(tmp_path / "out").claim("a") as others:
            assert not others


def test_the_last_command_says_that_all_is_done(tmp_path, here, mistake):
    write_tree(tmp_path / "tree", {"cat": 7})
    assert "7 of 7 images" in here(*SHARE)
    said = here(*SHARE)
    assert "out is complete: another command has made the last shards" in said
    assert "7 of 7 images" in said
    next((tmp_path / "out").glob("*.arrow")).unlink()
    assert "is complete" not in here(*SHARE)
    assert "another size; choose" in mistake(*(SHARE[:3]), "--size=24", *SHARE[4:])


def test_shared_and_not_shared_commands_do_not_mix(tmp_path, here, mistake):
    write_tree(tmp_path / "tree", {"cat": 7})
    here(*SHARE)
    (tmp_path / "out/data-00001-of-00003.arrow").unlink()
    claim = other_machines(tmp_path / "out/.writing-data-00001-of-00003.arrow.lock")
    plain = SHARE[:-1]
    assert "out is in use by process 17 on node7, which shares the work: help it with --share" in mistake(*plain)
    aside = tmp_path / "out/.writing-0123abcd~data-00001-of-00003.arrow"
    aside.write_bytes(b"half")
    os.utime(claim, (time.time() - 2 * claims.DEAD,) * 2)
    here(*plain)
    assert not claim.exists()
    assert not aside.exists()
    (tmp_path / "out/data-00001-of-00003.arrow").unlink()
    process = FORKS.Process(target=_hold, args=(tmp_path / "out",))
    process.start()
    until(lambda: claims.holder(tmp_path / "out/.writing-lock"))
    assert f"out is in use by process {process.pid} on " in (line := mistake(*SHARE))
    assert line.endswith("stop it and start it with --share, or wait")
    process.kill()
    process.join()
    here(*SHARE)


def _hold(folder: Path) -> None:
    with locked(folder):
        time.sleep(60)
