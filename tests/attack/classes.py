"""The classes of the attack: each module has `COUNT` cases, made by `case(index, chance)`; some judge them in a way of
their own.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from . import archives, checkpoints, commands, configs, kills, recipes, records, resources, strangers
from .judge import Case, Verdict, judge

CLASSES = {
    "recipes": recipes,
    "commands": commands,
    "checkpoints": checkpoints,
    "configs": configs,
    "records": records,
    "archives": archives,
    "strangers": strangers,
    "kills": kills,
    "resources": resources,
}


def make(name: str, index: int, seed: int) -> Case:
    """Case `index` of a class, the same for each seed whenever it is made."""
    return CLASSES[name].case(index, Random(f"{seed} {name} {index}"))


def judged(name: str, case: Case, folder: Path, good: Path) -> Verdict:
    """The verdict on a case of a class."""
    return getattr(CLASSES[name], "judge", judge)(case, folder, good)
