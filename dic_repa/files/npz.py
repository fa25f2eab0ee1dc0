"""ADM's `.npz` of samples (`arr_0`: images, `arr_1`: labels), read and written without all images in memory."""

import contextlib
import errno
import math
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from dic_repa.errors import UserError, first_few, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.outputs import MARK
from dic_repa.files.zips import zip_members
from dic_repa.limits import check_limit

_LOCAL_HEADER = 30  # bytes in front of a zip member's name


def write_npz(
    path: str | Path, images: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray | None = None
) -> None:
    """Stream batches of uint8 images into `arr_0` (N, H, W, C) of `shape`, uncompressed, as `np.savez` lays it out.

    `labels` (N,) become `arr_1`. Raises UserError if the batches do not make up `shape`.
    """
    path = Path(path)
    with write_aside(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = MARK.encode()
        # force_zip64, since 50,000 images of 256 px pass the 4 GiB that a plain zip member can have.
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(map(int, shape))}
            np.lib.format.write_array_header_1_0(member, header)
            written = 0
            for batch in images:
                member.write(np.ascontiguousarray(batch.astype(np.uint8, casting="equiv", copy=False)).data)
                written += batch.size
        if written != math.prod(shape):
            there = written / math.prod(shape[1:])
            raise UserError(f"{path} should have {shape[0]} images, but there are {there:g}")
        if labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64), allow_pickle=False)


class NpzFile:
    """The arrays of an `.npz`; a UserError for a file that is truncated or no `.npz`, and for a missing array."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        members = zip_members(self.path, "is truncated or no .npz file")
        self._members = {info.filename.removesuffix(".npy"): info for info in members}
        self.names = tuple(self._members)
        if len(self.names) < len(members):
            raise UserError(f"{self.path} holds an array twice ({first_few(self.names, 5)}); write it again")

    def checksum(self) -> str:
        """A text of the checksums in the zip's directory."""
        return "-".join(f"{name}:{info.CRC:08x}:{info.file_size}" for name, info in sorted(self._members.items()))

    def array(self, name: str) -> np.ndarray:
        with self._open(name) as file:
            return read_array(file, self._member(name).file_size, f"{name} of {self.path}")

    def shape(self, name: str) -> tuple[int, ...]:
        """The array's shape, from its header alone."""
        with self._open(name) as file:
            return _header(file, self._member(name).file_size)[0]

    def mapped(self, name: str) -> np.ndarray:
        """The array as a memory map; a compressed one is unpacked into a temporary file first."""
        info, _ = self._member(name), self.shape(name)  # the header is checked before anything is unpacked
        with self._errors(), contextlib.ExitStack() as stack:
            if info.compress_type != zipfile.ZIP_STORED:
                file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())  # its space is kept as long as the map
                shutil.copyfileobj(stack.enter_context(self._open(name)), file, 1 << 20)
                file.seek(0)
            else:
                file = stack.enter_context(self.path.open("rb"))
                file.seek(info.header_offset + _LOCAL_HEADER - 4)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                file.seek(name_length + extra_length, os.SEEK_CUR)
            shape, fortran, dtype = _header(file, info.file_size)
            return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        with self._errors(), zipfile.ZipFile(self.path) as archive, archive.open(self._member(name)) as file:
            yield file

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:  # zip, decompressors and numpy raise anything from EOFError to TokenError
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                room = f"{tempfile.gettempdir()} is full, where {self.path} is unpacked"
                raise UserError(f"{room}; make room there, or set TMPDIR to another folder") from None
            what = f"is truncated or no .npz file ({first_line(error)})"
            raise UserError(f"{self.path} {what}; copy or write it again") from None

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise UserError(f"{self.path} has no array {name} (it has {', '.join(self.names) or 'none'})")
        return self._members[name]


def read_array(file: IO[bytes], size: int, what: str) -> np.ndarray:
    """The numbers of an .npy file of `size` bytes, which must be what its header says; `what` names it in a message.

    Raises:
        ValueError: its header is damaged, claims more or less than is there, or it holds no numbers; a UserError
            if it is over the limit.
    """
    check_limit("file-bytes", size, f"the size of {what} in bytes")
    start = file.tell()
    try:
        _header(file, size)
        file.seek(start)
        return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # numpy raises anything from EOFError to TokenError
        raise ValueError(first_line(error)) from None


def _header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The shape, order and kind of number at the head of an array of `size` bytes with its header."""
    start, version = file.tell(), np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"version {version} of the npy format")
    shape, fortran, dtype = read_header[version](file)
    if dtype.kind not in "biuf":
        raise ValueError(f"it holds {'Python objects' if dtype.hasobject else dtype}, not numbers")
    left = size - (file.tell() - start)
    if any(type(side) is not int or side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(f"its header says {dtype} of the shape {shape}, which does not fit its {left:,} bytes"[:200])
    return shape, fortran, dtype
