"""Mutated and damaged records of runs, samples and prepared data, under the verbs that read them."""

from __future__ import annotations

from pathlib import Path
from random import Random

from .good import SAMPLE
from .judge import Case
from .mutate import damage, damaged_text, mutated_json

COUNT = 600
MORE = "sample run --out samples --num 10 --steps 1 --batch-size 4"
TRAIN = "train tiny.yaml --out out --set data.name=prepared --set data.path=prepared --set train.steps=2"
# Each record, with the commands that read it and the inputs that they need.
RECORDS = {
    "run/metrics.jsonl": ["report run --out out.html", "runs .", "train --resume run --set train.steps=10"],
    "run/environment.json": ["report run --out out.html", "runs .", "train --resume run --set train.steps=10"],
    "run/recipe.yaml": ["report run --out out.html", "runs .", "train --resume run", f"sample run --out out {SAMPLE}"],
    "run/.dic-repa.jsonl": ["train --resume run --set train.steps=10", "train tiny.yaml --out run --overwrite"],
    "run/checkpoints/step_00000008/manifest.json": [
        "train --resume run --set train.steps=10",
        f"sample run --out out {SAMPLE}",
    ],
    "samples/samples.json": [MORE, "evaluate samples --reference samples --metrics fd-digits"],
    "samples/.dic-repa.jsonl": [MORE, MORE + " --overwrite"],
    "samples/samples.npz": ["evaluate samples/samples.npz --reference samples --metrics fd-digits"],
    "prepared/prepare.json": [
        TRAIN,
        "prepare images prepared --size 16 --autoencoder none",
        "evaluate samples --reference prepared --metrics fd-digits",
    ],
    "prepared/state.json": [TRAIN, "prepare images prepared --size 16 --autoencoder none"],
    "prepared/dataset_info.json": [TRAIN, "prepare images prepared --size 16 --autoencoder none"],
    "prepared/check.json": ["prepare images prepared --size 16 --autoencoder none"],
    "prepared/data-00000-of-00001.arrow": [TRAIN],
    "scored/evaluation/*/metrics.json": [
        "report scored --out out.html",
        "runs .",
        f"evaluate scored --reference samples --metrics fd-digits {SAMPLE}",
        "push scored someone/scored --folder out",
    ],
    "scored/evaluation/*/samples.json": [f"evaluate scored --reference samples --metrics fd-digits {SAMPLE}"],
    "scored/probe/probe.json": ["report scored --out out.html"],
    "scored/tune/tune.json": [
        "report scored --out out.html",
        "tune scored --metric recognised --scales 1,2 --intervals 0:1 --num 8 --confirm 0 --steps 1 --batch-size 4",
    ],
    "converted/data.json": [f"sample converted --out out {SAMPLE}", "push converted someone/small --folder out"],
    "converted/recipe.yaml": [f"sample converted --out out {SAMPLE}", "push converted someone/small --folder out"],
}
PAIRS = [(file, line) for file, lines in RECORDS.items() for line in lines]


def case(index: int, chance: Random) -> Case:
    """The record number `index`: those of `PAIRS` come in turn."""
    file, line = PAIRS[index % len(PAIRS)]
    needs = {
        file.partition("/")[0],
        *(name for name in ("run", "samples", "prepared", "images") if name in line.split()),
    }
    if "=prepared" in line or "prepared" in line:
        needs |= {"prepared"}

    def place(folder: Path) -> None:
        from .good import TINY

        (folder / "tiny.yaml").write_text(TINY)
        found = sorted(folder.glob(file))[-1]
        spoil(found, chance)
        if "converted" in file:
            (folder / "converted/manifest.json").unlink(missing_ok=True)

    owns = ("out", "out.html", "run", "samples", "prepared", "scored")
    return Case(f"record {index}: {file}", [line.split()], place, tuple(sorted(needs)), owns=owns)


def spoil(file: Path, chance: Random) -> None:
    """Mutate a record by its format, or damage it as bytes."""
    if file.suffix in (".arrow", ".npz"):
        damage(
            file,
            chance.choice(["emptied", "halved", "a byte less", "noise", "removed", "an eighth zeroed", "a folder"]),
            chance,
            b"PK",
        )
    elif file.suffix == ".json":
        file.write_bytes(mutated_json(file.read_text(), chance))
    elif file.suffix == ".jsonl" and chance.random() < 0.6:
        lines = [line.encode() for line in file.read_text().splitlines()]
        at = chance.randrange(len(lines))
        lines[at] = mutated_json(lines[at].decode(), chance)
        file.write_bytes(b"\n".join(lines) + b"\n")
    elif chance.random() < 0.15:
        damage(file, chance.choice(["a folder", "a link to nowhere", "removed", "noise"]), chance, b"")
    else:
        file.write_bytes(damaged_text(file.read_bytes(), chance))
