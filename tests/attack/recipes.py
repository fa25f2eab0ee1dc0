"""Mutated recipes: `recipes show`, and then `train --dry-run`, of each.

What is shown is compared with what the file says, by a reading of our own that knows neither defaults nor types.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from random import Random
from typing import Any

import yaml

from .judge import Case
from .mutate import NESTED, NUMBERS, VALUES, WORDS, damaged_text

COUNT = 9000

# Keys with good values, of which a recipe is made before it is mutated.
KEYS = {
    "description": "a test",
    "model.name": "DiC",
    "model.width": "8",
    "model.depths": "[1, 1, 1, 1, 1]",
    "model.time_scale": "1.0",
    "model.zero_gates": "false",
    "model.options": "{}",
    "data.name": "digits",
    "data.size": "16",
    "data.options": "{}",
    "data.workers": "0",
    "objective.name": "flow-matching",
    "objective.options": "{}",
    "optimizer.name": "adamw",
    "optimizer.learning_rate": "1e-3",
    "optimizer.weight_decay": "0",
    "optimizer.decay_on": "matrices",
    "optimizer.betas": "[0.9, 0.99]",
    "optimizer.options": "{}",
    "schedule.name": "constant",
    "schedule.warmup_steps": "2",
    "schedule.options": "{}",
    "train.steps": "4",
    "train.batch_size": "4",
    "train.micro_batch": "2",
    "train.gradient_clip": "1.0",
    "train.ema_decay": "0.99",
    "train.ema_half_life": "1e+4",
    "train.more_ema_decays": "[0.9]",
    "train.power_ema": "[0.05, 0.1]",
    "train.snapshot_every": "4",
    "train.label_dropout": "0.1",
    "train.precision": "'no'",
    "train.seed": "1",
    "train.log_every": "2",
    "train.sample_every": "0",
    "train.checkpoint_every": "4",
    "train.keep_checkpoints": "2",
    "train.max_skipped": "3",
    "train.loader_timeout": "60",
    "train.trackers": "[]",
    "train.sharding": "none",
    "sample.solver": "heun",
    "sample.steps": "2",
    "sample.num": "8",
    "sample.guidance": "{scale: 1.5, interval: [0, 0.7], kind: cfg}",
    "sample.precision": "fp32",
    "sample.weights": "ema",
    "sample.batch_size": "4",
    "sample.seed": "0",
    "evaluate.metric": "digits",
    "evaluate.also": "[]",
    "evaluate.every": "0",
    "plugins": "[]",
}
ALIGNMENT = (
    "[{encoder: digits-vit, tap: mid.0, head: mlp, head_options: {hidden: 16}, loss: u-repa, weight: 0.5, "
    "target: tokens, time_weight: constant, schedule: constant, encoder_options: {}}]"
)
# Options that a part does not take, or takes in another form.
OPTIONS = [
    "{eps: 1.0e-8}",
    "{eps: x}",
    "{no_such: 1}",
    "{final: 0.1}",
    "{decay: -1}",
    "{flip: 3}",
    "{path: vp}",
    "{time: {}}",
]
OPTIONS += ["{time: {name: uniform, x: 1}}", "{prediction: 7}", "{num_classes: -1}", "{num_classes: 100000000}"]
OPTIONS += [
    "{kernel_size: 10000}",
    "{mlp_ratio: 1.0e+9}",
    "{path: {name: linear}}",
    "{split: test}",
    "{size: 3}",
    "{x: }",
]


def case(index: int, chance: Random) -> Case:
    """The recipe number `index`."""
    files = whole_files(chance) if index % 36 == 0 else {"recipe.yaml": mutated(chance)}
    text = files["recipe.yaml"]

    def place(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(
                content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
            )

    lines = [["recipes", "show", "recipe.yaml"], ["train", "recipe.yaml", "--dry-run", "--out", "out"]]
    return Case(
        f"recipe {index}", lines, place, check=lambda folder: misread(text, (folder.parent / "said").read_text())
    )


def mutated(chance: Random) -> str:
    """A recipe of good keys with one to three mutations."""
    keys = {key: KEYS[key] for key in KEYS if key.startswith("model.") or chance.random() < 0.5}
    keys["alignments"] = ALIGNMENT if chance.random() < 0.2 else "[]"
    pairs = list(keys.items())
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        mutate(pairs, chance)
    text = "base: digits-urepa\n" + as_text(pairs)
    return text if chance.random() > 0.1 else damaged_text(text.encode(), chance).decode("utf-8", "surrogateescape")


def mutate(pairs: list[tuple[str, str]], chance: Random) -> None:
    """Change one thing of a recipe, which is pairs of a dotted key and a value as text."""
    place = chance.randrange(len(pairs))
    key, value = pairs[place]
    what = chance.random()
    if what < 0.45:
        pairs[place] = key, chance.choice(VALUES)
    elif what < 0.55:
        section = chance.choice(["model", "data", "objective", "optimizer", "schedule"])
        pairs.append((f"{section}.options", chance.choice(OPTIONS)))
    elif what < 0.65:
        inside = chance.choice(["1", "1.5", "-0.0", "true", "x", "mid.0", "digits-vit", "16"])
        pairs[place] = (
            key,
            (value.replace(inside, chance.choice(VALUES), 1) if inside in value else chance.choice(NUMBERS)),
        )
    elif what < 0.72:
        pairs.insert(chance.randrange(len(pairs)), (key, chance.choice([value, *NUMBERS[:5]])))  # a key twice
    elif what < 0.79:
        pairs[place] = (
            chance.choice([key + "s", key.upper(), key[:-1], key + ".x", "." + key, key + ".", "", "x"]),
            value,
        )
    elif what < 0.86:
        pairs[place] = key.partition(".")[0], chance.choice([*NESTED, *WORDS])  # a section
    elif what < 0.93:
        pairs.append(
            (chance.choice(["base", "plugins", "paper", "sample", "evaluate", "folders"]), chance.choice(VALUES))
        )
    else:
        listed = [
            "alignments.0.weight",
            "alignments.0.encoder",
            "alignments.7.tap",
            "alignments.-1.tap",
            "alignments.x",
        ]
        pairs.append((chance.choice([*listed, *KEYS]), chance.choice(VALUES)))


def as_text(pairs: list[tuple[str, str]]) -> str:
    """The recipe as YAML: keys of a section together, and those that come twice as a second section."""
    lines: list[str] = []
    section = None
    for key, value in pairs:
        head, dot, rest = key.partition(".")
        if not dot or not rest or not head or head == "alignments":
            lines.append(f"{quoted(key)}: {value}")
            section = None
            continue
        if head != section:
            lines.append(f"{head}:")
        lines.append(f"  {quoted(rest)}: {value}")
        section = head
    return "\n".join(lines) + "\n"


def quoted(key: str) -> str:
    return key if key and key[0].isalnum() else f"'{key}'"


def whole_files(chance: Random) -> dict[str, str]:
    """Recipes that are hostile as a whole: bombs, cycles, depths, lengths, chains of bases, tags."""
    tiny = "base: digits-urepa\nmodel: {width: 8, depths: [1, 1, 1, 1, 1]}\nalignments: []\n"
    tiny += "train: {steps: 2, batch_size: 2}\n"
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, chance.choice([20, 40]))
    )
    count = chance.choice([3, 20, 300])
    chain = {f"r{i}.yaml": f"base: r{i + 1}.yaml\n" for i in range(count)} | {f"r{count}.yaml": tiny}
    levels = chance.choice([50, 500, 5000])
    texts: list[dict[str, str]] = [
        {"recipe.yaml": tiny + bomb},
        {"recipe.yaml": tiny + bomb + "model: *a19\n"},
        {"recipe.yaml": tiny + "data: &a {options: *a}\n"},
        {"recipe.yaml": tiny + "data: &a {options: {b: *a}}\n"},
        {"recipe.yaml": "&a {base: *a}"},
        {"recipe.yaml": "&a {b: *a}"},
        {"recipe.yaml": "&a [*a]"},
        {"recipe.yaml": tiny + "objective: {options: " + "{a: " * levels + "1" + "}" * levels + "}\n"},
        {"recipe.yaml": tiny + "plugins: " + "[" * levels + "]" * levels + "\n"},
        {"recipe.yaml": tiny + "".join(" " * i + "a:\n" for i in range(levels))},
        {"recipe.yaml": tiny + "alignments: [" + "{encoder: digits-vit}, " * 20_000 + "]\n"},
        {"recipe.yaml": tiny + f"train.power_ema: [{', '.join(['0.1'] * 20_000)}]\n"},
        {"recipe.yaml": tiny + "model.depths: [100000, 100000, 100000, 100000, 100000]\n"},
        {"recipe.yaml": tiny + "model.width: 1000000\n"},
        {"recipe.yaml": tiny + "".join(f"k{i}: {i}\n" for i in range(50_000))},
        {"recipe.yaml": tiny + "description: " + "x" * 3_000_000 + "\n"},
        {"recipe.yaml": tiny + "plugins: [" + ", ".join(f"p{i}" for i in range(10_000)) + "]\n"},
        {"recipe.yaml": "base: r0.yaml\n", **chain},
        {"recipe.yaml": "base: recipe.yaml\n"},
        {"recipe.yaml": "base: other.yaml\n", "other.yaml": "base: recipe.yaml\n"},
        {"recipe.yaml": "base: ../work/recipe.yaml\n"},
        {"recipe.yaml": "base: /dev/null\n"},
        {"recipe.yaml": "base: .\n"},
        {"recipe.yaml": tiny + "---\n" + tiny},
        {"recipe.yaml": tiny + "train: {steps: 3}\n"},
        {"recipe.yaml": tiny + "<<: {train: {steps: 3}}\n"},
        {"recipe.yaml": tiny + "? {a: b}\n: 1\n"},
        {"recipe.yaml": tiny + "? [a]\n: 1\n"},
        {"recipe.yaml": tiny + "x: !!python/object/apply:os.system ['touch canary.txt']\n"},
        {"recipe.yaml": tiny + "x: !!python/name:os.system\n"},
        {"recipe.yaml": tiny + "x: !unknown 1\n"},
        {"recipe.yaml": "%YAML 9.9\n---\n" + tiny},
        {"recipe.yaml": "%TAG ! tag:x,2000:\n---\n" + tiny},
        {"recipe.yaml": "\t" + tiny},
        {"recipe.yaml": tiny.replace(": ", ":\t")},
        {"recipe.yaml": tiny + "model: {width: 8, width: 16}\n"},
        {"recipe.yaml": tiny + "sample: {guidance: {scale: 1, scale: 2}}\n"},
        {"recipe.yaml": tiny + "objective: {options: {path: {name: linear, name: vp}}}\n"},
        {"recipe.yaml": tiny + "data: {name: images, path: out}\n"},
        {"recipe.yaml": tiny + "data: {name: prepared, path: recipe.yaml}\n"},
        {"recipe.yaml": tiny + "train.steps: 1:30\n"},
        {"recipe.yaml": tiny + "sample: {num: 1:30}\n"},
        {"recipe.yaml": tiny + "train.batch_size: true\n"},
        {"recipe.yaml": tiny + "optimizer: {learning_rate: yes}\n"},
        {"recipe.yaml": tiny + "optimizer: {options: {eps: true}}\n"},
        {"recipe.yaml": tiny + "description: 2026-01-01\n"},
        {"recipe.yaml": tiny + "plugins: [os, sys, antigravity]\n"},
        {"recipe.yaml": tiny + "model: {name: 'os:getcwd'}\n"},
        {"recipe.yaml": tiny + "alignments: [{encoder: 'os:getcwd'}]\n"},
        {"recipe.yaml": tiny + "optimizer: {name: 'torch.optim:NoSuch'}\n"},
        {"recipe.yaml": tiny + "optimizer: {name: 'builtins:dict'}\n"},
    ]
    return chance.choice(texts)


def misread(text: str, said: str) -> str:
    """Where the recipe that was shown is not what the file says; '' if it is."""
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return ""  # not for this reader, so it cannot tell
    if key := twice(root, set()):
        return f"the key {key!r} is there twice"
    with contextlib.suppress(yaml.YAMLError, RecursionError):
        shown = yaml.safe_load(said.partition("\ndevice  ")[0])
        return differs(root, shown, "")
    return ""


def twice(node: yaml.Node, seen: set[int]) -> str:
    """A key that a mapping holds twice."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return ""
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            return next(key for key in keys if keys.count(key) > 1)
    inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    return next((key for part in inside if (key := twice(part, seen))), "")


def differs(node: yaml.Node, shown: Any, where: str) -> str:
    """The first leaf of the file that is not the value that was shown."""
    if isinstance(node, yaml.MappingNode) and isinstance(shown, dict):
        for key, value in node.value:
            if key.value in shown and (found := differs(value, shown[key.value], f"{where}.{key.value}")):
                return found
    elif isinstance(node, yaml.SequenceNode) and isinstance(shown, list):
        for i, value in enumerate(node.value):
            if i < len(shown) and (found := differs(value, shown[i], f"{where}.{i}")):
                return found
    elif isinstance(node, yaml.ScalarNode) and not same(node.value, shown):
        return f"{where[1:]} is {node.value[:50]!r} in the file, and was read as {shown!r}"
    return ""


def same(text: str, shown: Any) -> bool:
    """Whether a scalar of the file can mean the value that was shown."""
    if isinstance(shown, bool):
        return text.lower() in (("true", "yes", "on") if shown else ("false", "no", "off"))
    if shown is None:
        return text in ("", "~", "null", "Null", "NULL")
    if isinstance(shown, int | float):
        with contextlib.suppress(ValueError, OverflowError):
            return float(text.replace(".inf", "inf").replace(".nan", "nan")) == float(shown)
        with contextlib.suppress(ValueError):
            return int(text, 0) == shown
        return False
    return True
