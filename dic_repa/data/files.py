"""Files by name in a folder, a zip or a tar, all read the same way; nothing is ever unpacked to disk.

Threads and forked processes can share a tree: a tar is read by position, a zip is opened again in each process.
"""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from dic_repa.errors import UserError
from dic_repa.files.hashing import fingerprint

_LITTER = {"__MACOSX", "Thumbs.db", "desktop.ini"}


@dataclass
class FileTree:
    """`names`, sorted, with / between folders; `folders`, even empty ones; `read(name)` gives a file's bytes.

    `read` can be pickled, for loader processes that are spawned.
    """

    path: Path
    names: list[str]
    folders: list[str]
    read: Callable[[str], bytes] = field(repr=False)

    def ending_in(self, endings: Collection[str]) -> list[str]:
        """The names with one of the `endings`, such as '.png', in capitals or not."""
        return [name for name in self.names if PurePosixPath(name).suffix.lower() in endings]


def open_tree(path: str | Path) -> FileTree:
    """The files of a folder, a .zip or an uncompressed .tar, without hidden ones.

    Raises:
        UserError: anything else, a damaged archive, or a name in it that leads elsewhere.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"there is no folder, zip or tar {path}")
    return _open_zip(path) if zipfile.is_zipfile(path) or path.suffix == ".zip" else _open_tar(path)


def stamp(files: Iterable[Path]) -> str:
    """A hash of the files' names, sizes and times of change, to see whether one was changed."""
    states = ((file.name, file.stat()) for file in sorted(files))
    return fingerprint(*(f"{name} {state.st_size} {state.st_mtime_ns}\n" for name, state in states))


def _open_folder(path: Path) -> FileTree:
    names, folders = [], []
    for root, inside, files in os.walk(path, followlinks=True):
        relative = Path(root).relative_to(path)
        inside[:] = [name for name in inside if _wanted(name)]
        folders += [(relative / name).as_posix() for name in inside]
        names += [(relative / name).as_posix() for name in files if _wanted(name)]
    return FileTree(path, sorted(names), sorted(folders), partial(_read_file, path))


def _read_file(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


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
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:  # the last if encrypted
            raise OSError(f"{name} in {self.path} cannot be unpacked ({error})") from None

    def __getstate__(self) -> dict:
        return {"path": self.path, "handles": {}}


def _open_zip(path: Path) -> FileTree:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info.is_dir() for info in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged ({error}); download or copy it again") from None
    return _archive(path, entries, _ZipReader(path))


def _read_tar(path: Path, places: dict[str, tuple[int, int]], name: str) -> bytes:
    offset, size = places[name]
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"{path} ends within {name}")
    return data


def _open_tar(path: Path) -> FileTree:
    try:
        with tarfile.open(path, "r:") as archive:
            members = [member for member in archive if member.isreg() or member.isdir()]
    except tarfile.TarError as error:
        packed = ".tar." in path.name or path.suffix == ".tgz"
        hint = "; decompress a .tar.gz first, since its files cannot be read one by one" if packed else ""
        raise UserError(f"{path} is neither a folder, a zip nor an uncompressed tar ({error}){hint}") from None
    named = {PurePosixPath(member.name).as_posix(): member for member in members}  # ./cat.png is cat.png
    places = {name: (member.offset_data, member.size) for name, member in named.items()}
    entries = {name: member.isdir() for name, member in named.items() if name != "."}
    return _archive(path, entries, partial(_read_tar, path, places))


def _archive(path: Path, entries: dict[str, bool], read: Callable[[str], bytes]) -> FileTree:
    for name in entries:
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path} is not safe: the name '{name}' leads out of the archive; make the archive again")
    wanted = {name: folder for name, folder in entries.items() if all(map(_wanted, PurePosixPath(name).parts))}
    folders = [name.rstrip("/") for name, folder in wanted.items() if folder]
    return FileTree(path, sorted(name for name, folder in wanted.items() if not folder), sorted(folders), read)


def _wanted(name: str) -> bool:
    return name not in _LITTER and (not name.startswith(".") or name == ".")
