"""Kills of each verb at random moments, in one process and in two; then the same command again.

In the end there is what an undisturbed command leaves: the same bits, no other files. A second process that a killed
one leaves alone is told to stop, as a launcher would, and has 20 s for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from random import Random

from .good import TINY, digest, place_small, use_cache
from .judge import Case, Verdict, copy, fault, kill, start, unclear

COUNT = 130
PATIENCE = 20.0  # seconds in which a process that was told to stop must have ended
LONG = 120.0
# Longer than a hurry and shorter than patience: each takes a second or two.
LINES = {
    "train": "train slow.yaml --out out",
    "train, a loader": "train slow.yaml --out out --set data.workers=1",
    "sample": "sample run --out out --num 60 --steps 6 --batch-size 4",
    "prepare": "prepare photos out --size 32 --autoencoder none --shard-size 8 --batch-size 4 --workers 2",
    "evaluate": "evaluate run --reference samples --metrics fd-digits --num 40 --steps 4 --batch-size 4",
    "tune": "tune run --metric recognised --scales 1,2,3 --intervals 0:1,0:0.5 --num 16 --confirm 1 --confirm-num 16"
    " --steps 2 --batch-size 4 --out out",
    "probe": "probe run --encoder digits-vit --num 60 --times 0.2,0.5,0.8 --out out",
    "cache": "train cached.yaml --out out",
    "convert": "convert run out --overwrite",
    "ema": "ema run --sigma-rel 0.08 --out out",
    "two train": "train slow.yaml --out out",
    "two sharded train": "train slow.yaml --out out --set train.sharding=fsdp2",
    "two sample": "sample run --out out --num 60 --steps 6 --batch-size 4",
    "two prepare": "prepare photos out --size 32 --autoencoder none --shard-size 8 --batch-size 4 --workers 2",
}
ORDER = ["train", "two train", "sample", "prepare", "evaluate", "tune", "train, a loader", "probe", "cache", "convert"]
ORDER += ["two sample", "ema", "two prepare", "two sharded train"]
NEEDS = ("run", "samples")
SLOW = TINY.replace("steps: 8", "steps: 24").replace("log_every: 2", "log_every: 3")
# Of a record, what tells how and when it was made.
VOLATILE = {
    "fingerprint",
    "seconds",
    "written",
    "time",
    "checkpoint",
    "images_per_second",
    "img/s",
    "steps_per_second",
    "hours",
    "data_wait",
}


def case(index: int, chance: Random) -> Case:
    name = ORDER[index % len(ORDER)]
    return Case(f"kill {index}: {name}", [LINES[name].split()], needs=NEEDS, owns=("out", "run", "cache"))


def judge(case: Case, folder: Path, good: Path) -> Verdict:
    """Kill the command one to three times, let it end, and compare with what it leaves undisturbed."""
    name, chance = case.name.partition(": ")[2], Random(case.name)
    expected, seconds = undisturbed(name, folder.parent, good)
    place(folder, good)
    begin = time.monotonic()
    kills = 0
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        number = chance.choice([signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGINT])
        codes, complaint = disturbed(name, folder, number, chance.uniform(0, 1.1 * seconds), chance)
        kills += 1
        if complaint:
            return told(folder, f"{signal.Signals(number).name}: {complaint}", begin)
        if not any(codes):
            break  # it was quicker
    codes, _ = ended(launch(name, folder), LONG)
    if any(codes):
        errors = text(folder)
        return told(folder, f"the last command ended with {codes}: {fault(errors)}", begin, "broken")
    if difference := first_difference(expected, content(folder / "work")):
        return told(folder, f"after {kills} kills: {difference}", begin, "silent")
    return told(folder, f"{kills} kills", begin, "fine")


def told(folder: Path, why: str, begin: float, outcome: str = "traceback") -> Verdict:
    outcome = "hang" if "still runs" in why else outcome
    said = text(folder, "said") + text(folder)
    return Verdict(outcome, why, seconds=time.monotonic() - begin, said=said)


def text(folder: Path, name: str = "errors") -> str:
    """What the processes have printed, which may have been killed before."""
    file = folder / name
    return file.read_text(errors="replace") if file.is_file() else ""


def undisturbed(name: str, folder: Path, good: Path) -> tuple[dict[str, str], float]:
    """What the command leaves, and how long it takes; kept in a file for all workers of the attack."""
    kept = folder / f"undisturbed {name}.json"
    if not kept.is_file():
        work = folder / f"undisturbed {name} {os.getpid()}"
        place(work, good)
        begin = time.monotonic()
        codes, _ = ended(launch(name, work), LONG)
        seconds = time.monotonic() - begin
        assert not any(codes), (work / "errors").read_text()
        aside = kept.with_name(f"{kept.name}.{os.getpid()}")
        aside.write_text(json.dumps([content(work / "work"), seconds]))
        os.replace(aside, kept)
        shutil.rmtree(work)
    expected, seconds = json.loads(kept.read_text())
    return expected, seconds


def place(folder: Path, good: Path) -> None:
    work = folder / "work"
    work.mkdir(parents=True)
    for name in NEEDS:
        copy(good / name, work / name)
    place_small(work)
    (work / "slow.yaml").write_text(SLOW)
    photos(work)


def photos(folder: Path) -> None:
    """Forty images, of which no two are alike."""
    from PIL import Image

    for i in range(40):
        file = folder / "photos" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 200), (6 * i, 255 - 6 * i, i)).save(file)


def launch(name: str, folder: Path) -> list[int]:
    """Begin the command in one process, or in two as a launcher does; their ids."""
    line = LINES[name].split()
    if line[0] == "train" and (folder / "work/out/recipe.yaml").is_file():
        line = ["train", "--resume", "out"]
    count = 2 if name.startswith("two ") else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = []
    for rank in range(count):
        given = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

        def enter(given=given) -> None:
            use_cache()
            if count > 1:
                os.environ.update(given)
            sys.argv = ["dic-repa", *line]

        case = Case(name, [line], prepare_process=enter)
        found.append(start(case, folder, whole_process))
    return found


def whole_process(lines: list[list[str]]) -> int:
    """The entry point of the program, which knows of signals."""
    from dic_repa.__main__ import main

    try:
        main()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    return 0


def disturbed(name: str, folder: Path, number: int, moment: float, chance: Random) -> tuple[list[int], str]:
    """Send a signal after `moment` seconds; the exit codes, and what was wrong with the end."""
    before = len(text(folder))
    children = launch(name, folder)
    codes, left = ended(children, moment)
    if left:
        struck = chance.choice(left)
        everyone = number == signal.SIGINT or chance.random() < 0.5  # a terminal, and most launchers, tell all
        for child in left if everyone else [struck]:
            with contextlib.suppress(ProcessLookupError):
                kill(child, number) if chance.random() < 0.5 else os.kill(child, number)
        if len(children) > 1 and not everyone:
            time.sleep(0.3)
            for child in left:
                kill(child, signal.SIGTERM)
    codes, left = ended(children, PATIENCE, codes)
    for child in children:
        kill(child)
    if left:
        ended(left, 5)
        return codes, f"{len(left)} processes still run after {PATIENCE:.0f} s"
    errors = text(folder)[before:]
    if "Traceback (most recent call last)" in errors and len(children) == 1:
        return codes, fault(errors)
    if odd := [code for code in codes if code not in (0, 2, 75, 130, -number, -signal.SIGTERM, -signal.SIGKILL)]:
        return codes, f"exit {odd}: {fault(errors)}"
    if 2 in codes and len(children) == 1:
        return codes, f"exit 2: {unclear(errors) or fault(errors)}"
    return codes, ""


def ended(children: list[int], seconds: float, known: list[int] | None = None) -> tuple[list[int], list[int]]:
    """Wait for processes; the exit codes of those that have ended, and those that have not after `seconds`."""
    codes, left = [*(known or [])], []
    deadline = time.monotonic() + seconds
    left = [child for child in children if child not in _over]
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                _over.add(child)
                left.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
        if time.monotonic() > deadline:
            break
        time.sleep(0.002)
    return codes, left


_over: set[int] = set()  # processes that were waited for


def content(work: Path) -> dict[str, str]:
    """All that must be the same, by name: hashes of pictures, weights and states, and records without times."""
    found = {}
    steps = sorted(work.glob("out/checkpoints/step_*"))
    for top in ("out", "run", "cache"):
        for file in sorted((work / top).rglob("*")):
            name = str(file.relative_to(work))
            if any(file.is_relative_to(step) for step in steps[:-1]):
                continue  # a signal adds one, and so another one of those before the last is kept
            if file.is_dir() or file.name in ("curves.png", "environment.json", "run.json", "manifest.json"):
                continue  # a manifest holds hashes of the files that are compared here
            data = file.read_bytes().replace(os.fsencode(work), b"WORK")
            if file.name == "metrics.jsonl":
                found[name] = json.dumps(losses(file))
            elif file.name.endswith(".jsonl"):
                found[name] = ""
            elif file.suffix == ".json":
                found[name] = json.dumps(steady(json.loads(data)), sort_keys=True)
            elif file.suffix == ".safetensors":
                found[name] = digest(file)
            else:
                found[name] = hashlib.sha256(data).hexdigest()[:16]
    return found


def losses(file: Path) -> list:
    return [[record.get("step"), record.get("loss")] for record in map(json.loads, file.read_text().splitlines())]


def steady(content: object) -> object:
    """A record without what tells how and when it was made."""
    if isinstance(content, dict):
        return {key: steady(value) for key, value in content.items() if key not in VOLATILE}
    return [steady(value) for value in content] if isinstance(content, list) else content


def first_difference(expected: dict[str, str], found: dict[str, str]) -> str:
    """Which files differ, and where the first does; '' if none does."""
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if not names:
        return ""
    one, other = expected.get(names[0], "not there"), found.get(names[0], "not there")
    at = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), 0)
    return f"{names[:4]}: {one[max(0, at - 40) : at + 40]!r} became {other[max(0, at - 40) : at + 40]!r}"
