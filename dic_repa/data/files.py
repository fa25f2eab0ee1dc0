"""Files by name in a folder, a zip or a tar, all read the same way; nothing is ever unpacked to disk.

Threads and forked processes can share a tree: a tar is read by position, a zip is opened again in each process.
"""

import heapq
import os
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from dic_repa.errors import UserError, first_few, first_line
from dic_repa.files.hashing import fingerprint
from dic_repa.files.reading import read_file
from dic_repa.files.zips import zip_members
from dic_repa.limits import check_limit

_LITTER = {"__MACOSX", "Thumbs.db", "desktop.ini"}
_FILE, _FOLDER = "file", "folder"  # what an entry of an archive is; else the reason why it is left out
_END_OF_TAR = 1 << 20  # bytes behind the last member that are looked at; tar fills its last record with zeros


@dataclass
class FileTree:
    """`names`, sorted, with / between folders; `folders`, even empty ones; `read(name)` gives a file's bytes.

    `left_out` has what cannot be read, with the reason, such as a FIFO or a link to nothing; `hidden` what begins with
    a dot. `read` can be pickled, for loader processes that are spawned.
    """

    path: Path
    names: list[str]
    folders: list[str]
    read: Callable[[str], bytes] = field(repr=False)
    left_out: dict[str, str] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)

    def ending_in(self, endings: Collection[str]) -> list[str]:
        """The names with one of the `endings`, such as '.png', in capitals or not."""
        return [name for name in self.names if PurePosixPath(name).suffix.lower() in endings]


def open_tree(path: str | Path) -> FileTree:
    """The files of a folder, a .zip or an uncompressed .tar, without hidden ones.

    Raises:
        UserError: anything else, a damaged archive, a name that is in it twice or leads elsewhere.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"there is no folder, zip or tar {path}")
    return _open_zip(path) if zipfile.is_zipfile(path) or path.suffix == ".zip" else _open_tar(path)


def by_reason(left_out: dict[str, str]) -> dict[str, list[str]]:
    """The names that are left out for each reason."""
    found: dict[str, list[str]] = {}
    for name in sorted(left_out):
        found.setdefault(left_out[name], []).append(name)
    return found


def stamp(files: Iterable[Path]) -> str:
    """A hash of the files' names, sizes and times of change, to see whether one was changed."""
    states = ((file.name, file.stat()) for file in sorted(files))
    return fingerprint(*(f"{name} {state.st_size} {state.st_mtime_ns}\n" for name, state in states))


def _open_folder(path: Path) -> FileTree:
    """Links to folders are followed, but each folder is read once: a link to a folder around it would never end."""
    tree = FileTree(path, [], [], partial(_read_from, path))
    seen: set[tuple[int, int]] = set()
    waiting: list[str] = [""]
    links: list[str] = []  # what is linked to comes last, so that a folder is found where it lies
    while waiting or links:
        prefix = waiting.pop() if waiting else heapq.heappop(links)
        try:
            state = os.stat(path / prefix)
            if (state.st_dev, state.st_ino) in seen:
                tree.left_out[prefix[:-1]] = "reached twice, through a link"
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(path / prefix) as found:
                entries = list(found)
        except OSError as error:
            tree.left_out[prefix[:-1] or "."] = f"not to be opened ({error.strerror})"
            continue
        tree.folders += [prefix[:-1]] if prefix else []
        for entry in entries:
            name = prefix + entry.name
            if not _wanted(entry.name):
                tree.hidden.append(f"{name}/" if entry.is_dir() else name)
            elif not _is_utf8(name):
                tree.left_out[_shown(name)] = "not named in UTF-8"
            elif entry.is_dir():
                heapq.heappush(links, f"{name}/") if entry.is_symlink() else waiting.append(f"{name}/")
            elif entry.is_file():
                tree.names.append(name)
            else:
                tree.left_out[name] = "no regular file" if os.path.exists(entry.path) else "linked to nothing"
    tree.names.sort()
    tree.folders.sort()
    return tree


def _read_from(folder: Path, name: str) -> bytes:
    return read_file(folder / name)


class _ZipReader:
    def __init__(self, path: Path):
        self.path = path
        self.handles: dict[int, zipfile.ZipFile] = {}

    def __call__(self, name: str) -> bytes:
        process = os.getpid()
        if process not in self.handles:  # two processes must not share a file's position
            self.handles = {process: zipfile.ZipFile(self.path)}
        try:
            return self.handles[process].read(name)
        except Exception as error:  # anything from BadZipFile to LZMAError, RuntimeError if it is encrypted
            raise OSError(f"{name} in {self.path} cannot be unpacked ({first_line(error)})") from None

    def __getstate__(self) -> dict:
        return {"path": self.path, "handles": {}}


def _open_zip(path: Path) -> FileTree:
    def entries() -> Iterator[tuple[str, str, int]]:
        for member in zip_members(path):
            linked = member.create_system == 3 and stat.S_ISLNK(member.external_attr >> 16)  # 3: made on Unix
            sort = _FOLDER if member.is_dir() else "only a link in the archive" if linked else _FILE
            yield member.filename, sort, member.file_size

    return _archive(path, entries(), _ZipReader(path))


def _read_tar(path: Path, places: dict[str, tuple[int, int]], name: str) -> bytes:
    offset, size = places[name]
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"{path} ends within {name}")
    return data


def tar_members(path: Path) -> list[tarfile.TarInfo]:
    """All members of an uncompressed tar, in its order; a UserError if it is damaged or does not end as a tar does."""
    try:
        members, end = _tar_members(path)
    except Exception as error:  # damaged headers raise anything from TarError to OverflowError
        packed = ".tar." in path.name or path.suffix == ".tgz"
        hint = "; decompress a .tar.gz first, since its files cannot be read one by one" if packed else ""
        what = f"is neither a folder, a zip nor a whole uncompressed tar ({first_line(error)}){hint}"
        raise UserError(f"{path} {what}") from None
    with path.open("rb") as file:  # what Python's tarfile takes for the end may be a damaged header
        file.seek(end)
        rest = file.read(_END_OF_TAR)
    if not rest or rest.strip(b"\0"):
        what = "cannot be read on (a damaged header, or two tars in one file)" if rest else "ends without its end mark"
        raise UserError(f"{path} {what} at byte {end:,}, so that files would be lost; copy or make it again")
    return members


def _open_tar(path: Path) -> FileTree:
    members = tar_members(path)
    places: dict[str, tuple[int, int]] = {}

    def entries() -> Iterator[tuple[str, str, int]]:
        for member in members:
            name, sort = PurePosixPath(member.name).as_posix(), _FILE  # ./cat.png is cat.png
            place = (member.offset_data, member.size)
            if member.islnk():  # in a tar, the second name of a file
                found = places.get(PurePosixPath(member.linkname).as_posix())
                sort, place = (_FILE, found) if found else ("linked to nothing in the archive", place)
            elif member.isdir():
                sort = _FOLDER
            elif member.issym() or member.issparse() or not member.isreg():
                sort = "only a link in the archive" if member.issym() else "no regular file"
            if sort == _FILE:
                places[name] = place
            if name != ".":
                yield name, sort, place[1]

    return _archive(path, entries(), partial(_read_tar, path, places))


def _tar_members(path: Path) -> tuple[list[tarfile.TarInfo], int]:
    """All members, and where the headers end; the label of a volume is none."""
    members: list[tarfile.TarInfo] = []
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.size < 0 or (members and member.offset <= members[-1].offset):
                raise tarfile.ReadError(f"a header of a negative size at byte {member.offset:,}")  # it never ends
            members.append(member)
        return [member for member in members if member.type != b"V"], archive.offset


def _archive(path: Path, entries: Iterable[tuple[str, str, int]], read: Callable[[str], bytes]) -> FileTree:
    """The tree of an archive's (name, sort, size); only what is wanted counts for what is refused."""
    tree, folders = FileTree(path, [], [], read), set()
    for name, sort, size in entries:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or "\\" in name or ".." in parts:
            raise UserError(f"{path} is not safe: the name '{name}' leads out of the archive; make the archive again")
        if not all(map(_wanted, parts)):
            tree.hidden.append(name)
        elif not _is_utf8(name):
            tree.left_out[_shown(name)] = "not named in UTF-8"
        elif sort == _FOLDER:
            folders.add(name.rstrip("/"))
        elif sort == _FILE:
            check_limit("file-bytes", size, f"the size of {name} in {path} in bytes")
            tree.names.append(name)
        else:
            tree.left_out[name] = sort
    if len(set(tree.names)) < len(tree.names):
        twice = [name for name, count in Counter(tree.names).items() if count > 1]
        raise UserError(f"{path} holds several files of the same name ({first_few(twice, 3)}); make the archive again")
    tree.names.sort()
    tree.folders = sorted(folders)
    return tree


def _wanted(name: str) -> bool:
    return name not in _LITTER and (not name.startswith(".") or name == ".")


def _is_utf8(name: str) -> bool:
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(name: str) -> str:
    """A name that is no UTF-8, with \\xff for such a byte: it can be printed and written into a record."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
