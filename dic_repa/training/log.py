"""What a run reports: a table before its first step, then a progress bar, metrics.jsonl and trackers, and a picture of
the loss curves at its end.

Sums stay on the device between two log steps, so only a log step waits for the device.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import naming
from dic_repa.files.pictures import new_figure, save_figure
from dic_repa.files.reading import numbers, read_json, read_lines
from dic_repa.models import measure_cost
from dic_repa.recipe import Recipe, TrainSection
from dic_repa.recipe.build import build_denoiser
from dic_repa.runs.environment import describe_environment
from dic_repa.runs.folder import RunFolder
from dic_repa.runtime.progress import progress_bar, say, warn
from dic_repa.runtime.threads import describe_threads
from dic_repa.training.noise_scale import NoiseScale
from dic_repa.training.parts import Parts
from dic_repa.training.trackers import Trackers
from dic_repa.training.trainable import describe_trainable

PANELS = {  # of the loss curves: title and sign
    "denoising": ("denoising loss", 1.0),
    "middle": ("loss of the middle head, weighted", 1.0),
    "token": ("similarity to the encoder", -1.0),
    "manifold": ("manifold loss", 1.0),
    "autoencoder.l1": ("error of the autoencoder's images", 1.0),
    "latent.spatial_std": ("deviation of latents over an image", 1.0),
}
COMPILED = {
    False: "",
    True: ", compiled",
    "blocks": ", compiled by block",
    "reduce-overhead": ", compiled with CUDA graphs",
}


def run_header(recipe: Recipe, run: RunFolder, parts: Parts, accelerator: Accelerator, passes: int, start: int) -> str:
    """The run as a table: device, denoiser, data, encoders, batch, steps and folder; `start` steps of it are done."""
    settings, data, processes = recipe.train, recipe.data, accelerator.num_processes
    precision = settings.precision.replace("no", "float32") + (", TF32" if settings.tf32 else "")
    threads = f", {describe_threads()}" if accelerator.device.type == "cpu" else ""
    model = parts.ema.model
    if parts.sharded:  # then a process has only a part of it
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build_denoiser(recipe.model, parts.data.channels, parts.condition)
    cost = measure_cost(model, data.size)
    if parts.start:
        beginning = parts.start.rows()
    else:
        beginning = [("start", f"{settings.init_from}, when the run began")] if settings.init_from and start else []
    trains = describe_trainable(parts.denoiser, settings)
    place, size = f" in {data.path}" if data.path else "", " x ".join(map(str, parts.shape))
    share = settings.batch_size // processes
    costs = f"{cost.parameters / 1e6:.4g} M parameters, {cost.macs / 1e9:.4g} GMACs an image"
    rows = [
        ("device", f"{device_name(accelerator.device)}, {precision}{COMPILED[parts.compiled]}{threads}"),
        ("denoiser", f"{recipe.model.name}, {costs}"),
        *beginning,
        *([("trains", trains)] if trains else []),
        ("data", f"{data.name}{place}, {len(parts.data):,} samples of {size}, {parts.condition.describe()}"),
    ]
    for section in recipe.alignments:
        cached = ", its tokens from the cache" if section.cache and section.encoder else ""
        what = "encoder" if section.encoder else "aligned"
        rows.append((what, f"{section.taught_by} at {section.tap}, weight {section.weight:g}{cached}"))
    if parts.joint:
        rows.append(("trains", f"the autoencoder {parts.joint.spec.name} too, by the alignment and its own losses"))
    each = f"{processes} process{'es' * (processes > 1)} x {share}"
    rows += [
        ("batch", f"{settings.batch_size} = {each}" + (f" in {passes} passes of {share // passes}" * (passes > 1))),
        ("steps", f"{settings.steps:,}" + (f", {start:,} of them done" if start else "")),
        ("folder", str(run.path)),
    ]
    return "\n".join(f"{name:10}{text}" for name, text in rows)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type.upper()}, no GPU"


class MetricLog:
    """Averages of the losses over the steps since the last log step, over all processes; written by the main one.

    A line of metrics.jsonl has: step; loss (the total), denoising, alignment.N.token, alignment.N.manifold (what the
    alignment's loss calls its terms, unweighted); gradient_norm (before clipping, of the last step); learning_rate;
    images_per_second; data_wait (the share of the time in which the next batch was not there yet; a GPU works on
    meanwhile, so it idles at most that share); skipped (steps so far whose loss or gradient was not finite); seconds;
    noise_scale, in images, where several passes or processes let it be measured. A value that is not finite is null,
    and counts in no average.
    """

    def __init__(
        self, run: RunFolder, accelerator: Accelerator, settings: TrainSection, start: int, trackers: Trackers,
        noise: NoiseScale, parts: Parts,
    ):  # fmt: skip
        self.begun_from, self.compiled, self.noise = parts.start, parts.compiled, noise
        self.run, self.accelerator, self.settings, self.trackers = run, accelerator, settings, trackers
        self.start = start
        self.sums: dict[str, Tensor] = {}  # of the finite values and of their steps, (2,)
        self.images, self.pause, self.wait = 0, 0.0, 0.0
        self.watchers: list[Callable[[dict], None]] = []  # of each record, in the main process
        self.unwritten = ""  # lines that could not be written yet because the disk was full

    def __enter__(self) -> MetricLog:
        if self.accelerator.is_main_process:
            environment = describe_environment(str(self.accelerator.device), self.accelerator.num_processes)
            if self.begun_from:
                environment["start"] = self.begun_from.to_dict()
            sessions = []  # one entry for each time that the run was started or resumed
            if self.run.environment_file.exists():
                try:
                    sessions = read_json(self.run.environment_file, "it is begun anew", list)
                except UserError as error:
                    warn(str(error))
            write_whole(self.run.environment_file, json.dumps([*sessions, environment], indent=2) + "\n")
        shown = {"unit": "step", "desc": self.run.path.name, "disable": not self.accelerator.is_main_process}
        self.bar = progress_bar(total=self.settings.steps, initial=self.start, **shown)
        self.since = time.perf_counter()
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        self.bar.close()
        if error is None and self.accelerator.is_main_process and self.run.metrics_file.is_file():
            try:
                save_curves(self.run)
            except (OSError, UserError) as error:
                warn(f"{self.run.curves_file} cannot be written ({getattr(error, 'strerror', error)})")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        begin = time.perf_counter()
        yield
        self.wait += time.perf_counter() - begin

    @contextlib.contextmanager
    def gradients(self, step: int) -> Iterator[None]:
        """To be entered while the gradients of `step`, counted from 1, are computed; the first compiles."""
        begin = time.perf_counter()
        with self.noise.measuring() if self.due(step) else contextlib.nullcontext():
            yield
        if self.compiled and step == self.start + 1 and self.accelerator.is_main_process:
            say(f"compiled: the first step's gradients took {time.perf_counter() - begin:.0f} s")

    def due(self, step: int) -> bool:
        """Whether the step is logged."""
        return step % self.settings.log_every == 0 or step == self.settings.steps

    def state(self) -> dict[str, list]:
        """The sums since the last log step, of each process, for a checkpoint. All processes must call it."""
        if not self.sums:
            return {}
        every = self.accelerator.gather(torch.stack([*self.sums.values()])[None]).transpose(0, 1)
        return dict(zip(self.sums, every.tolist()))

    def restore(self, state: dict[str, list]) -> None:
        """Go on from the sums of a checkpoint; in another number of processes the first one takes them all."""
        for name, rows in state.items():
            sums = torch.tensor(rows, dtype=torch.float32, device=self.accelerator.device).reshape(-1, 2)
            if len(sums) != self.accelerator.num_processes:
                sums = torch.cat([sums.sum(0, keepdim=True), sums.new_zeros(self.accelerator.num_processes - 1, 2)])
            self.sums[name] = sums[self.accelerator.process_index]

    def step(
        self, step: int, losses: list[dict[str, Tensor]], norm: Tensor, learning_rate: float, skipped: int
    ) -> None:
        """Count a step's losses, of each pass; at a log step, average, write and show."""
        share = 1 / len(losses)
        for name, value in ((name, value.float()) for each in losses for name, value in each.items()):
            finite = value.isfinite()
            # Steps are counted for each name: an alignment may stop between log steps.
            self.sums[name] = self.sums.get(name, 0) + torch.stack([value.where(finite, 0), finite.float()]) * share
        self.bar.update()
        self.images += self.settings.batch_size
        if not self.due(step):
            return
        sums = self.accelerator.reduce(torch.stack([*self.sums.values()]), "sum").tolist()
        seconds = time.perf_counter() - self.since - self.pause
        record = {
            "step": step,
            **{name: total / count if count else None for name, (total, count) in zip(self.sums, sums)},
            "gradient_norm": float(norm) if math.isfinite(norm) else None,
            "learning_rate": learning_rate,
            "images_per_second": round(self.images / seconds, 2),
            "data_wait": round(self.wait / seconds, 4),
            "skipped": skipped,
            "seconds": round(seconds, 3),
        }
        if self.noise.measurable:
            record["noise_scale"] = self.noise.measure(norm)
        self.sums, self.images, self.pause, self.wait, self.since = {}, 0, 0.0, 0.0, time.perf_counter()
        if self.accelerator.is_main_process:
            self._write(record)
            for watch in self.watchers:
                watch(record)

    def _write(self, record: dict) -> None:
        self.unwritten += json.dumps(record) + "\n"
        try:
            append_whole(self.run.metrics_file, self.unwritten)
            self.unwritten = ""
        except OSError as error:
            warn(f"{self.run.metrics_file} cannot be written ({error.strerror}); tried again later")
        values = {name: value for name, value in record.items() if value is not None}
        self.trackers.log(values, values.pop("step"))
        # The denoising loss first: the total also falls with the alignment's.
        losses = {name: record[name] for name in ("denoising", "loss")}
        shown = {name: "not finite" if value is None else f"{value:.3f}" for name, value in losses.items()}
        tokens = [value for name, value in record.items() if name.endswith(".token") and value is not None]
        if tokens:
            shown["alignment similarity"] = f"{-sum(tokens) / len(tokens):.3f}"
        if record["skipped"]:
            shown["skipped"] = record["skipped"]
        shown["img/s"] = f"{record['images_per_second']:.0f}"
        self.bar.set_postfix(shown, refresh=sys.stderr.isatty())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of images per second."""
        begin = time.perf_counter()
        yield
        self.pause += time.perf_counter() - begin


def append_whole(path: Path, text: str) -> None:
    """Append `text`, or nothing: a full disk leaves the file as it was."""
    content = text.encode()
    with naming(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), before)
            raise


def save_curves(run: RunFolder) -> None:
    """Plot metrics.jsonl into curves.png, without a last line that a kill has cut short."""
    from matplotlib.ticker import MaxNLocator

    lines = [numbers(record) for _, record in read_lines(run.metrics_file)[0]]
    names = sorted({name for line in lines for name in line})
    terms = {name.split(".")[2] for name in names if name.startswith("alignment.") and name.count(".") > 1}
    panels = [panel for panel in PANELS if panel in terms.union(names)]
    panels += sorted(terms - set(PANELS))  # of the user's own alignment loss
    if not panels:
        return
    figure, axes = new_figure(1, len(panels), (4.6 * len(panels), 3.4))
    for axis, panel in zip(axes[0], panels):
        title, sign = PANELS.get(panel, (f"{panel}, of the alignment", 1.0))
        for series in (name for name in names if panel in (name, name.split(".")[-1])):
            points = [(line["step"], sign * line[series]) for line in lines if series in line]
            if points:
                axis.plot(*zip(*points), linewidth=1.4, marker="o" if len(points) == 1 else None)
        axis.set(title=title, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if panels[0] == "denoising":
        axes[0][0].set_yscale("log")
        axes[0][0].yaxis.set_major_formatter("{x:g}")
        axes[0][0].yaxis.set_minor_formatter("{x:g}")
    save_figure(figure, run.curves_file, dpi=130)
