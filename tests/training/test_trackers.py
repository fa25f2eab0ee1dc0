"""What TensorBoard, W&B and trackio are told of a run, read back from what they wrote; nothing twice after a resume."""

from __future__ import annotations

import importlib.util
import io
import json
import sqlite3
import struct
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from small_runs import metrics, small_run

from dic_repa.cli import main
from dic_repa.errors import UserError
from dic_repa.runs import RunFolder
from dic_repa.training.trackers import Trackers

# By name: the step and the value of each number, and the step and the levels of each picture.
News = dict[str, list[tuple[int, object]]]


def of_tensorboard(run: Path) -> News:
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

    events = EventAccumulator(str(run / "trackers/dic-repa"), {SCALARS: 0, IMAGES: 0})  # 0: all of them
    events.Reload()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    for name in events.Tags()["images"]:
        found[name] = [(e.step, levels(io.BytesIO(e.encoded_image_string))) for e in events.Images(name)]
    return found


def of_wandb(run: Path) -> News:
    from wandb.proto.wandb_internal_pb2 import Record

    found, ids = defaultdict(list), set()
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        ids.add(file.stem)
        for content in leveldb_records(file.read_bytes()):
            record = Record.FromString(content)
            values = {tuple(i.nested_key) or (i.key,): json.loads(i.value_json) for i in record.history.item}
            for (name, *rest), value in values.items():
                if rest == ["filenames"]:
                    found[name].append((values["_step",], levels(file.parent / "files" / value[0])))
                elif not rest and not name.startswith("_"):
                    found[name].append((values["_step",], value))
    assert len(ids) == 1  # it was one run for W&B
    return found


def leveldb_records(content: bytes) -> list[bytes]:
    """The records of a log in LevelDB's format (blocks of 32 KiB; fragments with CRC, length and type), behind W&B's 7
    bytes."""
    records, at, part = [], 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            records.append(part)
            part = b""
    return records


def of_trackio(run: Path) -> News:
    folder, found = run.parent / "trackio", defaultdict(list)
    rows = sqlite3.connect(folder / "dic-repa.db").execute(
        "select step, metrics from metrics where run_name = ?", ["run"]
    )
    for step, text in rows.fetchall():
        for name, value in json.loads(text).items():
            value = levels(folder / "media" / value["file_path"]) if isinstance(value, dict) else value
            found[name].append((step, value))
    return found


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "trackio": of_trackio}


def levels(file) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


@pytest.mark.parametrize("name", READERS)
def test_metrics_pictures_and_scores_are_told_once(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key, value in {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "ACCELERATE_USE_CPU": "1",
    }.items():
        monkeypatch.setenv(key, value)
    pytest.importorskip(name)
    small = [*TINY, "--set=train.sample_every=3", "--set=train.log_every=1", "--set=train.checkpoint_every=4"]
    command = ["train", "digits-urepa", "--out=run", f"--set=train.trackers=[{name}]", *small]
    small_run("run", *[key.removeprefix("--set=") for key in command[3:]], "train.steps=6", base=[])
    run = RunFolder(tmp_path / "run")
    for file in run.checkpoint_path(6).rglob("model.safetensors"):
        file.unlink()  # as if it had been killed before: steps 5 and 6 are done again
    with pytest.raises(SystemExit) as exit:
        main([*command, "--set=train.steps=8", "--resume"])
    assert exit.value.code == 0
    found = READERS[name](run.path)
    assert found["loss"] == [(r["step"], pytest.approx(r["loss"])) for r in metrics(run)]
    assert [step for step, _ in found["samples"]] == [3, 6, 8]
    for step, picture in found["samples"]:
        np.testing.assert_array_equal(picture, levels(run.samples / f"step_{step:08d}.png"))
    (record,) = (run.path / "evaluation").glob("*.json")
    scores = json.loads(record.read_text())["scores"]
    (name_of_one,) = [key for key in found if key.endswith("/recognised")]
    assert found[name_of_one] == [(8, pytest.approx(scores["recognised"]))]
    ((step, picture),) = found["final/samples"]
    assert step == 8
    np.testing.assert_array_equal(picture, levels(record.with_suffix(".png")))


def test_a_new_run_in_the_same_folder_begins_its_trackers_anew(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    keys = ["train.steps=3", "train.trackers=[tensorboard]"]
    small_run(tmp_path / "run", *keys)
    (tmp_path / "run/trackers/notes.txt").write_text("mine")
    run = small_run(tmp_path / "run", *keys, overwrite=True)
    assert [step for step, _ in of_tensorboard(run.path)["loss"]] == [1, 2, 3]
    assert len(list((run.path / "trackers/dic-repa").glob("events.*"))) == 1
    assert (run.path / "trackers/notes.txt").read_text() == "mine"
    assert "left 1 file that is not dic-repa's" in capsys.readouterr().err


def test_scores_in_training_are_told(tmp_path):
    pytest.importorskip("tensorboard")
    keys = ["train.steps=4", "evaluate.every=2", "evaluate.num=20", "train.trackers=[tensorboard]"]
    small = [option.removeprefix("--set=") for option in TINY]
    run = small_run(tmp_path / "run", *small, *keys, base=[])
    assert [step for step, _ in of_tensorboard(run.path)["evaluate/recognised"]] == [2, 4]


def test_a_tracker_that_fails_costs_a_warning(tmp_path, capsys):
    class Broken:
        name = "broken"

        def log(self, values, step):
            raise ConnectionError("no route to host")

        def finish(self):
            raise RuntimeError

    with Trackers() as trackers:
        trackers.open, trackers.file, trackers.id = [Broken()], tmp_path / "told.json", "1"
        trackers.log({"loss": 1.0}, 1)
    assert capsys.readouterr().err.splitlines() == [
        "warning: broken could not log: no route to host",
        "warning: broken could not log: RuntimeError",
    ]


def test_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)
    )
    with pytest.raises(UserError, match=r"tracker wandb is not installed: pip install 'dic-repa\[wandb\]'"):
        small_run(tmp_path / "run", "train.trackers=[wandb]")
    assert not (tmp_path / "run").exists()


class Remembering:
    """A tracker of one's own: in memory."""

    told: dict[str, list] = {}  # noqa: RUF012

    def __init__(self, run, id, resumed, prefix=""):
        self.prefix = prefix

    def configure(self, values):
        self.told["configured"] = [values["train.steps"]]

    def log(self, values, step):
        self.told.setdefault(self.prefix + "loss", []).append((step, values["loss"]))

    def log_picture(self, name, picture, step):
        self.told.setdefault(name, []).append((step, picture.mode))

    def finish(self):
        self.told["finished"] = [True]


def test_a_tracker_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Remembering, "told", {})
    own = f"train.trackers=[{{name: '{__name__}:Remembering', prefix: my-}}]"
    run = small_run(tmp_path / "run", own, "train.sample_every=4", "sample.steps=2")
    assert Remembering.told == {
        "configured": [8],
        "my-loss": [(record["step"], record["loss"]) for record in metrics(run)],
        "samples": [(4, "RGB"), (8, "RGB")],
        "finished": [True],
    }


def test_an_unknown_tracker_and_option(tmp_path):
    with pytest.raises(UserError, match="unknown tracker 'wandbb'; did you mean wandb"):
        small_run(tmp_path / "run", "train.trackers=[wandbb]")
    own = f"train.trackers=[{{name: '{__name__}:Remembering', prefx: my-}}]"
    with pytest.raises(UserError, match=r"option of tracker .*'prefx'; did you mean prefix"):
        small_run(tmp_path / "run", own)
