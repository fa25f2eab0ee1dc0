"""A folder's manifest: the size and SHA-256 of each file, to find damage, and what the folder belongs to."""

import functools
import json
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from dic_repa.errors import UserError
from dic_repa.files.atomic import write_whole
from dic_repa.files.hashing import file_sha256
from dic_repa.files.reading import read_json

MANIFEST = "manifest.json"


def write_manifest(
    folder: Path, names: Iterable[str] = (), known: Mapping[str, str] = {}, **belongs: str | int | None
) -> None:
    """Write down the files `names` of `folder` (by default all), and what it `belongs` to, such as a run and a step.

    Args:
        known: the SHA-256 of files that need not be read again.
    """
    found = [folder / name for name in names] or sorted(folder.rglob("*"))
    listed = {
        file.relative_to(folder).as_posix(): file
        for file in found
        if file.is_file() and not file.name.startswith(".") and file != folder / MANIFEST
    }
    files = {
        name: {"size": file.stat().st_size, "sha256": known.get(name) or file_sha256(file)}
        for name, file in listed.items()
    }
    write_whole(folder / MANIFEST, json.dumps({**belongs, "files": files}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict:
    """What the manifest of `folder` says; nothing where it cannot be read."""
    try:
        content = read_json(folder / MANIFEST, "")
    except (OSError, UserError):
        return {}
    return content if isinstance(content, dict) else {}


def find_damage(folder: Path, part: str = "", thorough: bool = True) -> str | None:
    """What is wrong with the checkpoint `folder`, in a few words; None if all is as its manifest says.

    With `part`, only that folder or file in it is checked, such as 'ema'. Unless `thorough`, only sizes are compared,
    which is quick.
    """
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        listed = read_manifest(folder)["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in expected):
            raise KeyError
    except (TypeError, KeyError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if part:
        expected = {name: entry for name, entry in expected.items() if f"{name}/".startswith(f"{part}/")}
    if not expected:
        return f"its {MANIFEST} lists no {part or 'files'}"
    try:
        for name, (size, _) in expected.items():  # sizes first: that is quick, and finds most damage
            status = (folder / name).stat()
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a file"
            if status.st_size != size:
                return f"{name} has {status.st_size} bytes, not {size}"
        for name, (_, digest) in expected.items() if thorough else ():
            if _sha256(folder / name) != digest:
                return f"{name} has another SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def check_whole(folder: Path) -> None:
    """A UserError if the saved weights in `folder` are not as the manifest there, or that of the checkpoint around it,
    says. A folder that was never listed is taken as it is.
    """
    folder = folder.resolve()  # checkpoints/best is a link
    if (folder / MANIFEST).is_file():
        if damage := find_damage(folder):
            changed = f"if you have changed it yourself, remove its {MANIFEST}"
            raise UserError(f"{folder} is damaged: {damage}; restore it, or convert it again; {changed}")
        return
    checkpoint = any((folder.parent / name).is_file() for name in (MANIFEST, "state.json"))  # of a training
    if checkpoint and (damage := find_damage(folder.parent, folder.name)):
        raise UserError(f"{folder.parent} is damaged: {damage}; take another checkpoint, or restore this one")


def _sha256(file: Path) -> str:
    state = file.stat()
    return _sha256_of(file, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache(maxsize=1000)
def _sha256_of(file: Path, *_state: int) -> str:
    """Once in this process, as long as the file stays as it is: a run and then its weights are checked."""
    return file_sha256(file)
