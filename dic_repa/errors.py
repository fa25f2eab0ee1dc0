"""The one exception for mistakes that a user can fix.

The command line prints it as a single line and exits with code 2; a traceback is shown only under `--debug`.
"""

import contextlib
import difflib
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

MOST_CHARACTERS = 1200  # of a message; what is wrong may be a text of any length


def printable(text: str, most: int | None = None) -> str:
    """`text` for a terminal: what is no character to see, such as a control character of a file's name, as its code.

    Lines and tabs stay. Of a text longer than `most` characters the middle is left out.
    """
    if most and len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    if text.isprintable():
        return text
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in hidden and c not in "\n\t" else c for c in text)


class UserError(ValueError):
    """A mistake that the user can fix. The message is one line: the cause, then what to do."""

    def __init__(self, message: str = ""):
        if "Original Traceback" in message:  # what a data loader's worker process makes of it; the last line is ours
            message = message.strip().rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(printable(" ".join(message.split("\n")), MOST_CHARACTERS))


# What code raises that is given options of a wrong kind or size.
MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with the line that says what is kept and how to go on."""


@contextlib.contextmanager
def when_interrupted(tell: Callable[[], str]) -> Iterator[None]:
    """While entered, Ctrl-C ends the command with the line that `tell` gives; the innermost block counts."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted(tell()) from None


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def joined_store() -> Any:
    """The store of the processes that have joined (`torch.distributed`); None if there is only this one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store() if distributed.get_world_size() > 1 else None


def prints_errors() -> bool:
    """Whether the command line prints this process's error.

    Of processes that have joined, only the first that asks: the others have the same error, or have lost this process.
    Before that, the first of each machine does.
    """
    global _first
    if _first is None:
        try:
            store = joined_store()
            _first = store.add("dic_repa/failed", 1) == 1 if store else None
        except Exception:  # the store is gone with the process that had it
            _first = True
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0" if _first is None else _first


_first: bool | None = None  # of the processes that have joined


def full_memory(error: BaseException) -> str:
    """'the GPU's memory is full (...)' or 'this machine's memory is full (...)'; "" for any other error."""
    text, kind = str(error), type(error).__name__
    of_gpu = kind == "OutOfMemoryError" or (isinstance(error, RuntimeError) and "CUDA" in text)
    if of_gpu and re.search("out of memory|ALLOC_FAILED", text):
        return f"the GPU's memory is full ({first_line(error)})"
    asked = re.search(r"tried to allocate (\d+) bytes", text)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        said = f"{int(asked[1]) / 2**30:.1f} GiB more were asked for" if asked else first_line(error)
        return f"this machine's memory is full ({said})"
    return ""


def lost_process(error: BaseException) -> str:
    """A line for the error of an exchange with a process that has ended; "" for any other error."""
    exchange = type(error).__name__.startswith("Dist") or (isinstance(error, RuntimeError) and "gloo" in str(error))
    rank = os.environ.get("RANK", "0")
    return f"process {rank} has lost another process, which failed or was killed" if exchange else ""


@contextlib.contextmanager
def print_rank_errors() -> Iterator[None]:
    """Print an error that only one of several processes that have not joined has, if the command line will not."""
    try:
        yield
    except (UserError, OSError) as error:
        if joined_store() is None and not prints_errors():
            # A line of its own, below the main process's progress bar.
            print(printable(f"\nerror: {error}"), file=sys.stderr)
        raise


def first_line(error: BaseException, most: int = 160) -> str:
    """The first sentence of somebody else's error, for the middle of a line of ours; its kind where it has no text.

    One of ours is a line already, and is left whole.
    """
    if isinstance(error, UserError):
        return str(error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"\x1b\[[0-9;]*m", "", lines[0]).split(". ")[0][:most]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`'; did you mean X or Y?'` for near names, else `'; known: ...'` (all of them where they are few)."""
    known = sorted(known)
    folded = {option.lower(): option for option in known}
    near = [folded[option] for option in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)]
    near.sort(key=lambda option: sorted(option.lower()) != sorted(name.lower()))  # two letters changed places
    if near:
        return f"; did you mean {' or '.join(near)}?"
    if not known:
        return ""
    return f"; known: {first_few(known, 20)}"


def first_few(names: Sequence[str], most: int) -> str:
    """The names with commas; ', ...' stands for those beyond `most`."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is not among the `known` ones, which lists the near ones."""
    return UserError(f"unknown {kind} '{name}'{did_you_mean(name, known)}")
