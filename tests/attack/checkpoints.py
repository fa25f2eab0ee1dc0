"""Damaged files of checkpoints, snapshots, saved models and feature caches, under the verbs that read them.

What comes out must be refused, or the same as with the undamaged file bit for bit. Where a verb says that it takes an
older checkpoint instead, that is as promised.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from random import Random

from .good import RESULTS, content, place_small, result_line, use_cache
from .judge import Case, judge
from .mutate import DAMAGES, damage

STEP = "run/checkpoints/step_00000008"
# Each file with the results that depend on it.
FILES = {
    f"{STEP}/model.safetensors": ["sample raw", "resume", "sample run"],
    f"{STEP}/optimizer.pt": ["resume"],
    f"{STEP}/state.json": ["resume", "sample step"],
    f"{STEP}/manifest.json": ["resume", "sample run", "sample step", "sample ema"],
    f"{STEP}/ema/model.safetensors": ["resume", "sample run", "sample step", "sample ema", "convert step"],
    f"{STEP}/ema/config.json": ["sample step", "convert step"],
    f"{STEP}/ema/data.json": ["sample step"],
    f"{STEP}/ema/recipe.yaml": ["sample ema"],
    "run/snapshots/step_00000008-sigma_rel-0.1.safetensors": ["ema"],
    "converted/model.safetensors": ["sample converted", "convert converted"],
    "converted/config.json": ["sample converted"],
    "converted/data.json": ["sample converted"],
    "converted/recipe.yaml": ["sample converted"],
    "cache/*.npy": ["cached"],
}
PAIRS = [(file, result) for file, results in FILES.items() for result in results]
COUNT = 352
_expected: dict[tuple[Path, str], dict[str, str]] = {}


def case(index: int, chance: Random) -> Case:
    """The damage number `index`: all kinds of it on all files come in turn."""
    kind = DAMAGES[index % len(DAMAGES)]
    file, result = PAIRS[index // len(DAMAGES) % len(PAIRS)]

    def place(folder: Path) -> None:
        place_small(folder)
        found = next(folder.glob(file))
        other = found.with_name(found.name.replace("00000008", "00000004"))
        foreign = Path(str(found).replace("step_00000008", "step_00000004"))
        foreign = (
            foreign
            if foreign != found and foreign.is_file()
            else folder / "run/checkpoints/step_00000004/model.safetensors"
        )
        data = (other if other != found else foreign).read_bytes() if "cache" not in file else bytes(100)
        damage(found, kind, chance, data)

    needs = (*RESULTS[result][0], "run") if "run" not in RESULTS[result][0] else RESULTS[result][0]
    return Case(
        f"{file} {kind}, {result}",
        [result_line(result)],
        place,
        needs,
        check=partial(differs, result),
        owns=("out", "run", "cache"),
        prepare_process=use_cache,
    )


def differs(result: str, folder: Path) -> str:
    """What is not as with undamaged inputs."""
    said = (folder.parent / "errors").read_text(errors="replace")
    if "warning: " in said and ("damaged" in said or "missing" in said) and "resume" not in result:
        return ""  # the user has been told
    expected, found = expect(folder.parents[1] / "good/work", result), content(folder, result)
    return (
        f"differs: {sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))[:3]}"
        if expected != found
        else ""
    )


def expect(good: Path, result: str) -> dict[str, str]:
    """What comes of undamaged inputs; computed once."""
    if (good, result) not in _expected:
        folder = good.parents[1] / f"expected-{result.replace(' ', '-')}-{os.getpid()}"
        case = Case(
            result,
            [result_line(result)],
            place_small,
            RESULTS[result][0],
            "work",
            owns=("out", "run", "cache"),
            prepare_process=use_cache,
        )
        verdict = judge(case, folder, good, 60)
        assert verdict.outcome == "fine", verdict.said
        _expected[good, result] = content(folder / "work", result)
        assert _expected[good, result], result
    return _expected[good, result]
