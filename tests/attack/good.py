"""The good inputs of the attack, made once in a session: a run, its checkpoints, samples, data, records."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path

from .judge import Case, start, wait

TINY = """\
base: digits-urepa
model: {width: 8, depths: [1, 1, 1, 1, 1]}
alignments: []
train: {steps: 8, batch_size: 4, log_every: 2, checkpoint_every: 4, sample_every: 0, power_ema: [0.05, 0.1],
  snapshot_every: 4}
sample: {steps: 1, num: 8, batch_size: 4}
evaluate: null
"""
SAMPLE = "--num 8 --steps 1 --batch-size 4"
# What is made: its name and the command that makes it. Each needs those before it.
MAKES = {
    "run": ["train tiny.yaml --out run"],
    "converted": ["convert run converted"],
    "samples": [f"sample run --out samples {SAMPLE} --format both"],
    "prepared": ["prepare images prepared --size 16 --autoencoder none"],
    "cache": ["train cached.yaml --out cached"],
    "scored": [
        "train tiny.yaml --out scored --set evaluate.metric=recognised",
        f"evaluate scored --reference samples --metrics fd-digits {SAMPLE}",
        "probe scored --encoder digits-vit --num 20 --times 0.5",
        "tune scored --metric recognised --scales 1,2 --intervals 0:1 --num 8 --confirm 0 --steps 1 --batch-size 4",
    ],
}
# What verbs make of the undamaged inputs, to compare with: the command's inputs, and itself but for `--out`.
RESULTS = {
    "sample run": (("run",), f"sample run {SAMPLE}"),
    "sample raw": (("run",), f"sample run --weights raw {SAMPLE}"),
    "sample step": (("run",), f"sample run/checkpoints/step_00000008 {SAMPLE}"),
    "sample ema": (("run",), f"sample run/checkpoints/step_00000008/ema {SAMPLE}"),
    "sample converted": (("converted",), f"sample converted {SAMPLE}"),
    "convert step": (("run",), "convert run/checkpoints/step_00000008 {out}"),
    "convert converted": (("converted",), "convert converted {out}"),
    "ema": (("run",), "ema run --sigma-rel 0.08"),
    "resume": (("run",), "train --resume run --set train.steps=10"),
    "cached": (("cached", "cache"), "train cached.yaml"),
}
CACHED = """\
base: digits-urepa
model: {width: 8, depths: [1, 1, 1, 1, 1]}
alignments.0.cache: true
alignments.0.head_options.hidden: 16
data: {name: images, path: images, size: 16, options: {}}
train: {steps: 2, batch_size: 4, sample_every: 0}
evaluate: null
"""


def make_good(folder: Path, names: tuple[str, ...] = tuple(MAKES)) -> Path:
    """Make the inputs `names` in `folder`/work; an AssertionError where a command fails."""
    work = folder / "work"
    work.mkdir(parents=True)
    place_small(work)
    for name in names:
        lines = [line.split() for line in MAKES[name]]
        code, _ = wait(start(Case(name, lines, prepare_process=use_cache), folder), time.monotonic() + 120)
        assert code == 0, (folder / "errors").read_text()
    return work


def result_line(name: str, out: str = "out") -> list[str]:
    """The command of a result, with its output."""
    words = RESULTS[name][1].split()
    if "{out}" in words:
        return [out if word == "{out}" else word for word in words]
    return words if "--resume" in words else [*words, "--out", out]


def use_cache() -> None:
    """Keep features in the current folder."""
    os.environ["DIC_REPA_CACHE"] = "cache"


def content(folder: Path, name: str) -> dict[str, str]:
    """Hashes of what must come out the same, bit for bit: pixels, weights, averages, the optimizer's state."""
    if name == "resume":
        folder = folder / "run/checkpoints/step_00000010"
    elif name == "cached":
        folder = folder / "out/checkpoints/step_00000002"
    else:
        folder = folder / "out"
    files = [
        file for file in folder.rglob("*") if re.fullmatch(r"\d{6}\.png|.*\.(safetensors|pt)|config\.json", file.name)
    ]
    return {str(file.relative_to(folder)): digest(file) for file in sorted(files)}


def digest(file: Path) -> str:
    """A hash of a file's content; of weights without their metadata, which say of which run they are."""
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        header = {name: entry for name, entry in json.loads(data[8 : 8 + size]).items() if name != "__metadata__"}
        data = json.dumps(header, sort_keys=True).encode() + data[8 + size :]
    return hashlib.sha256(data).hexdigest()[:16]


def place_small(folder: Path) -> None:
    """A recipe, and twelve images in three folders, of which no two are alike."""
    from PIL import Image

    (folder / "tiny.yaml").write_text(TINY)
    (folder / "cached.yaml").write_text(CACHED)
    for i in range(12):
        file = folder / "images" / "abc"[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16 + i % 2, 16), (20 * i, 255 - 20 * i, i)).save(file)
        os.utime(file, (1e9, 1e9))  # caches know files by their times
