"""What a loader does to a run: processes killed and stopped, reads that never end, errors; what a resumed run shows.

A loader process reads ahead, and takes with it what it has read: so a run may end before the step that the test names.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from small_runs import PoisonedDigits, assert_same, metrics, small_run, weights

from dic_repa.errors import UserError
from dic_repa.runs import RunFolder
from dic_repa.training import EMA, Preempted
from dic_repa.training.inputs import data_order

TIMES = ("seconds", "images_per_second", "data_wait")
DATA = "data.name=poisoned-digits"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, action)`: reading the first sample of that step's batch does `action` first."""

    def set_action(step: int, action) -> None:
        order, read = data_order(0, 8000, 4), PoisonedDigits.__getitem__
        index = [next(order) for _ in range(step)][-1][0]

        def act(self, i):
            if i == index:
                action()
            return read(self, i)

        monkeypatch.setattr(PoisonedDigits, "__getitem__", act)

    return set_action


def logged(run: RunFolder) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in metrics(run)]


def stop_this_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_killed_loader_process_costs_nothing(tmp_path, at_step, monkeypatch):
    """The log is between two lines; the run goes on with the same lines and weights as an undisturbed one."""
    keys = (DATA, "train.log_every=4")
    with monkeypatch.context():
        at_step(6, lambda: os.kill(os.getpid(), signal.SIGKILL))
        lost = r"run stops, since process 0 has lost a loader process, killed by SIGKILL \(no memory left\? .*\), and "
        with pytest.raises(Preempted, match=lost + r"with it the batch of step [246], and has saved step [135]$"):
            small_run(tmp_path / "run", *keys, "data.workers=2")
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = small_run(tmp_path / "run", *keys, resume=True)
    whole = small_run(tmp_path / "whole", *keys)
    assert logged(run) == logged(whole)
    assert_same(weights(run.checkpoint_path(8)), weights(whole.checkpoint_path(8)))


@pytest.mark.parametrize("workers", [3, 0])
def test_signal_saves_though_no_batch_comes(tmp_path, at_step, workers):
    """Three loader processes that are stopped cannot end by themselves; a read of a FIFO in this process never ends."""
    os.mkfifo(tmp_path / "fifo")
    reached = tmp_path / "reached"

    def stall() -> None:
        reached.touch()
        stop_this_process() if workers else Path(tmp_path / "fifo").read_bytes()

    def terminate() -> None:
        while not reached.exists():
            time.sleep(0.01)
        time.sleep(0.3)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    sent: list[float] = []
    at_step(3, stall)
    threading.Thread(target=terminate).start()
    with pytest.raises(Preempted, match="was stopped by a signal, and has saved step 2"):
        small_run(tmp_path / "run", DATA, f"data.workers={workers}")
    assert time.monotonic() - sent[0] < 10
    assert RunFolder(tmp_path / "run").newest_checkpoint().name == "step_00000002"


def test_stalled_loader_is_warned_of_and_then_ends_the_run(tmp_path, at_step, capsys):
    at_step(3, stop_this_process)
    with pytest.raises(
        Preempted, match=r"process 0 has waited 1 s for the batch of step [1-3], longer than timeouts.data"
    ):
        small_run(tmp_path / "run", DATA, "data.workers=1", "train.loader_timeout=0.3", "timeouts.data=0.8")
    assert "the loader is stalled (a slow or dead disk or network? see data.workers)" in capsys.readouterr().err


@pytest.mark.parametrize("error", [UserError("a.png is damaged"), PermissionError(13, "Permission denied", "a.png")])
@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_the_data_is_one_line_and_the_steps_before_it_are_saved(tmp_path, at_step, error, workers):
    def fail() -> None:
        raise error

    at_step(4, fail)
    with pytest.raises((UserError, OSError), match=r"a\.png") as caught:
        small_run(tmp_path / "run", DATA, f"data.workers={workers}")
    assert "\n" not in str(caught.value)
    assert RunFolder(tmp_path / "run").newest_checkpoint().name == "step_00000003"


def test_interrupted_grid_and_scores_are_made_up_for(tmp_path, monkeypatch):
    keys = [
        "train.sample_every=4",
        "sample.steps=1",
        "sample.batch_size=10",
        "train.log_every=3",
        "evaluate.metric=digits",
    ]
    keys += ["evaluate.every=4", "evaluate.num=20"]
    update = EMA.update

    def signalled(self, denoiser, step):
        update(self, denoiser, step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(EMA, "update", signalled)
    with pytest.raises(Preempted, match="saved step 4"):
        small_run(tmp_path / "run", *keys)
    run = RunFolder(tmp_path / "run")
    assert not list(run.samples.iterdir())
    monkeypatch.setattr(EMA, "update", update)
    small_run(run.path, *keys, resume=True)
    whole = small_run(tmp_path / "whole", *keys)
    assert logged(run) == logged(whole)
    for folder in ("samples", "evaluation"):
        names = sorted(file.name for file in (whole.path / folder).iterdir() if file.suffix == ".png")
        assert len(names) == 2
        for name in names:
            assert (run.path / folder / name).read_bytes() == (whole.path / folder / name).read_bytes()
