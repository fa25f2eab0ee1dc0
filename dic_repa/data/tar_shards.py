"""One shard of a set in WebDataset's format: a tar in which the files of a sample follow each other and share a name.

`cat/07.jpg`, `cat/07.cls`, `cat/07.npy`, `cat/07.flipped.npy`: the name ends at the first dot behind the last slash. A
picture may have any of the endings that images have; `.cls` is the class's number as text; `.npy` are the moments, and
`.flipped.npy` those of the mirrored picture. Other endings are passed over.
"""

import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dic_repa.data.files import tar_members
from dic_repa.data.images import EXTENSIONS
from dic_repa.errors import UserError
from dic_repa.limits import check_limit

# The columns of a table: the class, then where each file of a sample begins and how many bytes it has.
LABEL, IMAGE, MOMENTS, FLIPPED, COLUMNS = 0, 1, 3, 5, 7
ABSENT = -1
_ENDINGS = {"cls": LABEL, "npy": MOMENTS, "flipped.npy": FLIPPED} | {each[1:]: IMAGE for each in EXTENSIONS}
_NAMES = {LABEL: ".cls", IMAGE: "picture", MOMENTS: ".npy", FLIPPED: ".flipped.npy"}
ABOUT, CHECKSUMS = ("name", "width", "height"), "crc32"  # of a sample's .json
_CLASS_BYTES = 32  # of a .cls, at most


def read_table(path: Path) -> np.ndarray:
    """Where the files of each sample are, (samples, COLUMNS), int64, `ABSENT` for what no sample has.

    Raises:
        UserError: the tar is cut short or damaged, a sample has a file twice, lacks what the first one has, or has
            neither a picture nor an .npy; or a .cls is no class number.
    """
    names: list[str] = []
    rows: list[list[int]] = []
    with path.open("rb") as file:
        for member in tar_members(path):
            folder, _, last = member.name.rpartition("/")
            stem, _, ending = last.partition(".")
            if not (member.isreg() and stem and ending):
                continue
            if not names or names[-1] != f"{folder}/{stem}":
                names.append(f"{folder}/{stem}")
                rows.append([ABSENT] * COLUMNS)
            if (column := _ENDINGS.get(ending.lower())) is None:
                continue
            if rows[-1][column] != ABSENT:
                raise UserError(f"{path}: the sample {_shown(names)} has two files as its {_NAMES[column]}; keep one")
            check_limit("file-bytes", member.size, f"the size of {member.name} in {path} in bytes")
            if column == LABEL:
                file.seek(member.offset_data)
                rows[-1][LABEL] = _class_number(file.read(min(member.size, _CLASS_BYTES)), path, member.name)
            else:
                rows[-1][column : column + 2] = member.offset_data, member.size
    table = np.array(rows, dtype=np.int64).reshape(-1, COLUMNS)
    if rows:
        _check_alike(table[:, list(_NAMES)] != ABSENT, names, path)
    return table


def kinds(table: np.ndarray) -> str:
    """What each sample of a table has, in words."""
    return " and ".join(name for column, name in _NAMES.items() if table[0, column] != ABSENT)


def _class_number(text: bytes, path: Path, name: str) -> int:
    if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
        found = text.decode(errors="replace").strip()[:20]
        raise UserError(f"{path}: {name} is no class number from 0 on, but '{found}'; correct it")
    return int(text)


def _check_alike(has: np.ndarray, names: list[str], path: Path) -> None:
    """A UserError if samples differ in which of the `_NAMES` they have, or have nothing to train on."""
    kinds = list(_NAMES.values())
    for row, kind in np.argwhere(has != has[0])[:1].tolist():
        one, other = (names[row], names[0]) if has[0, kind] else (names[0], names[row])
        raise UserError(
            f"{path}: the sample {_shown([one])} has no {kinds[kind]}, and {_shown([other])} has one; the files of a "
            "sample must follow each other, and all samples have the same ones"
        )
    if not has[0, [kinds.index("picture"), kinds.index(".npy")]].any():
        raise UserError(f"{path}: the sample {_shown(names[:1])} has neither a picture nor an .npy; make the tar again")


def _shown(names: list[str]) -> str:
    return names[-1].lstrip("/")


def write_shard(path: Path, rows: Iterable[dict[str, Any]], first: int, image_format: str, labelled: bool) -> int:
    """Write rows as `dic-repa prepare` makes them as a tar; how many there were.

    Samples are numbered from `first` on. Name, width, height and the checksums of the files go into a .json each, which
    training passes over.
    """
    count = 0
    with tarfile.open(path, "w") as archive:
        for count, row in enumerate(rows, start=1):
            files = {image_format: row["image"]["bytes"]}
            files |= {"npy": _npy(row["moments"])} if "moments" in row else {}
            files |= {"flipped.npy": _npy(row["moments_flipped"])} if "moments_flipped" in row else {}
            files |= {"cls": str(row["label"]).encode()} if labelled else {}
            sums = {ending: zlib.crc32(content) for ending, content in files.items()}
            about = {key: row[key] for key in ABOUT} | {CHECKSUMS: sums}
            files["json"] = json.dumps(about).encode()
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{first + count - 1:09d}.{ending}")
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))
    return count


def read_rows(path: Path, check: bool = False) -> list[dict[str, Any]]:
    """The `name`, `width`, `height` and `label` of each row of a shard that `write_shard` has written.

    Raises:
        UserError: it is damaged; with `check`, also where a file of it is not as its checksum says.
    """
    table, sums = read_table(path), {}
    found: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for member in tar_members(path):
            name, _, ending = member.name.partition(".")
            file.seek(member.offset_data)
            if ending != "json":
                sums[ending] = zlib.crc32(file.read(member.size)) if check else 0
                continue
            try:
                about = json.loads(file.read(member.size))
                wrong = [each for each, expected in about[CHECKSUMS].items() if check and sums[each] != expected]
                row = {key: about[key] for key in ABOUT} | {"label": max(0, int(table[len(found)][LABEL]))}
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                wrong, row = ["json"], {}
            if wrong:
                raise UserError(
                    f"{path} is damaged: {name}.{wrong[0]} has changed since it was prepared; remove that shard, and "
                    "run the same `dic-repa prepare` again, which makes it anew"
                )
            found.append(row)
            sums = {}
    return found


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()
