"""Train small models by each method of docs/methods.md, and compare distance, time and memory with the plain baseline.

    python tests/scripts/compare_methods.py --jobs 2                          # train what is missing, then the table
    python tests/scripts/compare_methods.py baseline urepa --seeds 0          # some of it
    python tests/scripts/compare_methods.py --time                            # with nothing else running: their steps
    python tests/scripts/compare_methods.py --data emoji baseline urepa best  # the same on the emoji

Every method is a recipe, digits-NAME, trained without labels on the same budget. Runs are kept in --out: what is there
is not trained again, and what was killed goes on. `--time` times a step of each in turns and counts the bytes of its
tensors. The table and the chart are printed and written of all that is there, whatever was asked for.

For the emoji the keys of digits-NAME are put on emoji-baseline or emoji-urepa, whichever stands for its base.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

import dic_repa.recipes
from dic_repa.errors import UserError
from dic_repa.evaluation.metrics import title
from dic_repa.recipe import SampleSection, load_recipe, to_yaml
from dic_repa.recipe.files import list_recipes
from dic_repa.recipe.keys import differences
from dic_repa.runs.folder import RunFolder

METHODS = {  # the end of the recipe's name, and what the table calls it
    "baseline": "no alignment",
    "urepa": "U-REPA",
    "vshape": "U-REPA, v-shaped weight, time-aware head",
    "haste": "the same until HASTE's stop",
    "irepa": "iREPA: conv head, spatial norm",
    "masked-adapter": "masked adapter (PixelREPA)",
    "dispersive": "dispersive loss",
    "self-alignment": "self-alignment (SRA)",
    "layer-sync": "layer-sync",
    "contrastive": "contrastive flow matching",
    "internal": "internal guidance, w 1.4",
    "muon": "Muon",
    "decay": "learning-rate decay",
    "best": "all of `digits-best`, w 1.4",
}
# Other ways to sample the same runs, each a row of its own.
UNGUIDED = {"unguided": ["sample.guidance=null"]}
WAYS = UNGUIDED | {f"w {scale}": [f"sample.guidance.internal={scale}"] for scale in (2.2, 4)}
SAMPLED = {
    name: {METHODS[name].replace("w 1.4", way): changes for way, changes in WAYS.items()}
    for name in ("internal", "best")
}
COMMON = ["train.sample_every=0"]
DATA = {
    "digits": ("fd-digits", [*COMMON, "train.label_dropout=1", "train.checkpoint_every=500"]),
    "emoji": (
        "fd-lite2",
        [*COMMON, "data.options.unlabelled=true", "train.checkpoint_every=250", "schedule.warmup_steps=100",
         "train.ema_decay=0.998", "train.precision=bf16", "sample.steps=6", "sample.num=400"],
    ),
}  # fmt: skip


def recipe_of(data: str, name: str, folder: Path) -> str | None:
    """The recipe of a method: a name of the package, or for the emoji a file in `folder`; None if there is none."""
    known = list_recipes()
    if f"{data}-{name}" in known:
        return f"{data}-{name}"
    if f"digits-{name}" not in known:
        return None
    text = (Path(dic_repa.recipes.__file__).parent / f"digits-{name}.yaml").read_text()
    raw = yaml.safe_load(text.replace("digits-vit", "efficientnet-lite0"))
    raw["base"] = recipe_of(data, raw["base"].removeprefix("digits-"), folder)
    made = folder / f"{data}-{name}.yaml"
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(made)


class Study:
    """The runs of one folder: OUT/DATA/NAME-SEED."""

    def __init__(self, arguments: argparse.Namespace):
        self.data, self.folder, self.steps = arguments.data, arguments.out / arguments.data, arguments.steps
        self.score, overrides = DATA[self.data]
        self.overrides = [*overrides, f"train.steps={self.steps}", *arguments.overrides]
        self.recipes = {name: recipe_of(self.data, name, self.folder) for name in METHODS}
        self.times = self.folder / "times.json"

    def run(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-{seed}"

    def settings(self, seed: int) -> list[str]:
        return [*self.overrides, f"train.seed={seed}"]

    def record(self, name: str, seed: int, changes: Sequence[str] = ()) -> dict | None:
        """The finished run's scores, sampled as its recipe says but for the `changes`; None if there are none."""
        wanted = load_recipe(self.recipes[name], [*self.settings(seed), *changes]).sample
        files = self.run(name, seed).glob(f"evaluation/step_{self.steps:08d}-*.json")
        found = [json.loads(file.read_text()) for file in files]
        return next((each for each in found if SampleSection.model_validate(each["sample"]) == wanted), None)

    def train(self, name: str, seed: int, threads: int) -> None:
        """Train and score, or go on with it, and score in the other ways; an error says where the log is."""
        run, begin, commands = self.run(name, seed), time.monotonic(), []
        if not RunFolder(run).is_finished(self.steps):
            commands.append(["train", self.recipes[name], "--out", str(run), *self.options(seed)])
            commands[0] += ["--resume"] if (run / "recipe.yaml").is_file() else []
        for number, changes in enumerate([[], *SAMPLED.get(name, {}).values()]):
            if not self.record(name, seed, changes) and (number or not commands):
                recipe = self.folder / f"{name}-{seed}-sampled-{number}.yaml"
                recipe.write_text(to_yaml(load_recipe(self.recipes[name], [*self.settings(seed), *changes])))
                commands.append(["evaluate", str(run), "--recipe", str(recipe)])
        with (self.folder / f"{name}-{seed}.log").open("a") as log:
            for command in commands:
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                called = [sys.executable, "-m", "dic_repa", *command]
                if code := subprocess.run(called, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode:
                    print(f"{name}-{seed} ended with code {code}; see {log.name}", flush=True)
                    return
        if commands:
            score = (self.record(name, seed) or {}).get("scores", {}).get(self.score)
            print(f"{name}-{seed}: {self.score} {score}, {time.monotonic() - begin:.0f} s", flush=True)

    def options(self, seed: int) -> list[str]:
        return [f"--set={setting}" for setting in self.settings(seed)]

    def stale(self, name: str, seed: int) -> list[str]:
        """In which keys a run differs from what its recipe says today."""
        if not (self.run(name, seed) / "recipe.yaml").is_file():
            return []
        today = load_recipe(self.recipes[name], self.settings(seed))
        return [*differences(RunFolder.open(self.run(name, seed)).recipe(), today)]

    def measure(self, names: list[str], rounds: int) -> dict[str, dict[str, float]]:
        """Seconds of a step, timed in turns, and the most bytes that its tensors take at once."""
        os.environ["ACCELERATE_USE_CPU"] = "true"
        import torch

        from dic_repa.bench.timing import interleave

        torch.set_num_threads(1)
        memory = {name: self.peak(name) for name in names}
        timings = interleave([self.step(name) for name in names], rounds, 0.01)
        return {
            name: {"seconds": timing.median, "of": timing.raw_times, "bytes": memory[name]}
            for name, timing in zip(names, timings)
        }

    def step(self, name: str):
        """A call that trains one more step of the recipe, on one batch in memory."""
        import torch
        from torch.utils.data import default_collate

        from dic_repa.alignment.cache import WithTokens
        from dic_repa.bench.train import TrainCase, build_step

        recipe = load_recipe(self.recipes[name], self.settings(0))
        recipe.evaluate = None
        parts, accelerator = build_step(recipe, torch.device("cpu"))
        case = TrainCase(name, recipe, parts, accelerator)
        if parts.caches:
            with_tokens = WithTokens(parts.data, parts.caches)
            case.data |= default_collate([with_tokens[i] for i in range(case.batch)])
        return case

    def peak(self, name: str) -> int:
        """The most bytes that the tensors of model, averages, optimizer and three steps take at once."""
        from torch.profiler import ProfilerActivity, profile

        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step = self.step(name)
            for _ in range(3):
                step()
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(str(Path(folder) / "trace.json"))
            events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
        changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
        most = now = 0
        for _, change in changes:
            now += change
            most = max(most, now)
        return most

    def table(self) -> list[dict]:
        """A row for each method of which there is a finished run."""
        times = json.loads(self.times.read_text()) if self.times.is_file() else {}
        rows: list[dict] = []
        ways = [(name, words, changes) for name in METHODS if self.recipes[name]
                for words, changes in {METHODS[name]: [], **SAMPLED.get(name, {})}.items()]  # fmt: skip
        plain: dict[int, float] = {}
        for name, words, changes in ways:
            seeds = sorted(int(run.name.rpartition("-")[2]) for run in self.folder.glob(f"{name}-[0-9]*/"))
            found = {seed: record for seed in seeds if (record := self.record(name, seed, changes))}
            if not found:
                continue
            scores = {seed: record["scores"][self.score] for seed, record in found.items()}
            plain = scores if name == "baseline" else plain
            row = {"name": name, "title": words, "scores": list(scores.values())}
            row["differences"] = [scores[seed] - plain[seed] for seed in scores if seed in plain]
            row["evaluations"] = next(iter(found.values()))["evaluations"]
            for key, ratio in (("seconds", "time"), ("bytes", "memory")):
                if name in times and "baseline" in times:
                    row[ratio] = times[name][key] / times["baseline"][key]
            rows.append(row)
        return rows


def mean_and_spread(numbers: Sequence[float], decimals: int, sign: str = "") -> str:
    """Mean and standard deviation, such as 4.59 ± 0.80; the first with its sign if `sign` is +."""
    if not numbers:
        return ""
    spread = f" ± {statistics.stdev(numbers):.{decimals}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):{sign}.{decimals}f}".replace("-", "−") + spread


def markdown(rows: list[dict], score: str) -> str:
    """The rows as a table in Markdown."""
    lines = [
        f"| | {title(score)} | difference in the same seed | seeds | seconds a step | memory |",
        "|---|---|---|---|---|---|",
    ]
    decimals = 2 if max(score for row in rows for score in row["scores"]) < 100 else 0
    for row in rows:
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("time", "memory")]
        difference = "" if row["name"] == "baseline" else mean_and_spread(row["differences"], decimals, "+")
        cells = [row["title"], mean_and_spread(row["scores"], decimals), difference, str(len(row["scores"])), *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    evaluations = sorted({row["evaluations"] for row in rows})
    return "\n".join([*lines, "", f"Evaluations a sample: {', '.join(map(str, evaluations))}"])


def chart(rows: list[dict], score: str, path: Path) -> None:
    """Bars of the mean, each seed as a point."""
    from dic_repa.files.pictures import new_figure, save_figure

    figure, axes = new_figure(1, 1, (8, 0.8 + 0.36 * len(rows)))
    ax = axes[0, 0]
    ax.barh(
        [row["title"].replace("`", "") for row in rows],
        [statistics.mean(row["scores"]) for row in rows],
        color="#9db8d2",
    )
    for place, row in enumerate(rows):
        ax.plot(row["scores"], [place] * len(row["scores"]), "o", color="#28486b", markersize=4)
    if rows and rows[0]["name"] == "baseline":
        ax.axvline(statistics.mean(rows[0]["scores"]), color="#28486b", linewidth=0.8, linestyle=":")
    ax.margins(y=0.01)
    ax.invert_yaxis()
    ax.set_xlabel(f"{title(score)} without labels (lower is better): mean, and each seed")
    save_figure(figure, path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; by default all")
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--time", action="store_true", help="time steps and count memory instead of training")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="for all")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    arguments = parser.parse_args()
    if unknown := set(arguments.methods) - set(METHODS):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(METHODS)}")

    study = Study(arguments)
    study.folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in arguments.methods or METHODS if study.recipes[name]]
    if missing := [name for name in arguments.methods or METHODS if name not in names]:
        print(f"left out, there is no recipe yet: {', '.join(missing)}")
    if arguments.time:
        names = ["baseline", *(name for name in names if name != "baseline")]
        study.times.write_text(json.dumps(study.measure(names, arguments.rounds), indent=2) + "\n")
    else:
        jobs = [(name, seed) for seed in arguments.seeds for name in names]
        for name, seed in jobs:
            if keys := study.stale(name, seed):
                print(f"note: {study.run(name, seed)} differs from its recipe of today in {', '.join(keys)}; remove it")
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda job: study.train(*job, arguments.threads), jobs))
    if rows := study.table():
        print(markdown(rows, study.score))
        chart(rows, study.score, study.folder / "methods.png")
        print(f"chart: {study.folder / 'methods.png'}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
