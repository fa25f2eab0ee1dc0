"""Hostile config.json and weights headers in a folder as one downloads it, without a manifest."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from .good import SAMPLE
from .judge import Case
from .mutate import CONTROL, any_json, mutated_json

COUNT = 110
LINES = [["sample", "converted", "--out", "out", *SAMPLE.split()], ["convert", "converted", "out"]]
CONFIGS: list[dict[str, Any]] = [
    {"width": 20000},
    {"width": 10**9},
    {"width": -8},
    {"width": 8.5},
    {"width": "8"},
    {"width": [8]},
    {"width": True},
    {"depths": [10**5] * 5},
    {"depths": [1] * 10**6},
    {"depths": [-1, 1, 1, 1, 1]},
    {"depths": "11111"},
    {"depths": 5},
    {"num_classes": -1},
    {"num_classes": 10**9},
    {"num_classes": "10"},
    {"num_classes": [10]},
    {"in_channels": 10**7},
    {"in_channels": 0},
    {"out_channels": -1},
    {"time_scale": "nan"},
    {"time_scale": float("nan")},
    {"time_scale": 0},
    {"learn_sigma": "no"},
    {"mlp_ratio": 10**9},
    {"condition": {"kind": "vector", "shape": [10**9]}},
    {"condition": {"kind": CONTROL}},
    {"condition": 3},
    {"model": "SiT"},
    {"model": "os:system"},
    {"model": ["DiC"]},
    {"model": {"DiC": 1}},
    {"model": CONTROL},
    {"model": None},
    {"self": 1},
    {"__class__": "x"},
    {"block": "os:system"},
    {CONTROL: 1},
]


def case(index: int, chance: Random) -> Case:
    """One of `CONFIGS`, a mutated config, or a hostile header of the weights."""
    line = LINES[index % 2]

    def place(folder: Path) -> None:
        converted = folder / "converted"
        (converted / "manifest.json").unlink(missing_ok=True)
        config, weights = converted / "config.json", converted / "model.safetensors"
        if index < 2 * len(CONFIGS):
            config.write_text(json.dumps(json.loads(config.read_text()) | CONFIGS[index // 2]))
        elif index % 3 == 0:
            config.write_bytes(mutated_json(config.read_text(), chance))
        else:
            weights.write_bytes(hostile_header(weights.read_bytes(), chance))

    return Case(f"config {index}", [line], place, ("converted",))


def hostile_header(data: bytes, chance: Random) -> bytes:
    """A safetensors file whose header lies."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = chance.choice([key for key in header if key != "__metadata__"])
    what = chance.randrange(12)
    if what == 0:
        return struct.pack("<Q", chance.choice([0, 1, 2**40, 2**63, 2**64 - 1])) + data[8:]
    if what == 1:
        return struct.pack("<Q", 10**8) + b" " * 10**8
    changes: dict[int, Any] = {
        2: {"shape": [10**6, 10**6]},
        3: {"shape": [-1]},
        4: {"dtype": "X9"},
        5: {"data_offsets": [0, 2**62]},
        6: {"data_offsets": [10, 0]},
        7: {"data_offsets": [0, 4]},
        8: {"shape": []},
        9: chance.choice([{"dtype": "F64"}, {"dtype": "I64"}, {"dtype": "BOOL"}, {"shape": "x"}]),
    }
    if what in changes:
        header[name] |= changes[what]
    elif what == 10:
        header[CONTROL] = header.pop(name)
    else:
        header[name] = any_json(chance)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body
