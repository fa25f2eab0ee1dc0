"""`dic-repa bench poster`: the throughput table of DiC's poster on this device, with the convolutional peers.

Ten models of full size do not fit into one GPU, so here not all take turns, as in the other verbs: each system in its
precisions, eager and compiled, takes turns with DiT-XL/2, and its ratio is to what DiT-XL/2 did in these turns. A row
has the GPU's clocks.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dic_repa.bench.budget import Budget
from dic_repa.bench.device import describe_device, free_memory, read_clocks
from dic_repa.bench.model import ModelCase, random_inputs, randomise
from dic_repa.bench.peaks import measure_peak
from dic_repa.bench.timing import Settings, case_label, interleave, speed
from dic_repa.errors import first_line
from dic_repa.files.pictures import new_figure, save_figure
from dic_repa.models import create_denoiser, measure_cost
from dic_repa.models.compiled import CompiledDenoiser
from dic_repa.models.presets import POSTER
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.sampling.sampler import DTYPES

PIXELS = {256: 32, 512: 64}  # of the images: height and width of the latents
REFERENCE = "DiT-XL/2"
NEED = 20  # seconds of a system in one precision and compile mode, about


@dataclass(frozen=True)
class System:
    """A denoiser of the table: the options that it is built with, and the images per second that the poster has.

    `small` are the options of a quarter of the width, at the same depth; `size_option` is the one that is the latent's
    size, where the class needs it.
    """

    name: str
    small: Mapping[str, Any]
    poster: Mapping[int, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    size_option: str = ""


_VARIANCE = {"learn_sigma": True}  # which the poster's GMACs contain
_SONG_SMALL = {"block_out_channels": [64, 64, 64], "attention_head_dim": 64, "time_embedding_dim": 128}
_PIXART_SMALL = {"num_attention_heads": 4, "cross_attention_dim": 288, "caption_channels": 288}
_DIT_SMALL = {"width": 288, "num_heads": 4}
SYSTEMS = {
    each.name: each
    for each in (
        System(REFERENCE, _DIT_SMALL, {256: 66.8, 512: 16.2}),
        System("U-ViT-XL/2", {"width": 256, "num_heads": 4}, {256: 72.6}, size_option="size"),
        System("PixArt-alpha-XL/2", _PIXART_SMALL, {256: 64.1}, _VARIANCE, "sample_size"),
        System("DiffiT-XL/2", _DIT_SMALL, {256: 64.1}, _VARIANCE, "size"),
        System("DiT-LLaMA-XL/2", _DIT_SMALL, {256: 65.2}, _VARIANCE),
        System("SongUNet", _SONG_SMALL),
        System("DiCo-XL", {"width": 104}),
        System("FCDM-XL", {"width": 128}),
        System("DiC-XL", {"width": 96}, {256: 313.7, 512: 84.2}, _VARIANCE),
        System("DiC-H", {"width": 96}, {256: 160.8, 512: 53.3}, _VARIANCE),
    )
}
COLUMNS = {  # key of a row: heading and format
    "label": ("what", "{}"),
    "gmacs": ("GMACs", "{:.1f}"),
    "images_per_second": ("images/s", "{:.4g}"),
    "spread": ("quartiles", "{0[0]:.4g}-{0[1]:.4g}"),
    "ratio": (f"to {REFERENCE}", "{:.2f}"),
    "poster": ("poster's images/s", "{:.4g}"),
    "poster_ratio": ("its ratio", "{:.2f}"),
    "tflops": ("TFLOP/s", "{:.3g}"),
    "matrix_share": ("of matrix peak", "{:.0%}"),
    "convolution_share": ("of conv peak", "{:.0%}"),
    "difference": ("differs by", "{:.1e}"),
    "first_call": ("first call, s", "{:.1f}"),
    "failed": ("not measured", "{}"),
}


def bench_poster(
    settings: Settings,
    pixels: Sequence[int],
    names: Sequence[str] = tuple(SYSTEMS),
    small: bool = False,
    budget: Budget | None = None,
) -> Iterator[dict]:
    """Time the forward pass of the systems of these `names` at each of `pixels`; the first of the settings' batches.

    Yields the whole result so far after each system: `environment`, `peaks`, `source`, `small` and `rows`. A row
    is for a system, size, precision and compile mode; where it could not be measured, it says why (`failed`),
    also where the `budget` has no time for the system any more.
    """
    result: dict[str, Any] = {
        "environment": describe_device(settings.device),
        "source": POSTER,
        "small": small,
        "peaks": {kind: measure_peak(kind, settings.device) for kind in settings.precisions},
        "rows": [],
    }
    budget = budget or Budget()
    for px in pixels:
        beside: list[ModelCase] = []  # DiT-XL/2
        for name in sorted(names, key=lambda name: name != REFERENCE):
            rows, cases = _measure(SYSTEMS[name], settings, px, small, beside, budget)
            for row, (kind, peak) in itertools.product(rows, result["peaks"].items()):
                if kind == row["precision"] and "tflops" in row:
                    row |= {f"{work}_share": row["tflops"] / most for work, most in peak.items()}
            result["rows"] += rows
            beside = cases if name == REFERENCE else beside
            del cases
            free_memory(settings.device)
            yield result


def _measure(
    system: System, settings: Settings, px: int, small: bool, beside: Sequence[ModelCase], budget: Budget
) -> tuple[list[dict], list[ModelCase]]:
    """A row for each precision and compile mode, measured in turns with those `beside` it; and what could be called."""
    batch, size = settings.batches[0], PIXELS[px]
    kinds = list(itertools.product(settings.precisions, settings.compiles))
    facts: dict[str, Any] = {"system": system.name, "pixels": px, "batch": batch}
    if px in system.poster:
        facts |= {"poster": system.poster[px], "poster_ratio": system.poster[px] / SYSTEMS[REFERENCE].poster[px]}
    rows = [
        facts | {"precision": kind, "compile": mode, "label": case_label(system.name, kind, mode, f"{px} px")}
        for kind, mode in kinds
    ]
    if why := budget.left_out(NEED * len(kinds)):
        return [row | {"failed": why} for row in rows], []
    try:
        cases = _cases(system, settings, size, small)
    except Exception as error:  # of one system, which the others do not wait for
        return [row | {"failed": _reason(error)} for row in rows], []
    runs: list[ModelCase] = []
    measured: list[dict] = []
    for row, case in zip(rows, cases):
        try:
            begin = time.perf_counter()
            case()  # compiles
            if settings.device.type == "cuda":
                torch.cuda.synchronize(settings.device)
            row["first_call"] = time.perf_counter() - begin
            runs.append(case)
            measured.append(row)
        except Exception as error:  # no compiler, or no memory for this case
            row["failed"] = _reason(error)
    try:
        timings = interleave([*runs, *beside], settings.rounds, settings.seconds, description=system.name)
    except Exception as error:  # no memory for all of them
        return [{"failed": _reason(error), **row} for row in rows], []
    medians = {case.label: timing.median for case, timing in zip([*runs, *beside], timings)}
    for row, case, timing in zip(measured, runs, timings):
        row |= speed(timing, batch)
        row |= {"gmacs": case.operations / 2, "tflops": case.operations * row["images_per_second"] / 1000}
        row["difference"] = float((case().float() - case.reference).norm() / case.reference.norm())
        row |= read_clocks(settings.device) if settings.device.type == "cuda" else {}
        own = case_label(REFERENCE, row["precision"], row["compile"])
        row |= {"ratio": medians[own] / timing.median} if own in medians else {}
    return rows, runs


def _cases(system: System, settings: Settings, size: int, small: bool) -> list[ModelCase]:
    """Each precision and compile mode of a system; the reference is its own output in float32, eager."""
    torch.manual_seed(0)
    options = {**system.options, **(system.small if small else {})}
    options |= {system.size_option: size} if system.size_option else {}
    denoiser = randomise(create_denoiser(system.name, **options)).to(settings.device)
    operations = 2 * measure_cost(denoiser, size).macs / 1e9
    x, t, y = random_inputs(denoiser, settings.batches[0], size, settings.device)
    with torch.inference_mode(), gpu_arithmetic(tf32=False):
        reference = denoiser(x, t, y)
    cases = []
    for kind in settings.precisions:
        dtype = DTYPES.get(kind, torch.float32)
        model = denoiser if dtype == torch.float32 else copy.deepcopy(denoiser).to(dtype)
        for mode in settings.compiles:
            called = model if mode == "off" else CompiledDenoiser(model, mode)
            cases.append(
                ModelCase(case_label(system.name, kind, mode), called, operations, kind, (x.to(dtype), t, y), reference)
            )
    return cases


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def save_poster_chart(result: dict, path: Path, title: str) -> None:
    """Images per second as bars, a panel for each size and precision; beside them the ratio to DiT-XL/2, and the
    poster's."""
    rows = [row for row in result["rows"] if "failed" not in row]
    sizes, kinds, modes = ([*dict.fromkeys(row[key] for row in rows)] for key in ("pixels", "precision", "compile"))
    if not rows:
        return
    names = [*dict.fromkeys(row["system"] for row in rows)]
    height = 0.9 + 0.26 * len(names) * len(modes)
    figure, axes = new_figure(len(sizes), len(kinds), (8 * len(kinds), height * len(sizes)))
    for (i, px), (j, kind) in itertools.product(enumerate(sizes), enumerate(kinds)):
        axis = axes[i, j]
        for k, mode in enumerate(modes):
            shown = [row for row in rows if (row["pixels"], row["precision"], row["compile"]) == (px, kind, mode)]
            places = [names.index(row["system"]) + (k - (len(modes) - 1) / 2) * 0.8 / len(modes) for row in shown]
            values = [row["images_per_second"] for row in shown]
            errors = [[abs(v - row["spread"][end]) for v, row in zip(values, shown)] for end in (0, 1)]
            color = ("#4878a8", "#e0a050", "#6a9a58", "#999999")[k % 4]
            label = {"off": "eager", "blocks": "each block compiled", "default": "compiled"}.get(mode, mode)
            axis.barh(places, values, 0.8 / len(modes), xerr=errors, color=color, label=label, ecolor="#333333")
            for row, place in zip(shown, places):
                spot = (max(row["images_per_second"], row["spread"][1]), place)
                axis.annotate(_beside(row), spot, (5, 0), textcoords="offset points", va="center", fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.35)
        axis.set_xlabel(f"images per second, {px} px, {kind}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path, dpi=150)


def _beside(row: dict) -> str:
    ratio = f" ({row['ratio']:.2f}x)" if "ratio" in row else ""
    theirs = f", poster {row['poster']:.4g} ({row['poster_ratio']:.2f}x)" if "poster" in row else ""
    return f"{row['images_per_second']:.4g}{ratio}{theirs}"
