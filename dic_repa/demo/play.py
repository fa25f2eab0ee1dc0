"""From the choices on the page to pictures, which are handed out as they come."""

from __future__ import annotations

import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dic_repa.conditions import Condition
from dic_repa.demo.models import Models, is_guided
from dic_repa.errors import UserError, unknown_name
from dic_repa.recipe import SampleSection
from dic_repa.samplers import solver_info
from dic_repa.sampling import override_sampling
from dic_repa.sampling.labels import draw_labels
from dic_repa.sampling.load import Checkpoint
from dic_repa.sampling.sampler import Sampler
from dic_repa.trust import names_code, trusting_code

NO_CLASS = "(no class)"
MOST_IMAGES = 64  # of a checkpoint, on one page
BATCH = 16  # images at once at most: the next are shown when these are there
FOLLOWED = 3  # images whose way from the noise is shown
PAUSE = 0.25  # seconds between two estimates at least


@dataclass(frozen=True)
class Wish:
    """What is to be sampled, as it was chosen on the page."""

    models: Sequence[str]
    classes: Sequence[str] = ()  # none: all in turn
    num: int = 16
    solver: str = "heun"
    steps: int = 20  # of a solver of fixed steps
    tolerance: float = 1e-5  # of an adaptive one
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0


@dataclass
class Trail:
    """The way of a few images from noise, at some times: the states, and what the model then took for the image."""

    times: list[float]
    states: Tensor  # (images, stages, C, H, W) in [0, 1], as the estimates are
    estimates: Tensor


@dataclass(frozen=True)
class Shown:
    """What there is so far of one checkpoint's samples. Never changed: the thread that samples puts a new one there."""

    title: str
    command: str  # that draws the same images
    captions: list[str]  # of all images that are to come
    width: int  # of an image, in pixels; a guess at first
    images: Sequence[Tensor] = ()  # (C, H, W) in [0, 1]
    estimates: Sequence[Tensor] = ()  # of the images behind these, not finished yet
    done: float = 0.0  # share of the work
    state: str = "waiting"  # or 'sampling', 'done', 'stopped'
    evaluations: int = 0  # of the network, for each image
    seconds: float = 0.0
    trail: Trail | None = None


class Stopped(Exception):
    """The user has stopped the sampling."""


def settings_of(checkpoint: Checkpoint, wish: Wish) -> SampleSection:
    """The `sample` section of the checkpoint's recipe with what was chosen; a UserError for what does not fit."""
    if not 1 <= wish.num <= MOST_IMAGES:
        raise UserError(f"{wish.num} images: choose from 1 to {MOST_IMAGES}")
    adaptive = solver_info(wish.solver).kind == "adaptive"
    steps: dict[str, Any] = {"rtol": wish.tolerance, "atol": wish.tolerance} if adaptive else {"steps": wish.steps}
    guidance: dict[str, Any] = {"scale": wish.scale}
    if wish.scale != 1:
        guidance["interval"] = list(wish.interval)
    batch = min(BATCH, checkpoint.recipe.sample.batch_size)
    always = {"batch_size": batch, "compile": "off", "classes": "balanced"}  # compiling would take minutes
    needed = is_guided(checkpoint) or wish.scale != 1
    return override_sampling(
        checkpoint.recipe.sample, guidance if needed else None, solver=wish.solver, num=wish.num, seed=wish.seed,
        **steps, **always,
    )  # fmt: skip


def chosen_labels(condition: Condition, classes: Sequence[str]) -> list[int] | None:
    """The labels of the classes; None for all in turn."""
    if NO_CLASS in classes:
        if len(classes) > 1:
            raise UserError(f"choose either {NO_CLASS} or classes")
        return [condition.count]
    for name in classes:
        if name not in condition.names:
            raise unknown_name("class", name, condition.names)
    return [condition.names.index(name) for name in classes] or None


def command_line(path: Any, condition: Condition, settings: SampleSection, wish: Wish, base: SampleSection,
                 trusted: bool) -> str:  # fmt: skip
    """`dic-repa sample ...` for the same images; `base` is what the recipe says without options."""
    words = ["dic-repa", "sample", str(path), "--num", settings.num]
    if wish.classes:
        words += ["--classes", class_words(condition, wish.classes)]
    words += ["--seed", settings.seed, "--solver", settings.solver]
    adaptive = solver_info(settings.solver).kind == "adaptive"
    words += ["--rtol", settings.rtol, "--atol", settings.atol] if adaptive else ["--steps", settings.steps]
    if settings.guidance and settings.guidance != base.guidance:
        words += ["--scale", short(settings.guidance.scale)]
        words += ["--interval", *map(short, settings.guidance.interval)] * (settings.guidance.scale != 1)
    words += ["--batch-size", settings.batch_size] * (settings.batch_size != base.batch_size)
    words += ["--balanced-classes"] * (base.classes != "balanced")
    words += ["--compile", "off"] * (base.compile != "off")
    words += ["--trust-code"] * trusted
    return shlex.join(map(str, words))


def short(number: float) -> str:
    """1 and 0.7 for 1.0 and 0.7, and all digits where they count."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def class_words(condition: Condition, classes: Sequence[str]) -> str:
    """The classes as `--classes` takes them: by name where that cannot be mistaken, else by number."""
    if NO_CLASS in classes:
        return "none"

    def word(name: str) -> str:
        plain = name == name.strip() and name and not re.search(r",|^\d+(-\d+)?$|^none$|^-", name)
        return name if plain else str(condition.names.index(name))

    return ",".join(map(word, classes))


class Job:
    """The samples of one checkpoint, in the making."""

    def __init__(self, models: Models, title: str, wish: Wish):
        checkpoint = models.get(title)
        recipe, condition = checkpoint.recipe, checkpoint.condition
        settings = settings_of(checkpoint, wish)
        self.labels = draw_labels(recipe, condition, settings, chosen_labels(condition, wish.classes))
        self.sampler: Sampler = checkpoint.sampler(settings)
        self.sampler.trace, self.sampler.watch = True, self._watch
        trusted = models.trust and names_code(recipe.model_dump(mode="json"))
        command = command_line(models.paths[title], condition, settings, wish, recipe.sample, trusted)
        names = dict(enumerate(condition.names))
        channels, _, width = self.sampler.shape  # of latents, if there are four channels or more
        captions = [names.get(label, "") for label in self.labels.tolist()]
        self.shown = Shown(title, command, captions, width * (8 if channels > 3 else 1))
        self._passing: list[tuple[float, Tensor]] = []  # estimates of the first images
        self._pause, self._last, self._aside = PAUSE, 0.0, 0.0

    def run(self, stop: threading.Event, tell: Callable[[], None]) -> None:
        """Sample, and `tell` whenever there is more to show; raises Stopped once `stop` is set."""
        self.stop, self.tell = stop, tell
        begin = time.perf_counter()
        self._show(state="sampling")
        for images in self.sampler(self.labels):
            if not images.isfinite().all():
                raise UserError(
                    f"{self.shown.title}: samples are NaN or infinite; choose other settings, or look at the checkpoint"
                )
            there = (*self.shown.images, *images)
            self._show(
                images=there, estimates=(), width=images.shape[-1], done=len(there) / len(self.labels),
                trail=self.shown.trail or self._trail(), evaluations=self.sampler.evaluations,
                seconds=time.perf_counter() - begin - self._aside,
            )  # fmt: skip
        self._show(state="done")

    def _show(self, **changes: Any) -> None:
        self.shown = replace(self.shown, **changes)
        self.tell()

    def _watch(self, start: int, t: float, estimate: Callable[[], Tensor]) -> None:
        if self.stop.is_set():
            raise Stopped
        now, batch = time.perf_counter(), min(self.sampler.settings.batch_size, len(self.labels) - start)
        if start == 0:
            self._passing.append((t, estimate()[:FOLLOWED].float()))
        if now - self._last < self._pause:
            return
        # A decoder may be slow: the estimates take at most a fifth of the time.
        images = self.sampler.to_images(estimate()[:batch].float()).cpu()
        changes: dict[str, Any] = {"done": max(self.shown.done, (start + batch * (1 - t)) / len(self.labels))}
        if start == len(self.shown.images):  # on a GPU the batch before may not have been handed out yet
            changes |= {"estimates": list(images), "width": images.shape[-1]}
        self._last = time.perf_counter()
        self._aside += self._last - now
        self._pause = max(PAUSE, 5 * (self._last - now))
        self._show(**changes)

    def _trail(self) -> Trail:
        begin = time.perf_counter()
        states, times = self.sampler.trajectory(FOLLOWED)
        nearest = [min(self._passing, key=lambda passed: abs(passed[0] - t))[1] for t in times[:-1]]
        estimates = [self.sampler.to_images(estimate).cpu() for estimate in nearest]
        self._passing, self.sampler.states = [], ()
        self._aside += time.perf_counter() - begin
        return Trail(times, states, torch.stack([*estimates, states[:, -1]], dim=1))


def play(models: Models, wish: Wish, stop: threading.Event | None = None) -> Iterator[list[Shown]]:
    """What there is to show of each of the chosen checkpoints, again whenever there is more, at last all of it.

    They are sampled one after another in a thread; it ends when `stop` is set or the iterator is closed.

    Raises:
        UserError: a class or setting does not fit a checkpoint, before anything is sampled.
    """
    stop = stop or threading.Event()
    models.fit(wish.models)
    with trusting_code(models.trust):
        jobs = [Job(models, title, wish) for title in wish.models]
    news, ended, errors = threading.Event(), threading.Event(), []

    def work() -> None:
        try:
            with models.at_work, trusting_code(models.trust):
                for job in jobs:
                    job.run(stop, news.set)
        except Stopped:
            for job in jobs:
                job.shown = replace(job.shown, state="done" if job.shown.state == "done" else "stopped")
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()
            news.set()

    threading.Thread(target=work, daemon=True).start()
    try:
        while not errors:
            last = ended.is_set()
            yield [job.shown for job in jobs]
            if last:
                return
            news.wait()
            news.clear()
    finally:
        stop.set()
    raise errors[0]
