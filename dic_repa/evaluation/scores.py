"""Scores in one line of Python: `dic_repa.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.evaluation.image_sets import open_images
from dic_repa.evaluation.measuring import Measure, Measured
from dic_repa.evaluation.metrics import title
from dic_repa.evaluation.runs import is_checkpoint
from dic_repa.runtime.progress import progress_bar
from dic_repa.runtime.table import format_rows, html_table, number


class Scores(dict[str, float]):
    """The scores of some images by metric; `measured` says of how many, with intervals and warnings."""

    def __init__(self, measured: Measured):
        super().__init__(measured.values)
        self.measured = measured

    def _rows(self) -> list[tuple[str, str, str]]:
        intervals = self.measured.intervals
        found = []
        for name, value in self.items():
            between = " to ".join(map(number, intervals.get(name, ())))
            found.append((title(name), "no labels" if value is None else number(value), between))
        return [("metric", f"{self.measured.count} images", "95 % interval" if intervals else ""), *found]

    def __repr__(self) -> str:
        return "\n".join([format_rows(self._rows(), left=(0,)), *(f"note: {note}" for note in self.measured.warnings)])

    def _repr_html_(self) -> str:
        notes = [(f"note: {note}",) for note in self.measured.warnings]
        return html_table(self._rows()) + (html_table([("",), *notes]) if notes else "")


def evaluate(
    images: str | Path | Tensor | Sequence[Image.Image],
    reference: Any = None,
    metrics: Sequence[str] = ("fid",),
    device: str | torch.device | None = None,
    bootstrap: int = 0,
    **options: Any,
) -> Scores:
    """Measure `images` as `dic-repa evaluate` does.

        scores = dic_repa.evaluate(images, reference="emoji:held-out", metrics=["fd-lite2", "prec-lite2"])
        scores["fd-lite2"]

    Args:
        images: PIL images, a tensor (N, 1 or 3, H, W), uint8 or float in [0, 1], or a folder, zip, tar or `.npz`.
        reference: real images that the metrics compare with: the same, or the name of a data set, 'digits:train'.
        metrics: names from `dic-repa evaluate --list-metrics`.
        device: where the networks run; by default the GPU, if there is one.
        bootstrap: so many resamplings give each score a 95 % confidence interval.
        options: those of `dic_repa.evaluation.Measure`, such as `resize`, `batch_size` and `extractor_options`.

    Returns:
        The scores by metric, which print as a table.

    Raises:
        UserError: there are no images, they are of several sizes or of another than the reference, or a metric lacks
            its reference or weights.
    """
    if isinstance(images, str | Path) and Path(images).is_dir() and is_checkpoint(Path(images)):
        raise UserError(f"{images} is a run or a model, not images: give load({str(images)!r}).sample(num=...)")
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    found = open_images(images, options.get("resize"))
    with progress_bar(desc="measuring", total=len(found), unit="image", delay=2, leave=False) as bar:
        measure = Measure(names, reference, device or ("cuda" if torch.cuda.is_available() else "cpu"), **options)
        return Scores(measure(found, bootstrap, bar.update))
