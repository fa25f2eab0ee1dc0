"""Timing several things against each other, on the clock of `torch.utils.benchmark`; their rows as table and chart."""

import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.benchmark import Measurement, timer
from torch.utils.benchmark.utils.common import TaskSpec

from dic_repa.bench.device import describe_device
from dic_repa.errors import UserError, unknown_name
from dic_repa.files.pictures import new_figure, save_figure
from dic_repa.runtime.progress import progress_bar
from dic_repa.runtime.table import format_rows
from dic_repa.sampling.sampler import DTYPES

TORCH_DEFAULT = "torch-default"  # float32 as torch has it by itself: TF32 in convolutions, not in matrix products
COLUMNS = {  # key of a row: heading and format
    "label": ("what", "{}"),
    "batch": ("batch", "{}"),
    "images_per_second": ("images/s", "{:.4g}"),
    "spread": ("quartiles", "{0[0]:.4g}-{0[1]:.4g}"),
    "ratio": ("to first", "{:.2f}"),
    "milliseconds": ("ms", "{:.4g}"),
    "gmacs": ("GMACs", "{:.2f}"),
    "tflops": ("TFLOP/s", "{:.3g}"),
    "matrix_share": ("of matrix peak", "{:.0%}"),
    "convolution_share": ("of conv peak", "{:.0%}"),
    "memory_mb": ("MB", "{:.0f}"),
    "difference": ("differs by", "{:.1e}"),
    "time_in_convolutions": ("in convs", "{:.0%}"),
    "evaluations": ("NFE", "{}"),
    "decode_share": ("decoding", "{:.0%}"),
    "first_call": ("first call, s", "{:.1f}"),
    "failed": ("not measured", "{}"),
}


@dataclass
class Settings:
    """What is compared (each precision, compile mode, way of kernels and batch size), and how it is measured.

    `baselines` are factories, `package.module:name` or `file.py:name`: what they return for each denoiser is measured
    beside it, eager. `NAME=FACTORY` is for the denoiser or recipe of that name only.
    """

    device: torch.device
    precisions: Sequence[str] = ("fp32",)
    compiles: Sequence[str] = ("off",)
    batches: Sequence[int] = (1, 8)
    baselines: Sequence[str] = ()
    rounds: int = 7
    seconds: float = 0.2  # of one measurement, about
    kernels: Sequence[Literal["auto", "off"]] = ("auto",)  # Triton's, as `model.kernels`

    def __post_init__(self):
        for name in self.precisions:
            if name not in (*DTYPES, TORCH_DEFAULT):
                raise unknown_name("precision", name, DTYPES)
            if name in ("tf32", TORCH_DEFAULT) and self.device.type != "cuda":
                raise UserError(f"{name} is a precision of NVIDIA GPUs; on this device take fp32, bf16 or fp16")

    def baselines_of(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The factories for each of the `names`; a UserError for a baseline of another name."""
        found: dict[str, list[str]] = {name: [] for name in names}
        for baseline in self.baselines:
            only, equals, factory = baseline.rpartition("=")
            if equals and only not in names:
                raise unknown_name(f"name in --baseline {baseline}:", only, names)
            for name in [only] if equals else found:
                found[name].append(factory)
        return found


class Case(Protocol):
    """What is timed: a call on `batch` images, of `operations` (in 1e9) each."""

    label: str
    batch: int

    @property
    def operations(self) -> float: ...

    def __call__(self) -> object: ...

    def facts(self, device: torch.device) -> dict[str, Any]: ...  # what else its row holds, found after the timing


def case_label(name: str, precision: str, mode: str, detail: str = "") -> str:
    how = {"off": "eager", "blocks": "compiled by block", "default": "compiled"}.get(mode, mode)
    return " ".join(part for part in (name, precision, detail, how) if part)


def kernels_label(kernels: str) -> str:
    """What a label says of `model.kernels`."""
    return "without kernels" if kernels == "off" else ""


def measure(cases: Sequence[Case], settings: Settings, description: str, warmup: int = 2) -> dict[str, Any]:
    """Time the cases in turns.

    Returns:
        The `environment` before, the one `after`, and a row for each case: images per second with quartiles,
        milliseconds of a call, TFLOP/s, the `ratio` to the first row of the same batch size, and its own facts.
    """
    before = describe_device(settings.device)
    timings = interleave(cases, settings.rounds, settings.seconds, warmup, description)
    rows = []
    for case, timing in zip(cases, timings):
        row = {"label": case.label, "batch": case.batch, **speed(timing, case.batch)}
        row["tflops"] = case.operations * row["images_per_second"] / 1000
        rows.append(row | case.facts(settings.device))
    add_ratios(rows)
    return {"environment": before, "after": describe_device(settings.device), "rows": rows}


def interleave(
    calls: Sequence[Callable[[], object]],
    rounds: int = 7,
    seconds: float = 0.2,
    warmup: int = 2,
    description: str = "timing",
) -> list[Measurement]:
    """Time the `calls` in turns, so that a falling clock rate slows all of them equally, unlike one `Timer` for each.

    Each is called `warmup` times first, which compiles what is compiled, and measured `rounds` times; each round begins
    with another of the calls. A measurement is the mean over as many calls as fill its `seconds`.
    """
    timers = [timeit.Timer(call, timer=timer) for call in calls]  # torch's timer waits for the GPU
    found = []
    with progress_bar(total=len(calls) * (rounds + 1), desc=description, leave=False) as bar:
        for clock in timers:
            for _ in range(max(1, warmup)):
                once = clock.timeit(1)
            found.append(Measurement(max(1, round(seconds / max(once, 1e-9))), [], TaskSpec("call()", "")))
            bar.update()
        for first in range(rounds):
            for k in range(len(calls)):
                k = (k + first) % len(calls)
                found[k].raw_times.append(timers[k].timeit(found[k].number_per_run))
                bar.update()
    return found


def speed(timing: Measurement, images: int) -> dict[str, Any]:
    """Images per second, with quartiles, and milliseconds of one call on `images` images."""
    low, high = map(float, np.quantile(timing.times, (0.25, 0.75)))
    return {
        "images_per_second": images / timing.median,
        "spread": [images / high, images / low],
        "milliseconds": 1000 * timing.median,
    }


def add_ratios(rows: Sequence[dict]) -> None:
    """Add to each row the ratio of its images per second to those of the first row of the same batch size."""
    first: dict[int, float] = {}
    for row in rows:
        row["ratio"] = row["images_per_second"] / first.setdefault(row["batch"], row["images_per_second"])


def table(rows: Sequence[dict], columns: Mapping[str, tuple[str, str]] = COLUMNS) -> str:
    """The rows under headings, with the columns that at least one of them has."""
    keys = [key for key in columns if any(key in row for row in rows)]
    cells = [[columns[key][1].format(row[key]) if key in row else "" for key in keys] for row in rows]
    left = [i for i, key in enumerate(keys) if key in ("label", "kind", "failed")]
    return format_rows([[columns[key][0] for key in keys], *cells], left)


def save_chart(rows: Sequence[dict], path: Path, title: str) -> None:
    """Images per second of each row as a bar with its quartiles, one panel for each batch size."""
    batches = sorted({row["batch"] for row in rows})
    widest = max(sum(row["batch"] == batch for row in rows) for batch in batches)
    figure, axes = new_figure(len(batches), 1, (9, len(batches) * (0.9 + 0.36 * widest)))
    for axis, batch in zip(axes[:, 0], batches):
        shown = [row for row in rows if row["batch"] == batch]
        values = [row["images_per_second"] for row in shown]
        errors = [[abs(v - row["spread"][end]) for v, row in zip(values, shown)] for end in (0, 1)]
        axis.barh(range(len(shown)), values, xerr=errors, color="#4878a8", ecolor="#333333", capsize=2)
        axis.set_yticks(range(len(shown)), [row["label"] for row in shown], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        for i, row in enumerate(shown):
            text = f"{row['images_per_second']:.4g} ({row['ratio']:.2f}x)"
            place = (max(row["images_per_second"], row["spread"][1]), i)
            axis.annotate(text, place, xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_xlabel(f"images per second at batch {batch}")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path, dpi=150)
