"""Files that others made, read with care: a device or FIFO is never opened, and a limit comes before the memory."""

import json
import os
import stat
from pathlib import Path
from typing import Any, TypeGuard

from dic_repa.errors import UserError, first_line
from dic_repa.limits import check_limit, limit

_SORTS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def check_regular(path: str | Path, limit_name: str | None = None) -> None:
    """A UserError if there is a folder, FIFO, socket or device at `path`, or more bytes than the limit of that name.

    Raises:
        OSError: there is nothing, or it cannot be reached.
    """
    state = os.stat(path)  # before it is opened, which waits at a FIFO and may wind a tape
    if sort := _SORTS.get(stat.S_IFMT(state.st_mode)):
        raise UserError(f"{path} is a {sort}, not a file; put the file in its place")
    if limit_name:
        check_limit(limit_name, state.st_size, f"the size of {path} in bytes")


def read_file(path: str | Path, limit_name: str = "file-bytes") -> bytes:
    """The content of a file; errors as in `check_regular`."""
    check_regular(path, limit_name)
    return Path(path).read_bytes()


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """As `json.loads`, with a ValueError also for what is nested over the limit `nesting`."""
    try:
        content = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [content], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        if depth > limit("nesting"):
            raise ValueError(f"nested over the limit of {limit('nesting')} levels; --limit nesting=none lifts it")
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return content


def read_json(path: str | Path, then: str, kind: type = object) -> Any:
    """The content of a JSON record, of that `kind`; `then` says in the message of a damaged one what to do."""
    try:
        content = parse_json(read_file(path, "record-bytes"))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); {then}") from None
    if not isinstance(content, kind):
        held, wanted = ("mapping" if each is dict else each.__name__ for each in (type(content), kind))
        raise UserError(f"{path} is damaged (it holds a {held}, not a {wanted}); {then}")
    return content


def read_lines(path: str | Path) -> tuple[list[tuple[str, dict]], int]:
    """The lines of a file of JSON records that have a `step`, each with its record, and how many others there are.

    A last line without an end is not counted: a kill has cut it short.
    """
    records, damaged = [], 0
    lines = read_file(path).split(b"\n")
    for line in lines:
        try:
            text = line.decode()
            record = parse_json(text)
        except ValueError:
            record = None
        if has_step(record):
            records.append((text, record))
        elif line is not lines[-1]:
            damaged += 1
    return records, damaged


def has_step(record: Any) -> TypeGuard[dict]:
    """Whether a record is a mapping with a whole number of steps."""
    step = record.get("step") if isinstance(record, dict) else None
    return type(step) is int and 0 <= step < 2**63


def numbers(record: dict) -> dict[str, float]:
    """The finite numbers of a record, by their names."""
    found = {name: value for name, value in record.items() if type(value) in (int, float)}
    return {name: value for name, value in found.items() if abs(value) < 1e300}
