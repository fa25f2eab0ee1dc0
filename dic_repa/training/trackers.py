"""Who is told of a run besides metrics.jsonl: TensorBoard, Weights & Biases, trackio, through Accelerate.

A resumed run does again what came after its checkpoint. Of that nobody is told twice: `trackers/told.json` has the last
step that they were told of, and the run's name at W&B.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from dic_repa.errors import UserError, first_line
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import list_output
from dic_repa.recipe import Recipe
from dic_repa.runs.folder import RunFolder

PROJECT = "dic-repa"  # under which W&B and trackio group runs


def check_trackers(names: Sequence[str]) -> None:
    """A UserError where a tracker is not installed, which Accelerate would leave out in silence."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracker {name} is not installed: pip install 'dic-repa[{name}]', or leave it out")


class Trackers:
    """`with Trackers() as trackers`: the recipe's trackers, from their `start` to the end of the block.

    Only the main process tells them anything; in the others, and without trackers, nothing happens. One that fails
    costs a warning and not the run.
    """

    def __init__(self):
        self.open: list = []
        self.told: dict[str, int] = {}  # the last step by the kind of news: metrics, samples, ...
        self.folders: list[Path] = []  # in the run, that they write into
        self.before: set[Path] = set()  # what was in these

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._each(lambda tracker: tracker.finish())
        self._list_files()
        self.open = []

    def start(self, accelerator: Accelerator, run: RunFolder, recipe: Recipe, resumed: bool = False) -> None:
        """Open those that `accelerator` was made with; a UserError for one that does not start."""
        if not (accelerator.log_with and accelerator.is_main_process):
            return
        self.folders = [run.path / "trackers", run.path / "wandb"]
        self.before = {*self._files()}
        self.file, id = run.path / "trackers" / "told.json", secrets.token_hex(4)
        if resumed:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # of a run that had no trackers yet
                kept = json.loads(self.file.read_text())
                id, self.told = str(kept["id"]), {name: int(step) for name, step in kept["told"].items()}
        self.id = id
        options = {
            "wandb": {"name": run.path.name, "dir": str(run.path), "id": id, "resume": "allow"},
            "trackio": {"name": run.path.name, "resume": "allow" if self.told else "never"},
        }
        config = {key: value if isinstance(value, int | float | str | bool) else str(value)
                  for key, value in _flat(recipe.model_dump(mode="json"))}  # fmt: skip
        try:
            with contextlib.redirect_stdout(sys.stderr):
                accelerator.init_trackers(PROJECT, None, options)
                self.open = accelerator.trackers
                for tracker in self.open:
                    if not (self.told and tracker.name == "tensorboard"):  # which would add it beside the first
                        tracker.store_init_configuration(config)
        except Exception as error:  # W&B's and trackio's own kinds, such as for a missing login
            raise UserError(
                f"a tracker of train.trackers cannot be started: {first_line(error)}; log in, choose another mode "
                "(WANDB_MODE=offline), or leave it out"
            ) from None
        self._list_files()  # now too: a kill leaves no other moment

    def _files(self) -> list[Path]:
        return [file for folder in self.folders for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()]

    def _list_files(self) -> None:
        """Note that what came to be in their folders since the start is the run's own, to be overwritten with it."""
        with contextlib.suppress(OSError):
            for file in {*self._files()} - self.before:
                list_output(file)

    def log(self, values: dict[str, float], step: int, kind: str = "metrics") -> None:
        """Tell them numbers of a step."""
        if self._is_news(kind, step):
            self._each(lambda tracker: tracker.log(values, step=step))

    def log_picture(self, name: str, file: Path, step: int) -> None:
        """Tell them the picture in `file`, if it is there: a full disk may have kept it from being written."""
        if file.is_file() and self._is_news(name, step):
            with Image.open(file) as image:
                picture = image.convert("RGB")
            self._each(lambda tracker: _log_picture(tracker, name, picture, step))

    def log_final(self, scores: dict, picture: Path, step: int) -> None:
        """Tell them what the samples at the end have scored, and their picture."""
        numbers = {f"final/{k}": v for k, v in scores.items() if isinstance(v, int | float) and "count" not in k}
        self.log(numbers, step, "final")
        self.log_picture("final/samples", picture, step)

    def _is_news(self, kind: str, step: int) -> bool:
        if not self.open or step <= self.told.get(kind, -1):
            return False
        self.told[kind] = step
        with contextlib.suppress(OSError, UserError):  # a full disk: after a resume they are told twice
            self.file.parent.mkdir(exist_ok=True)
            write_whole(self.file, json.dumps({"id": self.id, "told": self.told}) + "\n")
        return True

    def _each(self, action: Callable) -> None:
        for tracker in self.open:
            try:
                action(tracker)
            except Exception as error:  # somebody else's code, a disk or a network
                tqdm.write(f"warning: {tracker.name} could not be told: {first_line(error)}", file=sys.stderr)


def _log_picture(tracker, name: str, picture: Image.Image, step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        tracker.tracker.flush()
    elif tracker.name == "wandb":
        tracker.log_images({name: [picture]}, step=step)
    else:  # Accelerate has no way of its own to trackio's pictures
        import trackio

        tracker.log({name: trackio.Image(np.asarray(picture))}, step=step)


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value
