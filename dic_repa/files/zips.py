"""Zip archives of others: damaged ones and bombs are refused before anything is unpacked."""

import zipfile
from pathlib import Path

from dic_repa.errors import UserError, first_line
from dic_repa.files.reading import check_regular
from dic_repa.limits import check_limit, limit


def zip_members(path: Path, damaged: str = "is damaged or no zip") -> list[zipfile.ZipInfo]:
    """All members of a zip, as its directory lists them; `damaged` is what the message of a damaged one says.

    Raises:
        UserError: no whole zip, or its members are unpacked so much larger that they are only there to fill memory.
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # a damaged directory raises anything from BadZipFile to struct.error
        raise UserError(f"{path} {damaged} ({first_line(error)}); download or copy it again") from None
    unpacked, packed = sum(member.file_size for member in members), path.stat().st_size
    if unpacked > limit("file-bytes"):
        check_limit("archive-ratio", unpacked // packed, f"the unpacked size of {path} over its own")
    return members
