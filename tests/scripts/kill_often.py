"""Kill a small run again and again, and compare what comes out with a run that nobody disturbed.

    python tests/scripts/kill_often.py --kills 50

Each session is a process of its own that trains or resumes the same run until it gets a SIGKILL: while it starts, at a
random moment, at the moment when a checkpoint is begun or named, or at a random moment with a file of the newest
checkpoint cut short, a byte of it changed, or it removed afterwards. The kills are spread over the whole run; the last
comes while its last checkpoint is written. In the end the weights, their averages, the optimizer's state and the logged
losses must be those of the undisturbed run, bit for bit, and nothing may be left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from safetensors.torch import load_file

from dic_repa.recipe import load_recipe
from dic_repa.runs.checkpoints import checkpoint_step
from dic_repa.runs.folder import RunFolder
from dic_repa.training import train

MOMENTS = ["starting", "random", "writing", "named", "random and damaged"]
EVERY = 4  # steps from a checkpoint to the next
SMALL = [
    "model.width=8",
    "model.depths=[1,1,1,1,1]",
    "alignments=[]",
    "train.batch_size=4",
    "train.log_every=3",
    f"train.checkpoint_every={EVERY}",
    "train.keep_checkpoints=3",
    "train.sample_every=0",
    "train.power_ema=[0.05,0.1]",
    "train.snapshot_every=8",
    "evaluate=null",
]


def begin_session(path: Path, steps: int) -> int:
    """Train at `path`, or go on there, in a process of its own; its id.

    A fork of this process, which has imported everything already: a session starts in a fraction of a second.
    """
    child = os.fork()
    if child:
        return child
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(os.open(path.with_name("errors.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        torch.set_num_threads(1)
        recipe = load_recipe("digits-urepa", [*SMALL, f"train.steps={steps}"])
        train(recipe, path, resume=(path / "recipe.yaml").is_file())
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def ended(child: int) -> int | None:
    """The exit code of a session that has ended, None of one that goes on."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait_for_moment(
    child: int, run: RunFolder, moment: str, goal: int, chance: random.Random, seconds: float
) -> int | None:
    """Return when it is time to kill the session, near the step `goal`; its exit code where it ended before.

    `seconds` is about the time from a checkpoint to the next.
    """
    if moment == "starting":
        return wait(child, lambda: False, chance.uniform(0, 0.5))
    code = wait(child, lambda: newest_step(run) >= goal - EVERY)
    if code is None and moment == "writing":
        code = wait(child, lambda: any(run.checkpoints.glob(".writing-*")))
    elif code is None and moment == "named":
        before = newest_step(run)
        code = wait(child, lambda: newest_step(run) > before)
    if code is None:
        longest = seconds if moment.startswith("random") else 0.01
        code = wait(child, lambda: False, chance.choice([0, chance.uniform(0, longest)]))
    return code


def wait(child: int, condition: Callable[[], bool], seconds: float = 60) -> int | None:
    """Until `condition` holds or `seconds` are over; the session's exit code where it ends before."""
    deadline = time.monotonic() + seconds
    while (code := ended(child)) is None and time.monotonic() < deadline and not condition():
        time.sleep(0.0005)
    return code


def newest_step(run: RunFolder) -> int:
    return max(map(checkpoint_step, run.list_checkpoints()), default=0)


def damage(run: RunFolder, chance: random.Random) -> str:
    """Damage a file of the newest checkpoint, where there is an older one to go on from."""
    folders = sorted(run.list_checkpoints(), key=checkpoint_step)
    if len(folders) < 2:
        return "nothing to damage yet"
    file = chance.choice(sorted(file for file in folders[-1].rglob("*") if file.is_file()))
    kind, content = chance.choice(["cut short", "changed", "removed"]), bytearray(file.read_bytes())
    if kind == "cut short":
        os.truncate(file, chance.randrange(len(content)))
    elif kind == "changed":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    else:
        file.unlink()
    return f"{file.name} {kind}"


def run_undisturbed(path: Path, steps: int) -> float:
    """The run to compare with; the seconds that it took."""
    begin = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(begin_session(path, steps), 0)[1])
    assert code == 0, path.with_name("errors.txt").read_text()
    return time.monotonic() - begin


def kill_until_done(
    whole: RunFolder, path: Path, kills: int, steps: int, chance: random.Random, seconds: float
) -> Counter:
    """The disturbed run; how often it was killed, and how."""
    run, happened = RunFolder(path), Counter()
    while (done := sum(happened.values())) < kills:
        moment = "writing" if done == kills - 1 else chance.choice(MOMENTS)
        goal = steps * (done + 1) // kills
        child = begin_session(path, steps)
        code = wait_for_moment(child, run, moment, goal, chance, seconds)
        if code is not None:
            assert code == 0, path.with_name("errors.txt").read_text()
            compare(whole, run)
            print("the run came to its end, as it should be; another is begun", flush=True)
            shutil.rmtree(path)
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        happened[moment] += 1
        print(f"kill {done + 1} ({moment}) after the checkpoint of step {newest_step(run)}", flush=True)
        if moment.endswith("damaged"):
            print(f"  {damage(run, chance)}")
    run_undisturbed(path, steps)
    return happened


def tensors(run: RunFolder) -> dict[str, torch.Tensor]:
    """All that a run ends with: weights, averages, optimizer state, snapshots."""
    found, newest = {}, run.newest_checkpoint()
    for file in [*newest.rglob("*.safetensors"), *run.snapshots.iterdir()]:
        name = file.relative_to(newest if file.is_relative_to(newest) else run.path)
        found |= {f"{name}:{key}": value for key, value in load_file(file).items()}
    for i, state in torch.load(newest / "optimizer.pt", weights_only=True)["state"].items():
        found |= {f"optimizer {i}:{key}": value for key, value in state.items()}
    return found


def compare(whole: RunFolder, killed: RunFolder) -> None:
    """Raise an AssertionError where the killed run is not the whole one, or has left something behind."""
    expected, found = tensors(whole), tensors(killed)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different, different
    losses = [
        [(r["step"], r["loss"]) for r in map(json.loads, run.metrics_file.read_text().splitlines())]
        for run in (whole, killed)
    ]
    assert losses[0] == losses[1]
    files = [
        sorted(str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file())
        for run in (whole, killed)
    ]
    assert files[0] == files[1], set(files[0]) ^ set(files[1])


def main(kills: int, steps: int, seed: int, folder: Path) -> Counter:
    """Run both, and compare them."""
    whole, killed = RunFolder(folder / "whole"), RunFolder(folder / "killed")
    seconds = run_undisturbed(whole.path, steps)
    print(f"undisturbed: {steps} steps in {seconds:.1f} s")
    happened = kill_until_done(whole, killed.path, kills, steps, random.Random(seed), seconds * EVERY / steps)
    compare(whole, killed)
    return happened


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        happened = main(arguments.kills, arguments.steps, arguments.seed, Path(folder))
    print(f"{sum(happened.values())} kills {dict(happened)}: the same as undisturbed, bit for bit; nothing left behind")
