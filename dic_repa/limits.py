"""How much input may ask for: an absurd number or a hostile file is one line, before it takes memory or time.

    check_limit("workers", count, "train.workers")     # UserError: train.workers is 10,000, over the limit of 256; ...

`dic-repa --limit workers=10000 ...` lifts a limit for one command, and for the processes that it starts.
"""

import contextlib
import os
import re
from collections.abc import Iterable

from dic_repa.errors import UserError, unknown_name


def _machine_memory() -> int:
    """Bytes that this machine has, or that a container gets of them."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else [2**40]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(f"/sys/fs/cgroup/{file}") as stream:
            found.append(int(stream.read()))
    return min(found)


LIMITS = {
    "memory": _machine_memory(),  # bytes, of weights and what belongs to them
    "workers": 256,  # processes that load data, for each process that trains
    "file-bytes": 10**9,  # of one image, labels file or array among users' data, unpacked
    "record-bytes": 10**8,  # of one JSON file beside a run or a data set
    "archive-ratio": 100,  # unpacked bytes of an archive for each of its own, where they are over `file-bytes`
    "image-pixels": 89_478_485,  # of one image, as Pillow has it
    "classes": 10**6,
    "shards": 10**6,  # of a set in WebDataset's format
    "recipe-bytes": 10**6,
    "values": 10_000,  # in a recipe
    "nesting": 50,  # of lists and mappings
    "bases": 32,  # recipes, each based on the next
    "number": 10**12,  # of steps and the like
    "images": 10**7,  # to sample: each has a label in memory and in samples.json
    "batch": 10**6,
    "solver-steps": 10_000,  # of sampling, and of ddpm's noise schedule
    "repeats": 100_000,  # of a measurement
    "alignments": 64,
    "size": 16_384,  # height and width of images and latents
    "blocks": 300,  # of a denoiser
}
ENVIRONMENT = "DIC_REPA_LIMITS"  # as `workers=512 ...`; loaders and a launcher's processes inherit it
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def limit(name: str) -> float:
    """The limit `name` as it is now, which may be infinite."""
    return _lifted().get(name, LIMITS[name])


def check_limit(name: str, value: float, what: str) -> None:
    """A UserError if `value` is over the limit `name`; `what` says in the message what has this value."""
    if value > limit(name):
        size = f"{value:,}" if abs(value) < 1e15 else f"{value:.0e}" if isinstance(value, float) else "over 10^15"
        raise UserError(
            f"{what} is {size}, over the limit of {limit(name):,}; if it is meant, raise it: "
            f"`dic-repa --limit {name}={size.replace(',', '') if abs(value) < 1e15 else 'none'} ...`"
        )


def lift_limits(given: Iterable[str]) -> None:
    """Set limits from `name=value`, such as `workers=512`, `archive-bytes=20G` or `classes=none`, for this process and
    those that it starts.

    Raises:
        UserError: there is no such limit, or the value is no number.
    """
    words = [word for word in given if _parse(word)]
    if words:
        os.environ[ENVIRONMENT] = " ".join([os.environ.get(ENVIRONMENT, ""), *words]).strip()


def _lifted() -> dict[str, float]:
    return dict(_parse(word) for word in os.environ.get(ENVIRONMENT, "").split())


def _parse(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    if name not in LIMITS:
        raise unknown_name("limit", name, LIMITS)
    if value == "none":
        return name, float("inf")
    found = re.fullmatch(r"([0-9]{1,18})([kMGT]?)", value)
    if not found:
        raise UserError(f"the limit {name} takes a whole number such as 5000 or 20G, or 'none', not '{value}'")
    return name, int(found[1]) * _UNITS[found[2]]
