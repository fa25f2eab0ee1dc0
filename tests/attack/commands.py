"""Mutated command lines: every verb and option of the command line, with hostile values.

Outputs are only ever named inside the case's folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import click

from .good import SAMPLE
from .judge import CONTROL, Case

COUNT = 1410

# Lines that work, in seconds, of every verb, and the inputs they need.
LINES = {
    "train tiny.yaml --out out": (),
    "train tiny.yaml --dry-run --json": (),
    "train --resume run": ("run",),
    "train --resume run --set train.steps=10 --allow-change": ("run",),
    f"sample run --out out {SAMPLE}": ("run",),
    f"sample converted --out out {SAMPLE}": ("converted",),
    f"sample run/checkpoints/step_00000004 --out out {SAMPLE}": ("run",),
    "evaluate samples --reference samples --metrics fd-digits --out out": ("samples",),
    f"evaluate run --reference samples --metrics fd-digits {SAMPLE}": ("run", "samples"),
    "report run --out out.html": ("run",),
    "report scored --out out.html": ("scored",),
    "probe run --encoder digits-vit --num 20 --times 0.5 --out out": ("run",),
    "tune run --metric recognised --scales 1,2 --num 8 --confirm 0 --steps 1 --batch-size 4 --out out": ("run",),
    "prepare images out --size 16 --autoencoder none": ("images",),
    "bench data tiny.yaml --samples 8 --steps 2": (),
    "bench model DiC-S --size 16 --batch 1 --rounds 1 --seconds 0.01 --no-peak": (),
    "bench sample tiny.yaml --batch 1 --rounds 1 --seconds 0.01": (),
    "bench train tiny.yaml --batch 1 --rounds 1 --seconds 0.01": (),
    "runs .": ("run", "scored"),
    "ema run --sigma-rel 0.08 --out out": ("run",),
    "info tiny.yaml": (),
    "encoders check digits-vit --image images/a/0.png --size 16 --out out.png": ("images",),
    "solvers compare scored --solvers heun --evaluations 2 --num 20 --out out.png": ("scored",),
    "parts time-grid": (),
    "convert run out": ("run",),
    "convert converted out.pt": ("converted",),
    "push run someone/run --folder out": ("run",),
    "recipes show tiny.yaml": (),
    "recipes diff tiny.yaml digits-urepa": (),
    "recipes explain train.steps": (),
    "env --json": (),
}
NUMBERS = (
    "0 -1 1 1.5 1e400 -1e400 1e-400 nan inf -inf 1e3 100000000000000000000 4300000000 99999 0x10 1_0 ٣ 1:30".split()
)
NUMBERS += ["9" * 4301, "1" * 5000, "1e99999"]
WORDS = [
    "",
    " ",
    "x",
    "-",
    "--",
    ",",
    "1,",
    ",,",
    "1,1",
    "a,b",
    "0:1",
    "1:0",
    ":",
    "::",
    "os:system",
    "timm:no_such",
    "null",
]
WORDS += [
    CONTROL,
    "a\nb",
    "a\rb",
    "\u202e",
    "caf\udce9",
    "日本",
    "x" * 5000,
    "*",
    "[",
    "{",
    "{a: 1}",
    "[1, 2]",
    "!!int x",
    "&a *a",
]
SETTINGS = [
    "",
    "=",
    "=1",
    "x",
    "x=",
    "train.steps",
    "train.steps=",
    "train.steps=-1",
    "train.steps=1e20",
    "train..steps=1",
]
SETTINGS += ["train=", "train=1", "model=null", "model.width=20000", "alignments.99999999.weight=1", "alignments.-1=x"]
SETTINGS += [
    f"{CONTROL}=1",
    f"model.name={CONTROL}",
    "train.steps=" + "9" * 5000,
    "model.options=" + "{a: " * 500,
    "a.b.c=1",
]
SETTINGS += [
    "sample.weights=",
    "data.path=",
    "plugins=[x]",
    "plugins=os",
    "train.seed=true",
    "train.steps=1:30",
    "caf\udce9=1",
]
# Names of inputs that are not what is due; `place` makes them.
INPUTS = [
    "tiny.yaml",
    "images",
    "images/a/0.png",
    "run",
    "samples",
    "no/such",
    ".",
    "..",
    "noise",
    "empty",
    "fifo",
    "broken",
]
INPUTS += [
    "cycle",
    "caf\udce9",
    f"n{CONTROL}",
    "two\nlines",
    "x" * 300,
    "a/" * 3000,
    "digits-urepa",
    "DiC-S/2",
    "empty.npz",
]
INPUTS += [
    "noise.npz",
    "noise.pt",
    "noise.safetensors",
    "noise.png",
    "noise.yaml",
    "noise.json",
    "noise.zip",
    "tiny.yaml/x",
    "",
]
OUTPUTS = [
    "out",
    "out/deep/er",
    "out.txt",
    "out.pt",
    "out.png",
    "images",
    "tiny.yaml",
    "tiny.yaml/x",
    "fifo",
    "broken",
    "cycle",
]
OUTPUTS += [
    "out/" + "x" * 300,
    f"out/{CONTROL}",
    "out/two\nlines",
    "out/caf\udce9",
    "",
    " ",
    ".",
    "run",
    "samples",
    "noise",
]


def place(folder: Path) -> None:
    """Inputs of the wrong kind."""
    noise = Random(0).randbytes(3000)
    for name in INPUTS:
        if name.startswith("noise"):
            (folder / name).write_bytes(noise)
    for name in ("empty", "empty.npz", f"n{CONTROL}", "two\nlines"):
        (folder / name).touch()
    (folder / os.fsdecode(b"caf\xe9")).mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "broken").symlink_to("nowhere")
    (folder / "cycle").symlink_to("cycle")


def case(index: int, chance: Random) -> Case:
    """The command line number `index`: the options of all verbs come in turn."""
    targets = _targets()
    line, option = targets[index % len(targets)]
    words = line.split()
    command, verb = find(words)
    must = "answer"
    if option is None:
        words = shuffled(words, verb, command, chance)
    else:
        value = chance.choice(values(option, words))
        if value == "" and index % 3:
            value = chance.choice(values(option, words))
        words = with_option(words, option, value)
        must = "refuse" if value == "" and option.type.name not in ("boolean",) else "answer"
    # What a run, a checkpoint or a folder of samples is given to, it may add to or go on with.
    owns = {"out", "out.html", "out.png", "out.pt", "out.txt", "runs", "averages"}
    if words[:1] in (["train"], ["evaluate"], ["tune"], ["probe"], ["ema"], ["sample"], ["solvers"]):
        owns |= {"run", "samples", "scored"}
    return Case(
        f"command {index}", [words], lambda folder: both(folder), LINES[line], must, owns=tuple(owns), codes=(75,)
    )


def both(folder: Path) -> None:
    from .good import place_small

    place_small(folder)
    place(folder)


def find(words: list[str]) -> tuple[click.Command, int]:
    """The command of a line, and how many words name it."""
    from dic_repa.cli import cli

    found: click.Command = cli
    context, count = click.Context(cli), 0
    while isinstance(found, click.Group):
        found, count = found.get_command(context, words[count]), count + 1
    return found, count


def _targets() -> list[tuple[str, click.Parameter | None]]:
    """Each line with each option of its verb, and with None for a change of the line as a whole."""
    found: list[tuple[str, click.Parameter | None]] = []
    for line in LINES:
        command, _ = find(line.split())
        found += [(line, option) for option in command.params if "--open" not in option.opts]
        found += [(line, None)] * 3
    return found


def values(option: click.Parameter, words: list[str]) -> list[str]:
    """Hostile values of an option."""
    if option.name == "overrides":
        return SETTINGS
    if is_output(option):
        return OUTPUTS
    kind = option.type.name
    if kind in ("path", "file", "directory") or option.name in (
        "checkpoint",
        "source",
        "runs",
        "recipe",
        "labels",
        "weak",
    ):
        return INPUTS + WORDS
    if kind in ("count", "float", "float range", "integer"):
        return NUMBERS + WORDS[:12]
    if kind == "boolean":
        return ["flag", "given twice", "=x"]
    return WORDS + NUMBERS + INPUTS[:8]


def is_output(option: click.Parameter) -> bool:
    return option.name in ("out", "path", "destination", "target", "chart", "save_statistics")


def with_option(words: list[str], option: click.Parameter, value: str) -> list[str]:
    """The line with one value in the place of its own."""
    if isinstance(option, click.Argument):
        _, count = find(words)
        command, _ = find(words)
        arguments = [o for o in command.params if isinstance(o, click.Argument)]
        at = count + arguments.index(option)
        if at < len(words) and not words[at].startswith("--"):
            return [*words[:at], value, *words[at + 1 :]]
        return [*words, value]
    name = max(option.opts, key=len)
    if option.type.name == "boolean":
        return words + {"flag": [name], "given twice": [name, name]}.get(value, [f"{name}=x"])
    if name in words:
        at = words.index(name)
        words = words[:at] + words[at + 2 :]
    return [*words, name, *([value, "1"] if option.nargs == 2 else [value])]


def shuffled(words: list[str], verb: int, command: click.Command, chance: Random) -> list[str]:
    """The line with words dropped, doubled, misspelt or out of place."""
    words = list(words)
    at = chance.randrange(verb, len(words) + 1)
    changes = [
        lambda: words[:at] + words[at + 1 :],
        lambda: words[:at] + words[at : at + 1] * 2 + words[at + 1 :],
        lambda: [*words[:at], chance.choice(WORDS), *words[at:]],
        lambda: [
            *words,
            chance.choice(
                ["--no-such", "--help=x", "-h", "-x", "--", "--=", "---", "--limit", "--limit=x", "--version"]
            ),
        ],
        lambda: [
            *words,
            "--limit",
            chance.choice(["", "x", "workers=", "workers=x", "=1", "workers=1e99", CONTROL, "no-such=1"]),
        ],
        lambda: [word.replace("--", "—") for word in words],
        lambda: [chance.choice(["sampel", "", "TRAIN", CONTROL, "caf\udce9", "x" * 5000]), *words[1:]],
        lambda: words[:verb],
        lambda: [*words, "--quiet", "--verbose"],
        lambda: words + ["x"] * 10_000,
        lambda: [word[:-1] if word.startswith("--") else word for word in words],
    ]
    return [word for word in chance.choice(changes)() if word != "--open"]
