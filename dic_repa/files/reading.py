"""Files that others made, read with care: a device or FIFO is never opened, and a limit comes before the memory."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from dic_repa.errors import UserError, first_line
from dic_repa.limits import check_limit

_SORTS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def check_regular(path: str | Path, limit: str | None = None) -> None:
    """A UserError if there is a folder, FIFO, socket or device at `path`, or more bytes than the `limit` of this name.

    Raises:
        OSError: there is nothing, or it cannot be reached.
    """
    state = os.stat(path)  # before it is opened, which waits at a FIFO and may wind a tape
    if sort := _SORTS.get(stat.S_IFMT(state.st_mode)):
        raise UserError(f"{path} is a {sort}, not a file; put the file in its place")
    if limit:
        check_limit(limit, state.st_size, f"the size of {path} in bytes")


def read_file(path: str | Path, limit: str = "file-bytes") -> bytes:
    """The content of a file; errors as in `check_regular`."""
    check_regular(path, limit)
    return Path(path).read_bytes()


def read_json(path: str | Path, then: str) -> Any:
    """The content of a JSON record; `then` says in the message of a damaged one what to do."""
    try:
        return json.loads(read_file(path, "record-bytes"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # the latter if it is nested a thousand levels deep
        raise UserError(f"{path} is damaged ({first_line(error)}); {then}") from None
