"""A case of the attack, run in a process of its own, and what came of it.

Each process is a fork of this one, which has imported everything already: a case starts in some 30 ms. It works in a
folder of its own, and an audit hook stops and notes whatever is to be written outside.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

SECONDS = 10.0  # longer is a hang
MEMORY = 3 * 2**29  # bytes beyond those of an idle process; the largest network of a metric takes 1.2 GiB
ADDRESSES = 4 * 2**30  # bytes of addresses beyond those of an idle process, so that the machine survives

# What may come of a case; the first two are as they should be.
OUTCOMES = (
    "fine",
    "refused",
    "traceback",
    "hang",
    "silent",
    "code ran",
    "outside",
    "memory",
    "accepted",
    "broken",
    "unclear",
)
MEANING = {
    "fine": "exit 0, and what came out is right",
    "refused": "exit 2 and one line",
    "traceback": "a traceback, or another exit code than those promised",
    "hang": f"longer than {SECONDS:.0f} s",
    "silent": "exit 0, though what came out is not what the undamaged input gives",
    "code ran": "code of a file that nobody trusted was run",
    "outside": "a file was changed that the command does not own",
    "memory": f"more than {MEMORY / 2**30:g} GiB was taken",
    "accepted": "exit 0 for what must be refused",
    "broken": "refused, though it must work",
    "unclear": "refused, but not in one clean line",
}
CANARY = "canary.txt"  # hostile code writes it
CONTROL = "\x1b]0;owned\x07"  # a hostile name, which renames a terminal's window


@dataclass
class Case:
    """One attack: `place` puts it into the folder in which `lines`, arguments of `dic-repa`, are then called in turn.

    Args:
        must: 'answer': be fine or refused; 'refuse', 'work', or 'trust': run the code of a file, and tell of it.
        check: After exit 0, what is wrong with the outcome, '' if nothing. It is given the folder.
        owns: Names in the folder that the commands may change; all else that was there must stay as it is.
        codes: Exit codes that are as promised, beside 0 and 2.
        prepare_process: Called in the process before the lines, to take something away from it.
    """

    name: str
    lines: list[list[str]]
    place: Callable[[Path], None] = lambda folder: None
    needs: tuple[str, ...] = ()
    must: str = "answer"
    check: Callable[[Path], str] = lambda folder: ""
    owns: tuple[str, ...] = ("out",)
    codes: tuple[int, ...] = ()
    prepare_process: Callable[[], None] = lambda: None


@dataclass
class Verdict:
    """What came of a case."""

    outcome: str
    why: str = ""
    code: int | None = None
    seconds: float = 0.0
    busy: float = 0.0  # seconds of a processor
    memory: int = 0  # bytes beyond an idle process
    said: str = field(default="", repr=False)

    @property
    def good(self) -> bool:
        return self.outcome in ("fine", "refused")


def judge(case: Case, folder: Path, good: Path, seconds: float = SECONDS) -> Verdict:
    """Run a case in `folder`, which is made, with those of the `good` inputs that it needs."""
    work = folder / "work"
    work.mkdir(parents=True)
    for name in case.needs:
        copy(good / name, work / name)
    case.place(work)
    before = snapshot(folder, case.owns)
    begin = time.monotonic()
    child = start(case, folder)
    busy = max(1.0, min(4.0, os.getloadavg()[0] / (os.cpu_count() or 1)))  # other programs take their share
    code, usage = wait(child, begin + seconds * busy)
    verdict = Verdict("fine", code=code, seconds=time.monotonic() - begin)
    verdict.busy = usage.ru_utime + usage.ru_stime if usage else 0
    verdict.memory = max(0, (usage.ru_maxrss if usage else 0) - _idle()) * 1024
    verdict.said = "".join((folder / name).read_bytes().decode(errors="surrogateescape") for name in ("said", "errors"))
    verdict.outcome, verdict.why = _outcome(case, folder, work, verdict, before)
    return verdict


def _outcome(case: Case, folder: Path, work: Path, verdict: Verdict, before: dict) -> tuple[str, str]:
    errors = (folder / "errors").read_bytes().decode(errors="surrogateescape")
    notes = (folder / "notes").read_text(errors="replace")
    ran = bool(list(folder.rglob(CANARY)))
    if case.must == "trust":
        told = ran and "evil" in verdict.said
        return ("fine", "") if told else ("broken", f"trusted code ran: {ran}; {last_line(errors)}")
    if ran or "system" in notes:
        return "code ran", notes
    if "write" in notes:
        return "outside", notes.splitlines()[0]
    if changed := [name for name, state in before.items() if snapshot_of(folder / name) != state]:
        return "outside", f"changed: {', '.join(changed[:5])}"
    if verdict.code is None and re.search(r"\d/\d+ \[", errors):
        return "fine", "at work, with a progress bar, when it was stopped"
    if verdict.code is None:
        return "hang", f"{verdict.seconds:.0f} s"
    if "Traceback (most recent call last)" in errors or verdict.code not in (0, 2, *case.codes):
        return "traceback", fault(errors) or f"exit {verdict.code}"
    if verdict.memory > MEMORY:
        return "memory", f"{verdict.memory / 2**30:.1f} GiB"
    if CONTROL in verdict.said:
        return "unclear", "a control character reached the terminal"
    if verdict.code == 2:
        if case.must == "work":
            return "broken", last_line(errors)
        return ("unclear", odd) if (odd := unclear(errors)) else ("refused", last_line(errors))
    if complaint := case.check(work):
        return "silent", complaint
    return ("accepted", "exit 0") if case.must == "refuse" else ("fine", "")


def unclear(errors: str) -> str:
    """What is wrong with the text of a refusal; '' for a single line that begins with 'error: '."""
    kept = [line.rpartition("\r")[2] for line in errors.split("\n")]
    lines = [line for line in kept if line.strip() and not re.match(r"(note|warning|training into)\b", line)]
    told = [line for line in lines if "error: " in line]
    if len(told) != 1 or not told[0].lstrip().startswith("error: "):
        return f"{len(told)} lines begin with 'error: '"
    after = lines[lines.index(told[0]) + 1 :]
    if after:
        return f"a line follows the error: {after[0][:100]!r}"
    if len(told[0]) > 1500:
        return f"the line has {len(told[0])} characters"
    odd = [character for character in told[0] if not character.isprintable()]
    return f"the line holds {odd[0]!r}" if odd else ""


def fault(text: str) -> str:
    """The line of a traceback that says what happened."""
    lines = re.findall(r"^[\w.]+(?:Error|Exception|Exit|Interrupt|Iteration)\b.*", text, re.MULTILINE)
    return lines[-1][:300] if lines else last_line(text)


def last_line(text: str) -> str:
    lines = [line.rpartition("\r")[2].strip() for line in text.split("\n")]
    return next((line[:300] for line in reversed(lines) if line), "")


def start(case: Case, folder: Path, run: Callable[[list[list[str]]], int] | None = None) -> int:
    """Begin the case's process; its id, which is that of its group too. `run` gives its exit code, else `call`."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        _enter(folder)
        case.prepare_process()
        code = (run or call)(case.lines)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def call(lines: list[list[str]]) -> int:
    """Call the command lines in turn until one fails; the exit code of the last."""
    from dic_repa.cli import main

    for line in lines:
        try:
            main(list(line))
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
            if code:
                return code
    return 0


def _enter(folder: Path) -> None:
    """Make this process the case's: its folder, environment, output, limits and guard."""
    home, temporary = folder / "home", folder / "tmp"
    for place in (home, temporary):
        place.mkdir(exist_ok=True)
    os.chdir(folder / "work")
    given = {"HOME": home, "XDG_CACHE_HOME": home / "cache", "TMPDIR": temporary}
    given["TORCHINDUCTOR_CACHE_DIR"] = home / "cache" / "inductor"  # torch's own, made when peft imports bitsandbytes
    os.environ.update({name: str(path) for name, path in given.items()})
    tempfile.tempdir = None
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    notes = os.open(folder / "notes", flags, 0o644)
    for name, descriptor in (("said", 1), ("errors", 2)):
        os.dup2(os.open(folder / name, flags, 0o644), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (
        open(descriptor, "w", closefd=False, encoding="utf-8", errors=errors, buffering=1)  # noqa: SIM115
        for descriptor, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + ADDRESSES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.addaudithook(Guard(folder, notes))


class Guard:
    """An audit hook that refuses, and notes, what would be written outside `folder`, and commands of a shell."""

    WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    NAMES: ClassVar[dict[str, tuple[int, ...]]] = {  # event: which of its arguments are paths that change
        "os.remove": (0,),
        "os.rename": (0, 1),
        "os.rmdir": (0,),
        "os.mkdir": (0,),
        "os.truncate": (0,),
        "os.link": (1,),
        "os.symlink": (1,),
        "os.chmod": (0,),
        "os.chown": (0,),
        "os.utime": (0,),
        "shutil.rmtree": (0,),
    }
    SHELLS = ("os.system", "os.exec", "os.spawn", "pty.spawn")

    def __init__(self, folder: Path, notes: int):
        self.allowed = (f"{os.path.realpath(folder)}/", "/dev/null", "/dev/shm/", "/proc/self/")
        self.notes = notes

    def __call__(self, event: str, given: tuple) -> None:
        if event == "open" and (given[2] or 0) & self.WRITES:
            self.check(event, given[0])
        elif event in self.NAMES:
            for place in self.NAMES[event]:
                self.check(event, given[place], given[-1] if event not in ("os.truncate", "os.symlink") else -1)
        elif event in self.SHELLS:
            os.write(self.notes, f"system {event} {given!r}\n".encode(errors="replace"))
            raise PermissionError(f"the attack's guard refuses {event}")

    def check(self, event: str, path: object, folder: object = -1) -> None:
        if isinstance(path, int):
            return
        name = os.fsdecode(path)  # type: ignore[arg-type]
        if isinstance(folder, int) and folder >= 0 and not name.startswith("/"):
            name = f"/proc/self/fd/{folder}/{name}"
        # The last part may be a link, which is what is removed or renamed.
        parent, last = os.path.split(name.rstrip("/"))
        real = os.path.realpath(name) if event == "open" else os.path.join(os.path.realpath(parent or "."), last)
        if not f"{real}/".startswith(self.allowed):
            os.write(self.notes, f"write {event} {real}\n".encode(errors="replace"))
            raise PermissionError(f"the attack's guard refuses {event} of {real}")


def wait(child: int, deadline: float) -> tuple[int | None, resource.struct_rusage | None]:
    """The exit code of a case's process (None after `deadline`, when it is killed) and what it used."""
    pause = 0.002
    while time.monotonic() < deadline:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            kill(child)
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(pause)
        pause = min(0.05, 1.2 * pause)
    kill(child)
    return None, os.wait4(child, 0)[2]


def kill(group: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a case's process and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _idle() -> int:
    """The largest memory of this process so far, in KiB: a fork begins with it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder, links as links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def snapshot(folder: Path, but: tuple[str, ...] = ()) -> dict[str, tuple]:
    """Size and time of change of what is in the case's folder, without what its commands may change."""
    found = {}
    for root, folders, files in os.walk(folder):
        relative = Path(root).relative_to(folder)
        if relative.parts[:1] == ("work",):
            folders[:] = [name for name in folders if (relative / name).parts[1] not in but]
        for name in files:
            path = relative / name
            if path.parts[0] == "work" and path.parts[1] not in but and path.name != "lock":
                found[str(path)] = snapshot_of(folder / path)
    return found


def snapshot_of(file: Path) -> tuple:
    try:
        state = os.lstat(file)
    except OSError:
        return ()
    return state.st_mode, state.st_size, state.st_mtime_ns


@contextlib.contextmanager
def nothing_else_changes(*folders: Path) -> Iterator[None]:
    """Raise an AssertionError that names the files of `folders` that were changed while entered."""

    def states() -> dict[str, tuple]:
        found = {}
        for folder in folders:
            for root, inside, files in os.walk(folder):
                inside[:] = [name for name in inside if name not in ("__pycache__", ".git", ".pytest_cache", ".cache")]
                found |= {f"{root}/{name}": snapshot_of(Path(root, name)) for name in files}
        return found

    before = states()
    yield
    after = states()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, f"{len(changed)} files outside the attack's folder were changed: {changed[:10]}"


LIBRARIES = "timm datasets diffusers torchdiffeq matplotlib.pyplot torch_fidelity"
MODULES = (
    "__main__ bench.data bench.model bench.sample bench.train data.prepare encoders.families evaluation.report "
    "evaluation.probe evaluation.runs evaluation.solvers evaluation.tune sampling.convert sampling.folder training "
    "training.dry_run training.posthoc"
)


def import_all() -> None:
    """Import what verbs import when they are called, so that each fork has it."""
    import importlib

    from dic_repa.cli import VERBS, cli

    for verb in VERBS:
        cli.get_command(None, verb)
    for name in [*LIBRARIES.split(), *(f"dic_repa.{module}" for module in MODULES.split())]:
        importlib.import_module(name)
