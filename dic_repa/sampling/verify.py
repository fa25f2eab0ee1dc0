"""`dic-repa verify`: is what this package wrote still as it was written? What is damaged, and what can be mended.

A run, one of its checkpoints, a saved model, a folder of samples, a prepared data set, a feature cache: each by its own
manifest, checksums or format. Nothing is changed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from dic_repa.alignment.cache import FeatureCache
from dic_repa.data.prepared import SETTINGS_FILE, Prepared
from dic_repa.data.shard_lists import INDEX, ShardList, find_shards
from dic_repa.data.statistics import STATISTICS_FILE
from dic_repa.data.tar_shards import read_rows
from dic_repa.errors import UserError, first_line
from dic_repa.files.claims import find_claims
from dic_repa.files.lock import holder
from dic_repa.files.manifest import MANIFEST, check_whole, find_damage
from dic_repa.files.outputs import ASIDE, LOCK, MARKER, is_lock
from dic_repa.files.reading import check_regular, parse_json, read_json
from dic_repa.files.weights import SEAL, read_tensors
from dic_repa.models.pretrained import CONFIG, WEIGHTS
from dic_repa.runs.checkpoints import checkpoint_step, find_stranger, read_run_id
from dic_repa.runs.folder import RunFolder
from dic_repa.runs.snapshots import find_snapshots, read_snapshot
from dic_repa.runtime.progress import progress_bar
from dic_repa.sampling import SAMPLES_FILE, SAMPLES_NPZ

DEPTH = 4  # of folders that are looked into for something to verify


@dataclass
class Finding:
    """One thing that was looked at. `damage` is empty if it is whole; `mend` says what to do about the damage."""

    path: Path
    damage: str = ""
    mend: str = ""
    note: str = ""


def verify(path: str | Path) -> Iterator[Finding]:
    """Look at all that this package wrote at or below `path`, one thing after another.

    Raises:
        UserError: there is nothing that can be verified.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is nothing at {path} to verify")
    found = False
    for finding in _at(path):
        found = True
        yield finding
    if not found:
        known = "a run, a checkpoint, a saved model, a folder of samples, a prepared data set, or a feature cache"
        raise UserError(f"there is nothing in {path} that dic-repa can verify; name {known}")


def _at(path: Path, depth: int = DEPTH) -> Iterator[Finding]:
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if not path.is_dir():
        yield from _file(path)
    elif CONFIG in names:
        yield _model(path)
    elif "state.json" in names and (MANIFEST in names or WEIGHTS in names):
        yield _checkpoint(path)
    elif "recipe.yaml" in names or "checkpoints" in names:
        yield from _run(RunFolder(path))
    elif SETTINGS_FILE in names:
        yield from _prepared(path)
    elif SAMPLES_FILE in names:
        yield from _samples(path)
    elif depth:
        for name in sorted(names):
            if (path / name).is_dir() and not (path / name).is_symlink():
                yield from _at(path / name, depth - 1)
            elif name.endswith((".npy", ".safetensors")) and not name.startswith(ASIDE):
                yield from _file(path / name)


def _look(path: Path, look: Callable[[], object], mend: str) -> Finding:
    """What `look` finds: it raises what is wrong, and may return a note."""
    try:
        note = look()
        return Finding(path, note=note if isinstance(note, str) else "")
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, SyntaxError) as error:
        # Our errors say the cause and then what to do, in general; the line begins with the path already.
        cause = first_line(error).partition("; ")[0].removeprefix(f"{path} ").removeprefix("is damaged: ")
        return Finding(path, cause, mend)


def _run(run: RunFolder) -> Iterator[Finding]:
    note = "" if read_run_id(run.path) else "without an id, as of an earlier version: checkpoints of other runs pass"
    if owner := holder(run.path / LOCK):
        note = f"in use by {owner}, so what it is writing may look damaged"
    yield Finding(run.path, note=note)
    checkpoints = sorted(run.list_checkpoints(), key=checkpoint_step)
    faults = {folder: find_damage(folder) or find_stranger(folder) for folder in checkpoints}
    newest = max((folder for folder in checkpoints if not faults[folder]), key=checkpoint_step, default=None)
    copied = f"; {newest / 'ema/recipe.yaml'} is a copy" if newest else ""
    yield _look(run.recipe_file, partial(run.recipe, only_read=True), f"restore it{copied}")
    for folder, fault in faults.items():
        mend = "restore it from a copy; nothing here can make it again"
        if newest and checkpoint_step(newest) < checkpoint_step(folder):
            mend = f"`dic-repa train --resume {run.path}` goes on from {newest.name} and makes it anew"
        yield Finding(folder, fault or "", mend if fault else "")
    for snapshot in find_snapshots(run):
        mend = "restore it, or remove it: `dic-repa ema` then takes the others, which is less exact"
        yield _look(snapshot.path, partial(read_snapshot, run, snapshot), mend)
    if run.metrics_file.exists():
        yield _look(run.metrics_file, partial(_lines, run.metrics_file), "remove these lines; the others are read")
    for file in [run.environment_file, *sorted(run.path.glob("evaluation/*.json"))]:
        if file.exists():
            yield _look(file, partial(read_json, file, ""), "remove it; nothing but reports needs it")
    for file in sorted(run.samples.glob("*.png")):
        yield _look(file, partial(_picture, file), "remove it; it is a picture only")
    for folder in sorted(folder for name in ("evaluation", "averages") for folder in run.path.glob(f"{name}/*/")):
        yield from _at(folder, 0)
    yield from _leftovers(run.path)


def _lines(file: Path) -> None:
    """Look at the records of metrics.jsonl."""
    bad = []
    check_regular(file)
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            if not isinstance(parse_json(line)["step"], int):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            bad.append(number)
    if bad:
        many = f" and {len(bad) - 1} other lines are" if len(bad) > 1 else " is"
        raise UserError(f"line {bad[0]}{many} not a record of a step")


def _checkpoint(folder: Path) -> Finding:
    fault = find_damage(folder) or find_stranger(folder)
    return Finding(folder, fault or "", "take another checkpoint, or restore this one" if fault else "")


def _model(folder: Path) -> Finding:
    """A saved model, a converted checkpoint, or an average."""

    def look() -> str | None:
        check_whole(folder)
        read_tensors(folder / WEIGHTS)
        listed = any((place / MANIFEST).is_file() for place in (folder, folder.resolve().parent))
        return None if listed else f"it has no {MANIFEST}, so that it is readable is all that can be said"

    return _look(folder, look, "restore it, or convert the checkpoint again")


def _samples(folder: Path) -> Iterator[Finding]:
    wanted = 0

    def look() -> None:
        nonlocal wanted
        spec = read_json(folder / SAMPLES_FILE, "draw the samples anew")
        if len(spec["labels"]) != spec["sample"]["num"]:
            raise UserError(f"it has {len(spec['labels'])} labels for {spec['sample']['num']} samples")
        wanted = len(spec["labels"])

    yield _look(folder / SAMPLES_FILE, look, "draw the samples anew, with --overwrite")
    pictures = sorted(file for file in folder.glob("*.png") if file.stem.isdecimal())
    again = "remove it, and the same `dic-repa sample` makes it again"
    for file in progress_bar(pictures, desc=f"reading {folder}", unit="image", delay=1):
        if (found := _look(file, partial(_picture, file), again)).damage:
            yield found
    archive, missing = folder / SAMPLES_NPZ, wanted - len(pictures)
    if archive.exists():
        yield _look(archive, partial(_zip, archive), "remove it; `dic-repa sample --format npz` makes it again")
    lacks = missing > 0 and not archive.exists()
    yield Finding(folder, note=f"{missing} of {wanted} images are yet to be drawn" if lacks else "")
    yield from _leftovers(folder)


def _prepared(folder: Path) -> Iterator[Finding]:
    mend = "run the same `dic-repa prepare` again; if it refuses, prepare into another folder"
    anew = "remove it, and run the same `dic-repa prepare` again, which makes it anew"
    if (folder / INDEX).is_file():
        shards: list[ShardList] = []
        yield _look(folder / INDEX, lambda: shards.append(find_shards(str(folder))), mend)
        for name in shards[0].names if shards else ():
            yield _look(folder / name, partial(read_rows, folder / name, check=True), anew)
        yield from _leftovers(folder)
        return
    opened: list[Prepared] = []
    yield _look(folder / SETTINGS_FILE, lambda: opened.append(Prepared(folder)), mend)

    def look(name: str) -> str:
        unchecked = "without checksums, as of an earlier version: all that is known is that it can be read"
        return "" if opened[0].check_shard(name) else unchecked

    statistics = folder / STATISTICS_FILE
    if opened and statistics.exists():
        measure = "run the same `dic-repa prepare` again, which measures them anew"
        yield _look(statistics, lambda: opened[0].statistics, measure)
    for name in opened[0].files if opened else ():
        yield _look(folder / name, partial(look, name), anew)
    yield from _leftovers(folder)


def _file(file: Path) -> Iterator[Finding]:
    if file.suffix == ".npy":
        yield _look(file, lambda: _cache(FeatureCache(file)), "remove it; the next run makes it anew")
    elif file.suffix == ".safetensors":
        note = "without a checksum of its own"
        yield _look(file, lambda: None if SEAL in read_tensors(file)[1] else note, "remove it, or restore it")


def _cache(cache: FeatureCache) -> str | None:
    damaged = cache.damaged()
    if damaged:
        raise UserError(
            f"the tokens of {len(damaged)} of {len(cache.array)} images have changed, first of {damaged[0]}"
        )
    return "without checksums, as of an earlier version" if cache.sums is None else None


def _picture(file: Path) -> None:
    check_regular(file)
    with Image.open(file) as picture:
        picture.load()


def _zip(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        if name := archive.testzip():
            raise UserError(f"its {name} has another checksum")


def _leftovers(folder: Path) -> Iterator[Finding]:
    left = [file for file in [*folder.glob(f"{ASIDE}*"), *folder.glob(f"*/{ASIDE}*")] if not is_lock(file.name)]
    for file in left if not holder(folder / LOCK) and not find_claims(folder) else ():
        yield Finding(file, note="left by a command that was killed; the next one removes it")
    if not (folder / MARKER).is_file():
        yield Finding(folder / MARKER, note="is not there, so no command writes into this folder")
