"""An output replaces only what this package wrote. All verbs ask here.

A folder that it wrote, one of ours, has a marker file, `.dic-repa.jsonl`: the kind of folder, then the name of each
file in it, written before the file itself. A single file has `MARK` in the metadata of its format, within its first or
last 64 KiB.

Never written to or removed: a device, FIFO or socket; the current folder, the home folder, or one around them; a link;
a file that no marker lists and that has no mark.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dic_repa.errors import UserError, first_few, printable
from dic_repa.files.reading import parse_json

MARKER = ".dic-repa.jsonl"
AUTHORS_FILES = (".pt", ".pth", ".safetensors")  # endings of files in the layout of the authors' code
MARK = "written-by-dic-repa"
ASIDE = ".writing-"  # how the names of unfinished files and folders begin
LOCK = f"{ASIDE}lock"  # in a folder, while a command fills it
_UNFINISHED = re.compile(rf"^{re.escape(ASIDE)}(?:[0-9a-f]{{8}}~)?")  # with the token of one of several writers
KINDS = {
    "run": "a run",
    "checkpoint": "a checkpoint",
    "samples": "a folder of samples",
    "model": "a saved model",
    "export": "an exported model",
    "average": "an average of weights",
    "prepared": "a prepared data set",
    "probe": "a folder of a probe's results",
    "tune": "a folder of a guidance search",
    "measurements": "a folder of measurements",
}
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_FORMAT, _ENDS = 1, 1 << 16


@dataclass
class Marker:
    """The kind of one of our folders, the names in it, and the number of `pictures` (000000.png and so on) in it."""

    kind: str
    names: set[str] = field(default_factory=set)
    pictures: int = 0

    def __contains__(self, name: str) -> bool:
        if name == MARKER or is_lock(name):
            return True
        folder, _, last = name.rpartition("/")
        name = f"{folder}/{_UNFINISHED.sub('', last)}".lstrip("/")  # what a kill has left unfinished
        stem, _, ending = name.partition(".")
        picture = ending == "png" and stem.isdecimal() and f"{int(stem):06d}" == stem and int(stem) < self.pictures
        return picture or name in self.names


def aside_of(path: Path, token: str = "") -> Path:
    """Where a file or folder is written until it is whole; `token` (8 hexadecimal digits) keeps writers apart."""
    return path.with_name(f"{ASIDE}{token}~{path.name}" if token else f"{ASIDE}{path.name}")


def is_lock(name: str) -> bool:
    """Whether `files.lock` or `files.claims` uses a file of this name, in our folders or beside an output."""
    last = PurePosixPath(name).name
    return last.startswith(ASIDE) and last.endswith("lock")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let the system's error of a write in this block, such as for a full disk, name the file, and raise it as OSError
    also where a library has made another of it."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.filename is None and error.errno:
            error.filename = str(path)
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        said = re.search(r"\(os error (\d+)\)", str(error))  # what is written in Rust says
        code = cause.errno if cause else int(said[1]) if said else None
        if code not in DISK_ERRORS:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def check_file(path: str | Path) -> None:
    """A UserError if no file may be written at `path`."""
    path = Path(path)
    _check_sort(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    check_parents(path)
    if path.exists() and not (is_listed(path) or _bears_mark(path)):
        raise UserError(f"{path} is there, and not written by dic-repa, so it is not overwritten; name another file")


def check_folder(path: str | Path, kind: str) -> Marker | None:
    """The marker of the folder at `path`; None if there is no folder, or it is empty.

    Raises:
        UserError: no folder of this `kind` may be written there.
    """
    path = Path(path)
    _check_sort(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a folder")
    check_parents(path if not path.exists() else path / MARKER)
    if not path.exists():
        return None
    for inside, what in ((Path.cwd(), "current folder"), (Path.home(), "home folder")):
        if path.resolve() in (inside.resolve(), *inside.resolve().parents):
            where = f"the {what}" if path.resolve() == inside.resolve() else f"around the {what}"
            raise UserError(f"{path} is {where}, which no output replaces; name another folder")
    marker = read_marker(path)
    if marker is None and all(entry.name.startswith(ASIDE) for entry in path.iterdir()):
        return None
    if marker is None or marker.kind != kind:
        found = f"it has no {MARKER}" if marker is None else f"it is {KINDS.get(marker.kind, marker.kind)}"
        raise UserError(f"{path} is not {KINDS[kind]}, so it is not overwritten ({found}); name another folder")
    return marker


def check_parents(path: Path) -> None:
    """A UserError if `path` cannot be made: it is below a file, or its folder is not writable."""
    place = next(parent for parent in path.parents if parent.exists())
    if not place.is_dir():
        raise UserError(f"{path} cannot be written: {place} is a file")
    if not os.access(place, os.W_OK):
        raise UserError(f"{path} cannot be written: no permission to write into {place}")


def begin_folder(path: str | Path, kind: str, names: Iterable[str] = (), pictures: int = 0) -> None:
    """Make the folder and its marker, with the names of files to come.

    Call `check_folder` first, and `remove_listed` if the folder exists: the old list is lost.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    list_output(path)
    write_marker(path, Marker(kind, set(names), pictures))


def write_marker(folder: Path, marker: Marker) -> None:
    """Write the marker of `folder`, in place of an older one."""
    lines = [{"made_by": MARK, "format": _FORMAT, "kind": marker.kind}, *sorted(marker.names)]
    lines += [{"pictures": marker.pictures}] if marker.pictures else []
    aside = folder / f"{ASIDE}{MARKER}"
    with naming(folder / MARKER):
        aside.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    os.replace(aside, folder / MARKER)


def read_marker(folder: Path) -> Marker | None:
    """The marker of one of our folders; None for any other folder."""
    file = folder / MARKER
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        if not stat.S_ISREG(file.lstat().st_mode):
            return None
        first, *lines = file.read_text(encoding="utf-8").splitlines()
        head = parse_json(first)
        if head["made_by"] != MARK or not isinstance(head["kind"], str):
            return None
        marker = Marker(head["kind"])
        for line in lines:
            with contextlib.suppress(ValueError):  # cut short
                entry = parse_json(line)
                if isinstance(entry, dict):
                    marker.pictures = max(marker.pictures, int(entry.get("pictures", 0)))
                elif _is_inside(PurePosixPath(entry)):
                    marker.names.add(entry)
        return marker
    return None


def _is_inside(name: PurePosixPath) -> bool:
    """Whether a name of a marker is of something in its folder: not of the folder itself, nor of anything outside."""
    return bool(name.parts) and not name.is_absolute() and ".." not in name.parts and "\0" not in str(name)


def list_output(path: Path) -> None:
    """List a file or folder, before it is made, in the marker of our folder around it, if there is one."""
    folder, name, marker = _around(path)
    if marker is None or name in marker or any(part.startswith(ASIDE) for part in PurePosixPath(name).parts):
        return
    with naming(folder / MARKER), (folder / MARKER).open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(name))  # on a new line, since a full disk may have cut the last one
        file.flush()
        os.fsync(file.fileno())


def is_listed(path: Path) -> bool:
    """Whether the marker of our folder around `path` lists it."""
    _, name, marker = _around(path)
    return marker is not None and name in marker


def foreign(folder: Path) -> list[str]:
    """The names, relative to `folder`, of all files and links in it that are not ours."""
    marker = read_marker(folder) or Marker("")

    def walk(prefix: str) -> Iterator[str]:
        for entry in os.scandir(folder / prefix):
            name = prefix + entry.name
            if not entry.is_dir(follow_symlinks=False):
                if entry.name != MARKER and not (name in marker and (entry.is_file() or entry.is_symlink())):
                    yield name
            elif name in marker and read_marker(Path(entry.path)):
                yield from (f"{name}/{other}" for other in foreign(Path(entry.path)))
            else:
                yield from walk(f"{name}/")

    return sorted(walk(""))


def remove_listed(folder: Path, keep: Collection[str] = (), warn: bool = True) -> None:
    """Remove what the marker of `folder` lists, except for `keep`; the folder and its marker stay.

    Files that are not ours stay too; with `warn`, standard error names them.
    """
    marker = read_marker(folder) or Marker("")
    pictures = [name for name in os.listdir(folder) if name in marker and name != MARKER and not is_lock(name)]
    for name in {*marker.names, *pictures}.difference(keep):
        parents = [folder / parent for parent in list(PurePosixPath(name).parents)[:-1]]
        if any(parent.is_symlink() for parent in parents):
            continue
        for place in (folder / name, (folder / name).with_name(f"{ASIDE}{PurePosixPath(name).name}")):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                mode = place.lstat().st_mode
                if is_lock(place.name):  # of the command that removes
                    continue
                if stat.S_ISREG(mode) or stat.S_ISLNK(mode):
                    place.unlink()
                elif stat.S_ISDIR(mode) and read_marker(place):
                    remove_listed(place, warn=False)
                    if not foreign(place):  # else the folder stays ours
                        remove_folder(place)
        for parent in parents:
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()
    left = [name for name in foreign(folder) if name not in keep] if warn else []
    if left:
        count = "1 file that is" if len(left) == 1 else f"{len(left)} files that are"
        print(printable(f"left {count} not dic-repa's in {folder}: {first_few(left, 5)}"), file=sys.stderr)


def remove_leftovers(folder: Path) -> None:
    """Remove what a writer that was killed has left unfinished in one of our folders, and in those inside it."""
    for left in [*folder.glob(f"{ASIDE}*"), *folder.glob(f"*/{ASIDE}*")]:
        if not is_lock(left.name) and is_listed(left):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def remove_folder(folder: Path) -> None:
    """Remove what the marker of one of our folders lists, and the folder if nothing else is in it."""
    if read_marker(folder) is None:
        return
    remove_listed(folder)
    for name in (MARKER, LOCK):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # what is not ours is left in it
        folder.rmdir()


def _check_sort(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise UserError(f"{path} is a link to {os.readlink(path)}, and links are not written to; name that itself")
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            sorts = {stat.S_IFBLK: "device", stat.S_IFCHR: "device", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
            raise UserError(f"{path} is a {sorts.get(stat.S_IFMT(mode), 'special file')}; name a file or folder")


def _bears_mark(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_ENDS)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _ENDS))
        return MARK.encode() in start or MARK.encode() in file.read()


def _around(path: Path) -> tuple[Path, str, Marker | None]:
    """Our nearest folder around `path`, the path inside it, and its marker."""
    path = Path(os.path.abspath(path))  # links on the way are left as they are
    for parent in path.parents:
        if marker := read_marker(parent):
            return parent, path.relative_to(parent).as_posix(), marker
    return path.parent, path.name, None
