"""What a run says before its first step, and how many threads it takes."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from conftest import TINY
from small_runs import small_run

from dic_repa.cli import main
from dic_repa.models import DiC
from dic_repa.runtime import threads


def test_header_says_what_runs_and_the_bar_the_denoising_loss_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    more = ["--set=train.steps=4", "--set=train.micro_batch=2", "--set=evaluate=null"]
    with pytest.raises(SystemExit, match="0"):
        main(["train", "digits-urepa", *TINY, *more])
    err = capsys.readouterr().err
    lines = err.splitlines()
    assert lines[0] == "training into runs/digits-urepa: 4 steps of 8 images"
    said = dict(line.split(maxsplit=1) for line in lines[1:8])
    assert list(said) == ["device", "denoiser", "data", "encoder", "batch", "steps", "folder"]
    assert said["device"].startswith("CPU, no GPU, float32, 1 thread")
    parameters = sum(p.numel() for p in DiC(8, (1, 1, 1, 1, 1), in_channels=1, num_classes=10).parameters())
    assert said["denoiser"].startswith(f"DiC, {parameters / 1e6:.4g} M parameters, ")
    assert said["data"] == "digits, 8,000 samples of 1 x 16 x 16, 10 classes"
    assert said["encoder"] == "digits-vit at mid.0, weight 0.5"
    assert said["batch"] == "8 = 1 process x 8 in 4 passes of 2"
    assert "[" in err
    shown = err.rpartition("[")[2]
    assert shown.index("denoising=") < shown.index(" loss=") < shown.index("alignment similarity=")
    monkeypatch.setattr("dic_repa.runtime.progress._level", "normal")  # back to which it goes after the test
    with pytest.raises(SystemExit, match="0"):
        main(["train", "digits-urepa", *TINY, *more, "--out=other", "--quiet"])
    assert capsys.readouterr().err == ""


def test_a_resumed_run_says_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dic_repa.runtime.progress._level", "normal")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = small_run(tmp_path / "run", "train.steps=4")
    capsys.readouterr()
    small_run(run.path, "train.steps=8", resume=True)
    assert "steps     8, 4 of them done" in capsys.readouterr().err


def test_first_line_comes_before_torch(dic_repa, tmp_path):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/torch.py").write_text("import os\nos._exit(9)\n")
    done = dic_repa(
        "train", "digits-urepa", check=False, env={"PYTHONPATH": str(tmp_path / "modules"), "WORLD_SIZE": "2"}
    )
    assert done.returncode == 9
    assert done.stderr == "training into runs/digits-urepa: 1,000 steps of 64 images, shared by 2 processes\n"


@pytest.fixture
def chosen(monkeypatch):
    """The number of threads, and the reason, on a machine of eight cores of which others keep some busy."""

    def choose(busy: float, **environment: str) -> tuple[int, str]:
        taken = [8]
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(threads, "allowed_cores", lambda: 8)
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        monkeypatch.setattr(torch, "get_num_threads", lambda: taken[-1])
        monkeypatch.setattr(torch, "set_num_threads", taken.append)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(threads, "_reason", "")
        monkeypatch.setattr(threads.CoreWatch, "others", lambda _: busy)
        threads.choose_threads(tell=False)
        return taken[-1], threads.describe_threads()

    return choose


def test_threads_leave_busy_cores_to_others(chosen):
    assert chosen(0.2) == (8, "8 threads of 8 cores")
    assert chosen(3.4)[0] == 5
    count, said = chosen(11.0)
    assert count == 1
    assert said.startswith("1 thread of 8 cores, since others keep about 11.0 busy; OMP_NUM_THREADS=8 takes all")


def test_threads_are_shared_by_processes_and_the_users_word_holds(chosen):
    assert chosen(6.0, LOCAL_WORLD_SIZE="4") == (2, "2 threads of 8 cores, for 4 processes")
    assert chosen(6.0, OMP_NUM_THREADS="6") == (8, "8 threads as OMP_NUM_THREADS says")  # which torch has read


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_others_do_is_measured(monkeypatch):
    """Of ten seconds others' work took 15 on the cores, and ours 8."""
    times = iter([(100.0, 1000.0, 5.0), (110.0, 1023.0, 13.0)])
    monkeypatch.setattr(threads.CoreWatch, "_now", staticmethod(lambda: next(times)))
    assert threads.CoreWatch().others() == pytest.approx(1.5)
