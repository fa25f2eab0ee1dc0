"""Trackers of a run besides metrics.jsonl: TensorBoard, Weights & Biases, trackio through Accelerate, or your own.

A tracker is made as `factory(run, id, resumed, **options)`, where `id` is the run's name for a service that keeps it,
and has `configure(values)`, `log(values, step)`, `log_picture(name, picture, step)` and `finish()`.

A resumed run repeats the steps after its checkpoint, but logs nothing twice: `trackers/told.json` has the last
step that was logged, and the run's name at W&B.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import list_output
from dic_repa.files.reading import parse_json
from dic_repa.recipe import Recipe
from dic_repa.registry import Registry
from dic_repa.runs.folder import RunFolder
from dic_repa.runtime.progress import warn

trackers = Registry("tracker", key="train.trackers")


class OfAccelerate:
    """A tracker that Accelerate knows by the `name` of its package; `options` go to it."""

    name: str

    def __init__(self, run: RunFolder, id: str, resumed: bool, project: str = "dic-repa", **options):
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.resumed = resumed
        self.tracker = LOGGER_TYPE_TO_CLASS[self.name](project, **self.started_with(run, id), **options)
        getattr(self.tracker, "start", lambda: None)()  # earlier versions start by themselves

    def started_with(self, run: RunFolder, id: str) -> dict[str, Any]:
        """What the package's own start takes."""
        raise NotImplementedError

    def configure(self, values: Mapping[str, Any]) -> None:
        self.tracker.store_init_configuration(dict(values))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.tracker.log(dict(values), step=step)

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.tracker.log_images({name: [picture]}, step=step)

    def finish(self) -> None:
        self.tracker.finish()


@trackers.register("tensorboard")
class TensorBoard(OfAccelerate):
    """TensorBoard: event files in the run's folder trackers/."""

    name = "tensorboard"

    def started_with(self, run: RunFolder, id: str) -> dict[str, Any]:
        return {"logging_dir": str(run.path / "trackers")}

    def configure(self, values: Mapping[str, Any]) -> None:
        if not self.resumed:  # it would be shown twice
            super().configure(values)

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        self.tracker.tracker.flush()


@trackers.register("wandb")
class WandB(OfAccelerate):
    """Weights & Biases; a resumed run goes on in the same page."""

    name = "wandb"

    def started_with(self, run: RunFolder, id: str) -> dict[str, Any]:
        return {"name": run.path.name, "dir": str(run.path), "id": id, "resume": "allow"}


@trackers.register("trackio")
class Trackio(OfAccelerate):
    """trackio: like W&B, in a database on this machine."""

    name = "trackio"

    def started_with(self, run: RunFolder, id: str) -> dict[str, Any]:
        return {"name": run.path.name, "resume": "allow" if self.resumed else "never"}

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        import trackio  # Accelerate has no way of its own to its pictures

        self.tracker.log({name: trackio.Image(np.asarray(picture))}, step=step)


def check_trackers(specs: Sequence[Any]) -> None:
    """A UserError for a tracker that is not known, or whose package is not installed."""
    for spec in specs:
        name = spec if isinstance(spec, str) else spec["name"]
        package = getattr(trackers.find(name), "name", None)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"tracker {package} is not installed: pip install 'dic-repa[{package}]', or leave it out")


class Trackers:
    """`with Trackers() as trackers`: the recipe's trackers, from their `start` to the end of the block.

    Only the main process logs. A tracker that fails costs a warning, not the run.
    """

    def __init__(self):
        self.open: list = []
        self.told: dict[str, int] = {}  # the last step logged, by kind: metrics, samples, ...
        self.folders: list[Path] = []  # in the run, that they write into
        self.before: set[Path] = set()  # the files in these at the start

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._each(lambda tracker: tracker.finish())
        self._list_files()
        self.open = []

    def start(self, run: RunFolder, recipe: Recipe, resumed: bool) -> None:
        """In the main process, open the recipe's; a UserError for one that does not start."""
        if not recipe.train.trackers:
            return
        self.folders = [run.path / "trackers", run.path / "wandb"]
        self.before = {*self._files()}
        self.file, self.id = run.path / "trackers" / "told.json", secrets.token_hex(4)
        if resumed:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # of a run that had no trackers yet
                kept = parse_json(self.file.read_text())
                self.id, self.told = str(kept["id"]), {name: int(step) for name, step in kept["told"].items()}
        config = {key: value if isinstance(value, int | float | str | bool) else str(value)
                  for key, value in _flat(recipe.model_dump(mode="json"))}  # fmt: skip
        try:
            with contextlib.redirect_stdout(sys.stderr):
                for spec in recipe.train.trackers:
                    self.open.append(trackers.create(spec, run, self.id, bool(self.told)))
                    self.open[-1].configure(config)
        except UserError:
            raise
        except Exception as error:  # W&B and trackio raise their own kinds, such as for a missing login
            raise UserError(
                f"a tracker of train.trackers cannot be started: {first_line(error)}; log in, choose another mode "
                "(WANDB_MODE=offline), or leave it out"
            ) from None
        self._list_files()  # already now, in case the run is killed

    def _files(self) -> list[Path]:
        return [file for folder in self.folders for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()]

    def _list_files(self) -> None:
        """Note that the files made in their folders since the start are the run's, to be overwritten with it."""
        with contextlib.suppress(OSError):
            for file in {*self._files()} - self.before:
                list_output(file)

    def log(self, values: dict[str, float], step: int, kind: str = "metrics") -> None:
        """Log numbers of a step."""
        if self._is_news(kind, step):
            self._each(lambda tracker: tracker.log(values, step))

    def log_picture(self, name: str, file: Path, step: int) -> None:
        """Log the picture in `file`, unless it is missing because the disk was full."""
        if file.is_file() and self._is_news(name, step):
            with Image.open(file) as image:
                picture = image.convert("RGB")
            self._each(lambda tracker: tracker.log_picture(name, picture, step))

    def _is_news(self, kind: str, step: int) -> bool:
        if not self.open or step <= self.told.get(kind, -1):
            return False
        self.told[kind] = step
        with contextlib.suppress(OSError, UserError):  # a full disk: after a resume these values are logged twice
            self.file.parent.mkdir(exist_ok=True)
            write_whole(self.file, json.dumps({"id": self.id, "told": self.told}) + "\n")
        return True

    def _each(self, action: Callable) -> None:
        for tracker in self.open:
            try:
                action(tracker)
            except Exception as error:  # somebody else's code, a disk or a network
                name = getattr(tracker, "name", type(tracker).__name__)
                warn(f"{name} could not log: {first_line(error)}")


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value
