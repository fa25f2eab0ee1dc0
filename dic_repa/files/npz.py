"""ADM's `.npz` of samples (`arr_0`: images, `arr_1`: labels), read and written without all images in memory."""

import contextlib
import math
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.outputs import MARK

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
        with self._errors(), zipfile.ZipFile(self.path) as archive:
            self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        self.names = tuple(self._members)

    def checksum(self) -> str:
        """A text of the checksums in the zip's directory."""
        return "-".join(f"{name}:{info.CRC:08x}:{info.file_size}" for name, info in sorted(self._members.items()))

    def array(self, name: str) -> np.ndarray:
        with self._open(name) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    def shape(self, name: str) -> tuple[int, ...]:
        """The array's shape, from its header alone."""
        with self._open(name) as file:
            return self._header(file)[0]

    def mapped(self, name: str) -> np.ndarray:
        """The array as a memory map; a compressed one is unpacked into a temporary file first."""
        info = self._member(name)
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
            shape, fortran, dtype = self._header(file)
            if dtype.hasobject:
                raise ValueError("it holds Python objects")
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
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, struct.error) as error:
            what = f"is truncated or no .npz file ({first_line(error)})"
            raise UserError(f"{self.path} {what}; copy or write it again") from None

    @staticmethod
    def _header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"version {version} of the npy format")
        return read_header[version](file)

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise UserError(f"{self.path} has no array {name} (it has {', '.join(self.names) or 'none'})")
        return self._members[name]
