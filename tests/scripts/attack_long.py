"""Attack the command line, and count what came of it: `python tests/scripts/attack_long.py --long`.

Takes hours. A case that fails is written to a file, which `--replay FILE` runs once more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

SETTINGS = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
os.environ |= SETTINGS  # before anything is imported
sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).parents[1]))

from attack.classes import CLASSES, judged, make
from attack.good import make_good
from attack.judge import MEANING, OUTCOMES, Case, Verdict, import_all, nothing_else_changes

# Cases of each class without --long: in all, some 40 seconds.
SHORT = {
    "recipes": 40,
    "commands": 10,
    "checkpoints": 8,
    "configs": 8,
    "records": 8,
    "archives": 10,
    "strangers": 8,
    "kills": 2,
    "resources": 4,
}


def main() -> int:
    """Attack, print what came of it as a table, and return 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--long", action="store_true", help="all cases of a class, not some")
    parser.add_argument("--class", dest="classes", action="append", choices=list(CLASSES), help="repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at once")
    parser.add_argument("--failures", type=Path, default=Path("attack-failures"), help="folder for cases that failed")
    parser.add_argument("--replay", type=Path, nargs="+", help="files of that folder; print all that they said")
    given = parser.parse_args()
    import_all()
    with tempfile.TemporaryDirectory(prefix="attack-") as held:
        folder = Path(held)
        good = make_good(folder / "good")
        if given.replay:
            return max(replay(file, folder / file.stem, good) for file in given.replay)
        given.failures.mkdir(parents=True, exist_ok=True)
        table: dict[str, Counter] = {}
        project = Path(__file__).parents[2]
        package = Path(sys.modules["dic_repa"].__file__ or "").parent
        with nothing_else_changes(Path.home(), package, project / "tests"):
            for name in given.classes or CLASSES:
                begin, count = time.monotonic(), CLASSES[name].COUNT
                indices = range(count) if given.long else range(0, count, -(-count // SHORT[name]))
                table[name] = attack(name, indices, given.seed, folder, good, given.failures, given.jobs)
                print(f"{name}: {dict(table[name])}, {time.monotonic() - begin:.0f} s", flush=True)
    print_table(table)
    return int(any(table[name][outcome] for name in table for outcome in OUTCOMES[2:]))


def attack(name: str, indices: range, seed: int, folder: Path, good: Path, failures: Path, jobs: int) -> Counter:
    """Run the cases of one class in `jobs` processes; those that fail are written to `failures`."""
    workers = []
    for job in range(jobs):
        if worker := os.fork():
            workers.append(worker)
            continue
        try:
            with (folder / f"{name}-{job}.jsonl").open("w") as file:
                for index in indices[job::jobs]:
                    verdict = judged_twice(name, make(name, index, seed), folder / f"{name}-{index}", good)
                    file.write(json.dumps(verdict.outcome) + "\n")
                    if not verdict.good:
                        record = {"class": name, "index": index, "seed": seed, **vars(verdict)}
                        record["lines"] = make(name, index, seed).lines
                        (failures / f"{name}-{index}.json").write_text(json.dumps(record, indent=1) + "\n")
                        print(f"{name} {index}: {verdict.outcome}: {verdict.why[:200]!r}", flush=True)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    codes = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
    assert not any(codes), f"a worker of the attack itself failed: {codes}"
    files = (folder / f"{name}-{job}.jsonl" for job in range(jobs))
    return Counter(json.loads(line) for file in files for line in file.read_text().splitlines())


def judged_twice(name: str, case: Case, folder: Path, good: Path) -> Verdict:
    """The verdict on a case. It is tried once more where another program may have been in the way, and where a fork of
    torch's threads has failed, which no command of a user is.
    """
    verdict = judged(name, case, folder, good)
    shutil.rmtree(folder)
    starved = verdict.outcome == "hang" and 1 < verdict.busy < 0.8 * verdict.seconds
    if starved or "Invalid thread pool" in verdict.said:
        verdict = judged(name, case, folder, good)
        shutil.rmtree(folder)
    return verdict


def replay(file: Path, folder: Path, good: Path) -> int:
    """Run a case once more, and print what it said."""
    record = json.loads(file.read_text())
    case = make(record["class"], record["index"], record["seed"])
    verdict = judged(record["class"], case, folder, good)
    for line in case.lines:
        print("dic-repa", *map(ascii, line))
    print(verdict.said)
    print(f"{verdict.outcome}: {verdict.why} (exit {verdict.code}, {verdict.seconds:.1f} s)")
    return int(not verdict.good)


def print_table(table: dict[str, Counter]) -> None:
    """Counts of outcomes by class."""
    seen = [outcome for outcome in OUTCOMES if any(counts[outcome] for counts in table.values())]
    width = max(map(len, table))
    print("  ".join([" " * width, *(f"{word:>9}" for word in ["cases", *seen])]))
    for name, counts in table.items():
        print("  ".join([f"{name:{width}}", *(f"{n:9,}" for n in [counts.total(), *(counts[o] for o in seen)])]))
    for outcome in seen:
        print(f"{outcome}: {MEANING[outcome]}")


if __name__ == "__main__":
    sys.exit(main())
