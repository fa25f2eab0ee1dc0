"""What a cluster, a user and the numbers do to a run: signals, two at once, another recipe, values not finite."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY
from small_runs import SMALL, PoisonedDigits, assert_same, metrics, small_recipe, small_run, weights

from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.files.lock import locked
from dic_repa.files.outputs import LOCK, begin_folder
from dic_repa.runs import RunFolder
from dic_repa.runs.environment import _git_state
from dic_repa.training import EMA, Preempted, train
from dic_repa.training.checkpoint import CheckpointWriter, write_checkpoint
from dic_repa.training.inputs import data_order
from dic_repa.training.log import append_whole
from dic_repa.training.preemption import SIGNALS, ignore_signals, stop_request


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def poison(monkeypatch):
    """Make the samples of these steps (from 1) infinite; returns the overrides that train on them."""

    def apply(*steps, batch_size=4, seed=0):
        order = data_order(seed, 8000, batch_size)
        indices = [next(order) for _ in range(max(steps))]
        monkeypatch.setattr(PoisonedDigits, "poisoned", frozenset(indices[step - 1][0] for step in steps))
        return ["data.name=poisoned-digits"]

    return apply


def test_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, poison):
    every = ["train.checkpoint_every=1", "train.keep_checkpoints=8"]
    run = small_run(tmp_path / "run", *every, *poison(3, 6))
    for step in range(2, 9):
        before, after = (weights(run.checkpoint_path(s)) for s in (step - 1, step))
        names = [name for name in before if not name.startswith("ema ")]
        same = all(torch.equal(before[name], after[name]) for name in names)
        assert same == (step in (3, 6)), step
        assert all(tensor.isfinite().all() for tensor in after.values())
    records = metrics(run)
    assert [record["skipped"] for record in records] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [record["loss"] is None for record in records] == [step in (3, 6) for step in range(1, 9)]
    assert "NaN" not in run.metrics_file.read_text()


def test_averages_of_the_log_leave_out_what_is_not_finite(tmp_path, poison):
    each = small_run(tmp_path / "each", *poison(3))
    pairs = small_run(tmp_path / "pairs", "train.log_every=2", *poison(3))
    assert metrics(pairs)[1]["loss"] == metrics(each)[3]["loss"]  # of steps 3 and 4, that of step 4


def test_many_in_a_row_stop_the_run_and_dump_the_indices(tmp_path, poison):
    with pytest.raises(UserError, match=r"in the 3 steps up to 7.*not_finite.json; step_00000004 is the last"):
        small_run(tmp_path / "run", "train.max_skipped=3", *poison(2, 5, 6, 7))
    order = data_order(0, 8000, 4)
    expected = [{"step": step, "indices": next(order)} for step in range(1, 8)][4:]
    assert json.loads((tmp_path / "run/not_finite.json").read_text()) == expected
    assert RunFolder(tmp_path / "run").newest_checkpoint().name == "step_00000004"


def test_stop_is_told_beside_what_could_not_be_written(tmp_path, poison, monkeypatch):
    """The disk fills up at the last checkpoint, and is still full when the indices are to be written."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    def write(folder, *arguments):
        fail() if folder.name == "step_00000004" else write_checkpoint(folder, *arguments)

    monkeypatch.setattr("dic_repa.training.after_step.write_checkpoint", write)
    monkeypatch.setattr("dic_repa.training.after_step.write_whole", fail)
    says = (
        r"in the 2 steps up to 6, so the run stops; the indices of their samples could not be written "
        r"\(.*No space left on device\); the checkpoint .*step_00000004 could not be written \(.*\); step_00000002 is"
    )
    with pytest.raises(UserError, match=says):
        small_run(tmp_path / "run", "train.max_skipped=2", "train.checkpoint_every=2", *poison(5, 6))


def test_gradient_that_is_not_finite_is_skipped_though_the_loss_is(tmp_path, monkeypatch):
    from accelerate import Accelerator

    backward, passes = Accelerator.backward, []

    def explode(self, loss):
        passes.append(loss)
        backward(self, loss * float("inf") if len(passes) == 2 else loss)

    monkeypatch.setattr(Accelerator, "backward", explode)
    run = small_run(tmp_path / "run", "train.steps=3", "train.checkpoint_every=1", "train.keep_checkpoints=3")
    assert [record["skipped"] for record in metrics(run)] == [0, 1, 1]
    assert metrics(run)[1]["loss"] is not None
    assert metrics(run)[1]["gradient_norm"] is None
    one, two = (weights(run.checkpoint_path(step)) for step in (1, 2))
    assert_same({k: v for k, v in one.items() if k[:4] != "ema "}, {k: v for k, v in two.items() if k[:4] != "ema "})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_the_step_and_the_run_goes_on_the_same(tmp_path, monkeypatch, number):
    update = EMA.update

    def signalled(self, denoiser, step):
        update(self, denoiser, step)
        if step == 5:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a launcher passes on what the group has had already

    before = signal.getsignal(number)
    monkeypatch.setattr(EMA, "update", signalled)
    with pytest.raises(Preempted, match="has saved step 5"):
        small_run(tmp_path / "run")
    assert signal.getsignal(number) == before
    run = RunFolder(tmp_path / "run")
    assert run.newest_checkpoint().name == "step_00000005"
    monkeypatch.setattr(EMA, "update", update)
    small_run(run.path, resume=True)
    whole = small_run(tmp_path / "whole")
    assert_same(weights(run.checkpoint_path(8)), weights(whole.checkpoint_path(8)))
    assert [record["loss"] for record in metrics(run)] == [record["loss"] for record in metrics(whole)]


@pytest.mark.slow
def test_command_line_exits_with_75_and_says_how_to_go_on(tmp_path):
    arguments = [f"--set={key}" for key in ("train.steps=100000", "model.width=8", "model.depths=[1,1,1,1,1]",
                 "alignments=[]", "train.batch_size=4", "train.checkpoint_every=2", "data.workers=1")]  # fmt: skip
    command = [sys.executable, "-m", "dic_repa", "train", "digits-urepa", "--out", "run", *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    while not (tmp_path / "run/checkpoints/step_00000002").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)  # the loader's process as well
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].endswith("to go on: dic-repa train --resume run")
    assert not list((tmp_path / "run").rglob(".writing-*"))


def test_signal_before_the_first_step_and_after_the_last_exits_with_75(tmp_path, monkeypatch, capsys):
    def signalled(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.chdir(tmp_path)
    arguments = ["train", "digits-urepa", "--out=run", *TINY, "--set=alignments=[]", "--set=train.steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr("dic_repa.training.loop.build_parts", signalled)
        with pytest.raises(SystemExit, match="75"):
            main(arguments)
    assert capsys.readouterr().err.splitlines()[-1].endswith("; to go on: the same command")
    with monkeypatch.context() as patch:
        patch.setattr("dic_repa.cli.train.evaluate_and_show", signalled)
        with pytest.raises(SystemExit, match="75"):
            main(arguments)
    assert capsys.readouterr().err.splitlines()[-1].endswith("to go on: dic-repa train --resume run")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError("no"), "of the CPU"],
)
def test_full_memory_is_told_in_a_line(tmp_path, monkeypatch, capsys, error):
    def update(*_):
        if isinstance(error, str):
            torch.empty(2**60, dtype=torch.uint8)  # torch's own error
        raise error

    monkeypatch.setattr(EMA, "update", update)
    with pytest.raises(SystemExit) as exit:
        main(["train", "digits-urepa", "--out", str(tmp_path / "run"), *(f"--set={key}" for key in SMALL)])
    assert exit.value.code == 2
    says = {
        "of the CPU": "this machine's memory is full (1073741824.0 GiB more were asked for); lower train.micro_batch"
    }
    says |= {error: "this machine's memory is full (no); lower"} if isinstance(error, MemoryError) else {}
    expected = says.get(error, "the GPU's memory is full (CUDA out of memory); lower train.micro_batch")
    assert f"error: {expected}" in capsys.readouterr().err


def test_stop_request_outside_the_main_thread_leaves_signals_alone():
    seen = []

    def enter():
        with stop_request() as received:
            seen.append(bool(received))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]


def fork(action) -> int:
    """Do `action` in a process of its own; its id. Quicker than a new interpreter, which imports torch anew."""
    child = os.fork()
    if child:
        return child
    try:
        action()
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_two_runs_in_one_folder_and_the_lock_of_a_dead_one(tmp_path):
    folder = tmp_path / "run"
    begin_folder(folder, "run")

    def hold():
        with locked(folder):
            (tmp_path / "held").touch()
            time.sleep(100)

    owner = fork(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=rf"run is in use by process {owner} on .*; wait for it, or stop it"):
        small_run(folder)
    assert not (folder / "recipe.yaml").exists()
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    assert (folder / LOCK).exists()  # left behind, and yet it locks nothing
    small_run(folder, "train.steps=1")
    assert not (folder / LOCK).exists()


def test_what_a_kill_at_the_very_end_leaves_is_removed(tmp_path):
    run = small_run(tmp_path / "run", "train.steps=1")
    for left in (LOCK, ".writing-curves.png"):
        (run.path / left).write_bytes(b"half")
    with pytest.raises(SystemExit) as exit:
        main(["train", "--resume", str(run.path)])
    assert exit.value.code == 0
    assert not list(run.path.rglob(".writing-*"))


def test_lock_is_freed_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "run"):
        raise ZeroDivisionError
    with locked(tmp_path / "run"):
        pass


def test_other_recipe_is_refused_unless_allowed(tmp_path):
    small_run(tmp_path / "run", "train.steps=2")
    harmless = ["train.log_every=2", "train.keep_every=2", "train.max_skipped=3", "train.steps=3"]
    small_run(tmp_path / "run", *harmless, resume=True)
    changed = ["optimizer.learning_rate=0.5", "optimizer.weight_decay=0.1"]
    with pytest.raises(UserError, match=r"differ: optimizer.learning_rate: .*r.weight_decay: .*--allow-change"):
        small_run(tmp_path / "run", *changed, resume=True)
    run = small_run(tmp_path / "run", *changed, "train.steps=4", resume=True, allow_change=True)
    assert metrics(run)[-1]["learning_rate"] == 0.5
    assert run.recipe().optimizer.weight_decay == 0.1
    with pytest.raises(UserError, match="does not fit this AlignedDenoiser"):
        small_run(run.path, "model.width=12", "train.steps=5", resume=True, allow_change=True)
    assert run.recipe().model.width == 8  # a recipe that does not fit is not taken over


def test_second_run_in_a_process_may_have_another_precision(tmp_path):
    before = small_run(tmp_path / "float32", "train.steps=2")
    run = small_run(tmp_path / "bf16", "train.steps=2", "train.precision=bf16")
    again = small_run(tmp_path / "again", "train.steps=2")
    losses = [metrics(r)[1]["loss"] for r in (before, run, again)]  # the first one is of an output of zeros
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("place", ["the loader", "the step"])
def test_error_leaves_no_loader_process_that_would_hang_the_exit(tmp_path, monkeypatch, place):
    read = PoisonedDigits.__getitem__

    def fail(self, *arguments):
        if place == "the loader" and torch.utils.data.get_worker_info() is None:
            return read(self, *arguments)
        raise ZeroDivisionError

    monkeypatch.setattr(*(PoisonedDigits, "__getitem__") if place == "the loader" else (EMA, "update"), fail)
    with pytest.raises(ZeroDivisionError) as caught:  # whose traceback has all frames, as an uncaught one's
        small_run(tmp_path / "run", "data.workers=1", "data.name=poisoned-digits")
    assert not multiprocessing.active_children()
    assert caught.traceback


def test_line_that_does_not_fit_is_written_later_and_once(tmp_path):
    """A file-size limit stands in for the full disk: half of the line would fit."""
    file = tmp_path / "file"

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        append_whole(file, "one\n")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6, limits[1]))
        with pytest.raises(OSError):  # noqa: PT011
            append_whole(file, "two, longer\n")
        assert file.read_text() == "one\n"
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        append_whole(file, "two, longer\n")

    assert os.waitpid(fork(write), 0)[1] == 0
    assert file.read_text() == "one\ntwo, longer\n"


def test_git_state_is_that_of_the_package_alone(tmp_path):
    foreign = tmp_path / "venv/site-packages/dic_repa"
    foreign.mkdir(parents=True)
    (foreign / "run_folder.py").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    assert _git_state(str(foreign / "run_folder.py")) is None
    subprocess.run([*git, "add", "."], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert _git_state(str(foreign / "run_folder.py"))["commit"] == commit


def test_more_processes_than_samples_are_refused(tmp_path, monkeypatch):
    from dic_repa.training import parts

    class Two(PoisonedDigits):
        def __len__(self):
            return 2

    monkeypatch.setattr(parts, "build_dataset", lambda section: Two())
    accelerator = type("Accelerator", (), {"num_processes": 3, "device": torch.device("cpu")})()
    with pytest.raises(UserError, match="3 processes are more than the 2 samples of the data"):
        parts.build_parts(small_recipe(), accelerator)


def test_overwrite_takes_runs_only_and_spares_what_is_none(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a run"):
        train(small_recipe(), tmp_path / "mine", overwrite=True)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    begin_folder(tmp_path / "run", "run", ["recipe.yaml"])
    for left in (LOCK, ".writing-recipe.yaml"):  # killed before it had begun
        (tmp_path / "run" / left).write_text("")
    small_run(tmp_path / "run", "train.steps=1")
    assert not list(Path(tmp_path / "run").glob(".writing-*"))
    (tmp_path / "run/checkpoints").rename(tmp_path / "scratch")
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(UserError, match="run/checkpoints is in the way of a new run"):
        small_run(tmp_path / "run", "train.steps=1", overwrite=True)
    assert (tmp_path / "scratch/step_00000001").is_dir()  # what a link leads to is not ours to remove


def test_appending_makes_the_file(tmp_path):
    append_whole(tmp_path / "new", "line\n")
    assert (tmp_path / "new").read_text() == "line\n"


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system does not tell who sent a signal")
def test_a_loader_process_obeys_its_parent_alone():
    """A signal to the whole group must not cost the batches of the step that is going on, nor hang Python's exit."""
    ready, done = multiprocessing.Pipe()

    def work() -> None:
        ignore_signals()
        while True:
            message = done.recv()
            while signal.sigpending() & set(SIGNALS):  # the next one would be merged into one that still waits
                time.sleep(0.01)
            done.send(message)

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    ready.send("begun")
    assert ready.recv() == "begun"
    for name in ("USR1", "TERM", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        ready.send(name)
        assert ready.recv() == name
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


def test_an_interrupt_leaves_what_is_being_written_whole(tmp_path, request):
    begun, written = threading.Event(), []

    def write() -> None:
        begun.set()
        time.sleep(1)
        written.append(True)

    def interrupt() -> None:
        begun.wait()
        time.sleep(0.2)  # the main thread waits by now
        os.kill(os.getpid(), signal.SIGINT)

    # A shell that runs the tests in the background ignores interrupts, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    threading.Thread(target=interrupt).start()
    with contextlib.suppress(KeyboardInterrupt), CheckpointWriter(RunFolder(tmp_path)) as writer:
        writer.start(1, write)
        writer.finish()
        pytest.fail("the interrupt came too late")
    assert written


def test_weights_and_reference_of_the_metrics_are_missed_before_training(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    scored = [key for key in SMALL if key != "evaluate=null"]
    with pytest.raises(UserError, match=r"evaluate: the Inception weights cannot be fetched .*; or train with --set"):
        small_run(tmp_path / "run", "evaluate.metric=is", base=scored)
    with pytest.raises(UserError, match="evaluate: there is no reference nowhere to compare samples with"):
        small_run(tmp_path / "run", "evaluate.metric=fd-digits", "evaluate.reference=nowhere", base=scored)
    assert not (tmp_path / "run").exists()


def test_run_that_may_not_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    run = small_run(tmp_path / "run", "train.steps=1")
    access, parts = os.access, "dic_repa.training.loop.build_parts"
    monkeypatch.setattr(parts, lambda *_: pytest.fail("was built"))
    # Folders that are read-only to everybody, an administrator too, cannot be made by a test.
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(run.path) and access(path, mode))
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"run/.* cannot be written: no permission to write into"):
            small_run(run.path, "train.steps=2", **options)
