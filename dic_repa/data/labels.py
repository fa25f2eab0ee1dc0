"""The class of each image from a labels file; what contradicts itself or would become an odd class is refused."""

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from dic_repa.errors import UserError, first_few, first_line
from dic_repa.limits import check_limit


def read_labels(
    text: bytes, label_file: str, names: Sequence[str]
) -> tuple[list[int], tuple[str, ...], dict[str, Any]]:
    """The label of each of `names`, the classes, and the rows that are of none of `names`.

    They come from CSV rows 'file,label' or from JSON, {file: label} or {"labels": [[file, label], ...]}. Labels are
    class numbers, or names, which are numbered in sorted order.

    Raises:
        UserError: no labels file, a file without a label or with two, a label that is no number or name, or too many
            classes.
    """
    try:
        rows = _json_rows(text) if label_file.endswith(".json") else _csv_rows(text)
        table: dict[str, Any] = {}
        twice = []
        for name, label in rows:
            name = str(name).replace("\\", "/")
            found = table.setdefault(name, label)
            if found is not label and found != label:
                twice.append(name)
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise UserError(
            f"{label_file} is not a labels file, which has CSV rows 'file,label' or JSON ({first_line(error)})"
        ) from None
    if twice:
        raise UserError(f"{label_file}: {counted(twice)} in it with two labels; keep the right one of each")
    if missing := [name for name in names if table.get(name) in (None, "")]:
        raise UserError(f"{label_file}: {counted(missing)} not in it, or without a label; add it, or remove the files")
    given = [table.pop(name) for name in names]
    if odd := [label for label in given if isinstance(label, bool) or not isinstance(label, (int, str))]:
        raise UserError(f"{label_file} has the label {json.dumps(odd[0])[:40]}; labels are class numbers, or names")
    if all(isinstance(label, int) or re.fullmatch(r"\s*-?[0-9]+\s*", label) for label in given):
        return *_numbers(given, label_file), table
    return *numbered([str(label) for label in given], label_file), table


def numbered(labels: Sequence[str], source: str) -> tuple[list[int], tuple[str, ...]]:
    """The class number of each label, and the class names in sorted order."""
    numbers = {name: k for k, name in enumerate(sorted(set(labels)))}
    check_limit("classes", len(numbers), f"the number of classes of {source}")
    for name in numbers:
        if "\0" in name or (not name.isascii() and name != name.encode(errors="replace").decode()):
            raise UserError(f"{source} has the label {json.dumps(name)[:80]}, which is no text in UTF-8; rename it")
    return [numbers[label] for label in labels], tuple(numbers)


def counted(names: Sequence[str]) -> str:
    """'3 (a, b, ...) are': how many, and the first few."""
    return f"{len(names)} ({first_few(names, 3)}) {'is' if len(names) == 1 else 'are'}"


def _numbers(labels: Sequence[int | str], source: str) -> tuple[list[int], tuple[str, ...]]:
    try:
        numbers = [int(label) for label in labels]
    except ValueError:  # Python reads no more than 4,300 digits
        raise UserError(f"{source} has a label of thousands of digits; classes are numbered from 0") from None
    if min(numbers) < 0:
        raise UserError(f"{source} has the label {min(numbers)}; classes are numbered from 0")
    check_limit("classes", max(numbers) + 1, f"the number of classes up to the highest label of {source}")
    return numbers, tuple(str(k) for k in range(max(numbers) + 1))


def _json_rows(text: bytes) -> Sequence[Any]:
    """Pairs of file and label."""
    content = json.loads(text, object_pairs_hook=tuple)  # pairs, since a dict would keep the last of two
    if not isinstance(content, tuple):
        raise TypeError("it is no object")
    tables = [value for key, value in content if key == "labels"]
    if len(tables) > 1:
        raise ValueError("it has 'labels' twice")
    return tables[0] if tables else content


def _csv_rows(text: bytes) -> list[list[str]]:
    rows = csv.reader(io.StringIO(text.decode("utf-8-sig"), newline=""))
    return [row[:2] for row in rows if row]
