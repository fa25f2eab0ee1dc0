"""Seeded mutations of values, trees of keys, JSON and bytes."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

from .judge import CONTROL

# Values as YAML, JSON and a command line have them, where a number, a name or a list is due.
NUMBERS = "0 -1 1 2 3 1.5 -0.0 1e3 1e-3 1e308 1e400 -1e400 100000000000000000000 99999999999 1_000 0x10 010".split()
NUMBERS += [
    "9" * 4300,
    "9" * 5000,
    "1e99999",
    ".inf",
    "-.inf",
    ".nan",
    "nan",
    "inf",
    "Infinity",
    "NaN",
    "1:30",
    "1:30:0.5",
]
NUMBERS += ["10000", "100000", "1000000", "10000000", "2147483648", "4294967296", "9223372036854775808", "0.1.2", "1,5"]
WORDS = [
    "true",
    "false",
    "yes",
    "no",
    "on",
    "null",
    "~",
    "none",
    "''",
    "' '",
    "x",
    "digits",
    "os:system",
    "builtins:eval",
]
WORDS += ["subprocess:call", "no.such:thing", "a:b:c", ":", "::", "timm:", "timm:no_such", "../../x", "out/../run", "."]
WORDS += ["2026-01-01", "=", "<<", "!!python/object/apply:os.system ['touch canary.txt']", "!!binary aGk=", "!!set {a}"]
WORDS += [
    '"\\x1b]0;owned\\x07"',
    '"\\0"',
    '"a\\nb"',
    '"\\u202e abc"',
    '"\\ud800"',
    "'" + "x" * 5000 + "'",
    "日本",
    "🦀",
]
NESTED = [
    "[]",
    "{}",
    "[[]]",
    "[1]",
    "[1, 2]",
    "[true]",
    "[null]",
    "{a: 1}",
    "{name: x}",
    "{name: [x]}",
    "{name: digits, a: 1}",
]
NESTED += [
    "[1, 1, 1, 1, 1]",
    "[100000, 1, 1, 1, 1]",
    "[-1, 1, 1, 1, 1]",
    "[1, 1, 1, 1]",
    "[a, b]",
    "{1: 2}",
    "{null: 1}",
]
NESTED += ["{[a]: 1}", "{{a: b}: 1}", "[" * 500 + "]" * 500, "{a: " * 300 + "1" + "}" * 300, "[" + "1, " * 20000 + "1]"]
VALUES = NUMBERS + WORDS + NESTED

# The same as JSON has them, for records and configurations.
JSONS: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    1.5,
    -0.5,
    1e308,
    10**20,
    20000,
    100000,
    2**31,
    2**63,
    "",
    "x",
    "1",
    "../x",
]
JSONS += [CONTROL, "a\nb", "\0", "x" * 5000, "os:system", [], {}, [1], ["x"], [None], {"a": 1}, {"name": "x"}, [[[]]]]
JSONS += [[1] * 5, [10**5] * 5, [-1] * 5, list(range(1000)), float("nan"), float("inf"), 10**400]
DEEP = "[" * 100_000 + "]" * 100_000
DAMAGES = ("emptied", "halved", "a byte less", "a bit", "the first bit", "the last bit", "an eighth zeroed", "longer")
DAMAGES += ("noise", "removed", "a folder", "a link to nowhere", "foreign")


def any_json(chance: Random) -> Any:
    """One of `JSONS`, which may then be changed."""
    return copy.deepcopy(chance.choice(JSONS))


def mutated_json(text: str, chance: Random) -> bytes:
    """A JSON file with one to three places changed; one in six is damaged as text."""
    if chance.random() < 1 / 6:
        return damaged_text(text.encode(), chance)
    content = json.loads(text)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        content = change(content, chance)
    return json.dumps(content).encode()


def change(content: Any, chance: Random) -> Any:
    """Plain content with one place changed: a value replaced, a key removed, renamed or added."""
    places = [()]
    for place in places:
        held = at(content, place)
        keys = list(held) if isinstance(held, dict) else range(min(len(held), 20)) if isinstance(held, list) else ()
        places += [(*place, key) for key in keys]
        if len(places) > 500:
            break
    place = chance.choice(places)
    if not place:
        return any_json(chance)
    held, key = at(content, place[:-1]), place[-1]
    what = chance.random()
    if what < 0.65:
        held[key] = any_json(chance)
    elif what < 0.8:
        del held[key]
    elif isinstance(held, dict):
        held[chance.choice(["x", "", CONTROL, f"{key}s", "../x", "model"])] = held.pop(key) if what < 0.9 else 1
    else:
        held.insert(key, any_json(chance))
    return content


def at(content: Any, place: tuple) -> Any:
    for key in place:
        content = content[key]
    return content


def damaged_text(data: bytes, chance: Random) -> bytes:
    """Text that a disk, an editor or another program has spoilt."""
    cut = chance.randrange(len(data) + 1)
    kinds = [
        b"",
        data[:cut],
        data[:cut] + b"\0" * 16 + data[cut:],
        data[:cut] + b"\xff\xfe" + data[cut:],
        data[:cut] + chance.randbytes(8) + data[cut + 8 :],
        b"\xef\xbb\xbf" + data,
        data.decode(errors="replace").encode("utf-16"),
        data + data,
        data[:cut] + CONTROL.encode() + data[cut:],
        b"null",
        b"[]",
        b"{}",
        b"\n\n",
        b"NaN",
        DEEP.encode(),
        b"x" * 2_000_000,
        data.replace(b":", b" ", 1),
        data.replace(b"\n", b"\r\n"),
    ]
    return chance.choice(kinds)


def damage(file: Any, kind: str, chance: Random, foreign: bytes) -> None:
    """Damage a file in one of the `DAMAGES`."""
    data = bytearray(file.read_bytes())
    if kind in ("removed", "a folder", "a link to nowhere"):
        file.unlink()
        if kind == "a folder":
            file.mkdir()
        elif kind == "a link to nowhere":
            file.symlink_to("nowhere")
        return
    size = len(data)
    if kind in ("a bit", "the first bit", "the last bit") and size:
        place = {"a bit": chance.randrange(size), "the first bit": 0, "the last bit": size - 1}[kind]
        data[place] ^= 1 << chance.randrange(8)
    elif kind == "an eighth zeroed" and size:
        begin = chance.randrange(size - size // 8)
        data[begin : begin + size // 8 + 1] = bytes(size // 8 + 1)
    else:
        others = {
            "emptied": b"",
            "halved": data[: size // 2],
            "a byte less": data[:-1],
            "longer": data + b"\0" * 64,
            "noise": chance.randbytes(size or 10),
            "foreign": foreign,
        }
        data = others.get(kind, data)
    file.write_bytes(data)
