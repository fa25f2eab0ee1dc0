"""The classes of the attack: each module has `COUNT` cases, made by `case(index, chance)`."""

from __future__ import annotations

from random import Random

from . import checkpoints, commands, configs, recipes, records
from .judge import Case

CLASSES = {
    "recipes": recipes,
    "commands": commands,
    "checkpoints": checkpoints,
    "configs": configs,
    "records": records,
}


def make(name: str, index: int, seed: int) -> Case:
    """Case `index` of a class, the same for each seed whenever it is made."""
    return CLASSES[name].case(index, Random(f"{seed} {name} {index}"))
