"""The search for guidance: scale and interval are tried with few samples, the best are confirmed with many.

They are those of the guidance towards the class or away from a weaker model; or, in a search of its own, those of
internal guidance, while the other stays as it is.

All cells have the same noise and labels, so that they differ by their guidance alone. Each is recorded as soon as it is
done, and a second call continues an interrupted search.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dic_repa.errors import UserError, unknown_name
from dic_repa.evaluation.judge import judge_of_score
from dic_repa.evaluation.metrics import title
from dic_repa.files.atomic import write_whole
from dic_repa.files.lock import locked
from dic_repa.files.outputs import begin_folder, check_folder
from dic_repa.files.pictures import new_figure, save_figure
from dic_repa.files.reading import read_json
from dic_repa.files.weights import weights_fingerprint
from dic_repa.models.pretrained import WEIGHTS
from dic_repa.recipe import GuidanceSection, SampleSection
from dic_repa.sampling.folder import completed
from dic_repa.sampling.labels import draw_labels
from dic_repa.sampling.load import Checkpoint
from dic_repa.sampling.weights import home_of, weak_weights

THEN = "move it away to search anew, or give another folder with --out"
SCALES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5)
INTERVALS = ((0.0, 0.5), (0.0, 0.7), (0.0, 0.85), (0.0, 1.0), (0.2, 0.8))
SEARCHES = {"guidance": ("scale", "interval"), "internal": ("internal", "internal_interval")}
"""What can be searched, and its keys of `sample.guidance`."""


@dataclass
class Cell:
    """One guidance and what its samples scored. A scale of 1 is no guidance, whatever the interval."""

    scale: float
    interval: tuple[float, float]
    num: int
    value: float
    search: str = "guidance"  # of `SEARCHES`

    @property
    def options(self) -> str:
        """The options of `dic-repa sample` for it."""
        scale, interval = (f"--{key.replace('_', '-')}" for key in SEARCHES[self.search])
        low, high = self.interval
        return f"{scale} 1" if self.scale == 1 else f"{scale} {self.scale:g} {interval} {low:g} {high:g}"


class Tuner:
    """The search on one checkpoint; `run()` does it. The record is `file`, the heat map `picture`.

    Args:
        loaded: what `dic_repa.load` gives for a run or a checkpoint.
        score: what counts: a score of the recipe's judge (digits: fd-digits, recognised), or a metric such as fid.
        reference: the real images that a metric compares with; by default the recipe's.
        sample: the sampler, by default the recipe's; what is searched of its guidance is replaced.
        search: 'guidance', towards the class or, where `sample.guidance.weak` names one, away from a weaker model; or
            'internal'; by default 'internal' where the model has nothing else to be guided by.
        num: samples of each cell.
        confirm, confirm_num: how many of the best cells are sampled anew, with how many samples.
        out: folder of tune.json and tune.png; by default RUN/tune.
    """

    def __init__(
        self,
        loaded: Checkpoint,
        score: str | None = None,
        reference=None,
        sample: SampleSection | None = None,
        search: str | None = None,
        scales: Sequence[float] = SCALES,
        intervals: Sequence[tuple[float, float]] = INTERVALS,
        num: int | None = None,
        confirm: int = 3,
        confirm_num: int | None = None,
        out: str | Path | None = None,
    ):
        self.loaded, recipe = loaded, loaded.recipe
        device = next(loaded.denoiser.parameters()).device
        self.sample = sample or recipe.sample
        guidance = self.sample.guidance
        self.search = self._choose(search)
        if self.search == "guidance" and guidance and guidance.kind == "cfg++" and 1 in scales:
            raise UserError("CFG++ guides at a scale of 1 too; give scales below 1, such as --scales 0.2,0.4,0.6,0.8")
        self.confirm, self.confirm_num = confirm, confirm_num or self.sample.num
        self.num = num or min(5000, max(200, self.sample.num // 10), self.confirm_num)
        self.scales, self.intervals = sorted(set(scales)), list(dict.fromkeys(intervals))
        for scale, interval in itertools.product(self.scales, self.intervals):
            self._settings(scale, interval, self.num)  # shows a mistake before the first cell
        judge = recipe.evaluate.metric if recipe.evaluate else None
        if not (score or judge):
            raise UserError(
                f"the recipe of {loaded.source} names no judge; say which metric counts, such as --metric fid"
            )
        self.judge = judge_of_score(recipe, score, reference, device)
        self.score = self.judge.check(score or self.judge.main or "")
        self.better = self.judge.better[self.score]
        self.folder = Path(out) if out else home_of(loaded.source) / "tune"
        check_folder(self.folder, "tune")
        self.file, self.picture = self.folder / "tune.json", self.folder / "tune.png"
        self.spec = {
            "checkpoint": str(loaded.source),
            "weights": weights_fingerprint(loaded.source / WEIGHTS),
            "score": self.score,
            "reference": reference and str(reference),  # None: what the recipe says
            "search": self.search,
            **weak_weights(self.sample, loaded.source),
        }
        self.real: dict[str, Any] = {}  # the scores of real images, beside those of the last cell
        self.done: list[dict] = []
        self.found: list[Cell] = []
        self.best: list[Cell] = []

    def _choose(self, search: str | None) -> str:
        """What is searched; a UserError if the model has nothing to be guided by in that way."""
        recipe, guidance = self.loaded.recipe, self.sample.guidance
        if search is not None and search not in SEARCHES:
            raise unknown_name("search", search, SEARCHES)
        guided = self.loaded.learnt_null or bool(guidance and guidance.weak)
        internal = getattr(self.loaded.denoiser, "middle_head", None) is not None
        if search == "internal" and not internal:
            raise UserError(f"{self.loaded.source} has no middle head, so it has no internal guidance to search")
        if search == "internal" or (search is None and internal and not guided):
            return "internal"
        if not guided:
            dropout, labelled = recipe.train.label_dropout, self.loaded.condition.kind != "none"
            why = "without labels" if dropout == 1 or not labelled else "without label dropout"
            why = "with guidance that it has learnt itself" if labelled and 0 < dropout < 1 else why
            other = "--search internal, or --weak" if internal else "--weak"
            raise UserError(
                f"{self.loaded.source} was trained {why}, so it has no guidance to search; choose another with {other}"
            )
        return "guidance"

    def cells(self) -> list[tuple[float, tuple[float, float]]]:
        """What the grid asks for; one cell for all intervals if the scale is 1."""
        plain = [(scale, self.intervals[0]) for scale in self.scales if scale == 1]
        return plain + [(scale, interval) for scale in self.scales if scale != 1 for interval in self.intervals]

    def run(self, progress: Callable[[Cell | None, int], None] = lambda cell, count: None) -> list[Cell]:
        """Search, confirm, draw; the best cells, the very best first: those confirmed with many samples, if any are.

        `progress(None, count)` is called with images done, `progress(cell, count)` when a cell is done, with the number
        of its images that an earlier call had sampled. A UserError where another process searches into this folder.
        """
        with locked(self.folder):
            self.done = self._read()
            return self._search(progress)

    def _search(self, progress: Callable[[Cell | None, int], None]) -> list[Cell]:
        self.found = [self._cell(scale, interval, self.num, progress) for scale, interval in self.cells()]
        best = self.ranked(self.found)
        self._finish(best[: max(1, self.confirm)], [])  # to look at while the best are confirmed, which may take long
        confirmed = [self._cell(c.scale, c.interval, self.confirm_num, progress) for c in best[: self.confirm]]
        if confirmed:
            self._finish(self.ranked(confirmed), self.ranked(confirmed))
        return self.best

    def _finish(self, best: list[Cell], confirmed: list[Cell]) -> None:
        self.best = best
        self._write()
        save_heat_map(self.picture, self.score, self.better, self.intervals, self.found, confirmed)

    def ranked(self, cells: list[Cell]) -> list[Cell]:
        """The cells, the best first."""
        sign = -1 if self.better == "higher" else 1
        return sorted(cells, key=lambda cell: (cell.value != cell.value, sign * cell.value))  # NaN last

    def _cell(self, scale: float, interval: tuple[float, float], num: int, progress) -> Cell:
        settings = self._settings(scale, interval, num)
        wanted = self.spec | {"sample": settings.model_dump(mode="json")}
        known = next((entry for entry in self.done if wanted.items() <= entry.items()), None)
        kept = num if known else 0
        if known is None:
            labels = draw_labels(self.loaded.recipe, self.loaded.condition, settings)
            known = wanted | {"scores": self.judge(self._sampled(settings, labels, progress), labels)}
            self.done.append(known)
            self._write()
        self.real = known["scores"].get("reference", {})
        cell = Cell(scale, interval, num, float(known["scores"][self.score]), self.search)
        progress(cell, kept)
        return cell

    def _sampled(self, settings: SampleSection, labels: Tensor, progress) -> Iterator[Tensor]:
        for batch in self.loaded.sampler(settings)(labels):
            yield batch
            progress(None, len(batch))

    def _settings(self, scale: float, interval: tuple[float, float], num: int) -> SampleSection:
        before = self.sample.guidance.model_dump() if self.sample.guidance else {"scale": 1.0}
        key, when = SEARCHES[self.search]
        changed = before | ({key: scale} if scale == 1 else {key: scale, when: tuple(interval)})
        try:
            chosen = GuidanceSection.model_validate(changed)
            guidance = None if chosen.scale == chosen.internal == 1 else chosen
        except ValueError:
            low, high = interval
            raise UserError(f"no guidance has the scale {scale:g} and the interval {low:g}:{high:g}") from None
        return self.sample.model_copy(update={"guidance": guidance, "num": num})

    def _read(self) -> list[dict]:
        if not self.file.exists():
            return []
        cells = read_json(self.file, THEN, dict).get("cells")
        if not isinstance(cells, list) or not all(map(_is_cell, cells)):
            raise UserError(f"{self.file} is damaged (a cell of the search is not whole); {THEN}")
        return [{"search": "guidance", **completed(cell)} for cell in cells]  # earlier versions searched nothing else

    def _write(self) -> None:
        if check_folder(self.folder, "tune") is None:
            begin_folder(self.folder, "tune")
        best = [vars(cell) | {"options": cell.options} for cell in self.best]
        record = self.spec | {"better": self.better, "best": best, "cells": self.done}
        write_whole(self.file, json.dumps(record, indent=1) + "\n")


def _is_cell(cell: Any) -> bool:
    scores = cell.get("scores") if isinstance(cell, dict) else None
    return isinstance(scores, dict) and type(scores.get(str(cell.get("score")))) in (int, float)


def save_heat_map(
    path: Path, score: str, better: str, intervals: Sequence[tuple], cells: Sequence[Cell], confirmed: Sequence[Cell]
) -> None:
    """The score over scale and interval; the confirmed cells have a frame, the first of them a thick one."""
    from matplotlib.patches import Rectangle

    scales = sorted({cell.scale for cell in cells})
    table = np.full((len(intervals), len(scales)), np.nan)
    for cell in cells:
        table[_rows(cell, intervals), scales.index(cell.scale)] = cell.value
    heading = f"{title(score)} ({better} is better), {cells[0].num} samples a cell"
    if confirmed:
        heading += f"\nframed: the best, confirmed with {confirmed[0].num} samples"
    for_title = 0.085 * max(map(len, heading.splitlines()))  # inches, which a small grid would not have
    size = max(2.2 + 0.85 * len(scales), for_title), 1.8 + 0.5 * len(intervals)
    figure, ((axis,),) = new_figure(1, 1, size)
    figure.suptitle(heading, fontsize=10)
    shown = axis.imshow(table, aspect="auto", cmap="viridis" if better == "higher" else "viridis_r")
    colors = shown.to_rgba(table)
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            red, green, blue, _ = colors[i, j]
            color = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            axis.text(j, i, f"{value:#.3g}".rstrip("."), ha="center", va="center", fontsize=9, color=color)
    for k, cell in enumerate(confirmed):
        for i in _rows(cell, intervals):
            corner = (scales.index(cell.scale) - 0.47, i - 0.47)
            axis.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="#d9480f", linewidth=1 if k else 3))
    axis.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    axis.set_yticks(range(len(intervals)), [f"{low:g} to {high:g}" for low, high in intervals])
    name = "guidance scale" if cells[0].search == "guidance" else "scale of internal guidance"
    axis.set(xlabel=name, ylabel="interval of t")
    figure.colorbar(shown, ax=axis)
    save_figure(figure, path, dpi=130)


def _rows(cell: Cell, intervals: Sequence[tuple]) -> list[int]:
    """The rows of the intervals that a cell stands for: of all, for a scale of 1."""
    return [i for i, interval in enumerate(intervals) if cell.scale == 1 or interval == cell.interval]
