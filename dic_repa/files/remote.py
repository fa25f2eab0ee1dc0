"""Files of a web server: tried again while it is away, whole or not there, and one line where they cannot be had."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_aside
from dic_repa.files.outputs import DISK_ERRORS
from dic_repa.limits import check_limit

TIMEOUT = 60.0  # seconds without a byte
TRIES = 4
PAUSE = 1.0  # seconds before the second try, doubled before each further one
_BLOCK = 1 << 20
_LATER = {408, 425, 429}  # with those from 500 on, answers that may be others a moment later

T = TypeVar("T")


def is_url(place: str | Path) -> bool:
    return str(place).startswith(("http://", "https://"))


def download(url: str, file: Path, size: int | None = None) -> None:
    """Write what `url` gives, which should be `size` bytes, to `file`, which is whole or not there.

    Raises:
        UserError: there is nothing, it has another size, or the server cannot be reached in `TRIES` tries.
    """

    def take(response: Any) -> None:
        expected = response.headers.get("Content-Length")
        if size is not None and expected is not None and int(expected) != size:
            raise UserError(f"{url} has {int(expected):,} bytes, and its index says {size:,}; make the index again")
        with write_aside(file) as aside, aside.open("wb") as stream:
            while block := response.read(_BLOCK):
                stream.write(block)
            _check_whole(stream.tell(), size if expected is None else expected)

    _ask(url, take)


def read_url(url: str, limit_name: str = "record-bytes") -> bytes | None:
    """The content of a small file; None if the server says that there is none."""

    def take(response: Any) -> bytes:
        expected = response.headers.get("Content-Length")
        check_limit(limit_name, int(expected or 0), f"the size of {url} in bytes")
        content = bytearray()
        while block := response.read(_BLOCK):
            content += block
            check_limit(limit_name, len(content), f"the size of {url} in bytes")
        _check_whole(len(content), expected)
        return bytes(content)

    try:
        return _ask(url, take)
    except _Absent:
        return None


class _Absent(UserError):
    """The server has no such file."""


def _check_whole(found: int, expected: int | str | None) -> None:
    if expected is not None and found != int(expected):
        raise ConnectionError(f"its answer ended after {found:,} of {int(expected):,} bytes")


def _ask(url: str, take: Callable[[Any], T]) -> T:
    failed = ""
    for tried in range(TRIES):
        if tried:
            time.sleep(PAUSE * 2 ** (tried - 1))
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                return take(response)
        except UserError:
            raise
        except urllib.error.HTTPError as error:
            failed = f"it answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in _LATER:
                kind = _Absent if error.code in (404, 410) else UserError
                raise kind(f"{url} cannot be had ({failed}); correct the address, or put the file there") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            failed = first_line(error)
    raise UserError(
        f"{url} cannot be read ({failed}, in {TRIES} tries); when the server is back, run the same command again"
    )
