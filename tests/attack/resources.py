"""A full disk, a folder that may only be read, 32 open files, little memory: under each verb that writes.

A full disk is a limit on the size of a file: what is written beyond it fails as on a full disk. What may only be read
binds no administrator, so the process gives up that right first, where it has it.
"""

from __future__ import annotations

import contextlib
import os
import resource
from functools import partial
from pathlib import Path
from random import Random

from .good import place_small, use_cache
from .judge import Case
from .kills import LINES, NEEDS, SLOW

VERBS = ["train", "sample", "prepare", "evaluate", "tune", "probe", "cache", "convert", "ema", "report"]
SIZES = [2000, 10_000, 40_000, 150_000, 400_000]  # bytes; what a case says must fit into the least
SHORT = LINES | {"report": "report run --out out/report.html"}
NOBODY = 65534


def full(size: int) -> None:
    use_cache()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def few_files() -> None:
    use_cache()
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))


def unprivileged() -> None:
    use_cache()
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def place(folder: Path) -> None:
    from .kills import photos

    place_small(folder)
    photos(folder)
    (folder / "slow.yaml").write_text(SLOW)


def read_only(target: str, folder: Path) -> None:
    """Give all to nobody, and take the right to write from the folder that the verb writes into."""
    place(folder)
    for name in ("out", "cache"):
        (folder / name).mkdir(exist_ok=True)
    if os.geteuid() == 0:
        for path in [folder.parent, folder, *folder.parent.rglob("*")]:
            with contextlib.suppress(OSError):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        for parent in folder.parents:
            if parent.stat().st_uid == 0 and parent.name.startswith("attack-"):
                parent.chmod(0o755)
    (folder / target).chmod(0o555)
    if target == "out":
        (folder / "out").rmdir()
        folder.chmod(0o555)


CASES = [
    *((f"a full disk at {size} bytes: {verb}", verb, place, partial(full, size)) for size in SIZES for verb in VERBS),
    *((f"a read-only folder: {verb}", verb, partial(read_only, "out"), unprivileged) for verb in VERBS),
    *(
        (f"a read-only run: {verb}", verb, partial(read_only, "run"), unprivileged)
        for verb in ("evaluate", "tune", "ema")
    ),
    ("a read-only cache: cache", "cache", partial(read_only, "cache"), unprivileged),
    *((f"32 open files: {verb}", verb, place, few_files) for verb in VERBS),
]
COUNT = len(CASES)


def case(index: int, chance: Random) -> Case:
    """Each of `CASES` once."""
    name, verb, put, take = CASES[index]
    must = "work" if name.startswith("32") else "answer"
    line = ["--quiet", *SHORT[verb].split()]
    return Case(name, [line], put, NEEDS, must, whole, ("out", "run", "cache"), prepare_process=take)


def whole(folder: Path) -> str:
    """What a verb that ended well has left unfinished."""
    left = [path.name for path in folder.rglob(".writing-*")]
    return f"left behind: {left[:3]}" if left else ""
