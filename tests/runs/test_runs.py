"""`dic-repa runs`: each run in one row, whatever state it is in, sorted, as JSON, without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import TINY
from small_runs import metrics, small_run

from dic_repa.cli import cli
from dic_repa.errors import UserError
from dic_repa.files.lock import holder, locked
from dic_repa.files.outputs import LOCK
from dic_repa.runs import RunFolder

HOLD = """
import sys
from pathlib import Path
from dic_repa.files.lock import locked
with locked(Path(sys.argv[1])):
    print(flush=True)
    input()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs in all states, at two depths, and a folder that is not a run."""
    folder = tmp_path_factory.mktemp("all") / "runs"
    small_run(folder / "finished", "train.steps=4", *[option.removeprefix("--set=") for option in TINY], base=[])
    CliRunner().invoke(cli, ["evaluate", str(folder / "finished")], catch_exceptions=False)
    small_run(folder / "deep/stopped")
    stopped = RunFolder(folder / "deep/stopped")
    stopped.save_recipe(stopped.recipe(["train.steps=20"]))
    for name in ("unsaved", "cut", "broken", "lost"):
        shutil.copytree(folder / "deep/stopped", folder / name)
    shutil.rmtree(folder / "unsaved/checkpoints/step_00000008")
    shutil.rmtree(folder / "unsaved/checkpoints/step_00000004")
    file = folder / "cut/checkpoints/step_00000008/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with (folder / "cut/metrics.jsonl").open("a") as lines:
        lines.write('{"step": 9, "lo')
    (folder / "broken/recipe.yaml").write_text("train: {steps: [}")
    (folder / "lost/recipe.yaml").unlink()
    (folder / "notes").mkdir()
    (folder / "notes/recipe.yaml").write_text("base: digits-urepa\n")  # a recipe and no run
    return folder


def listed(*arguments) -> list[dict]:
    result = CliRunner().invoke(cli, ["runs", *map(str, arguments), "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


def test_all_states(runs):
    found = {run["path"].removeprefix(f"{runs}/"): run for run in listed(runs)}
    assert list(found) == sorted(found)
    assert {name: run["state"] for name, run in found.items()} == {
        "finished": "finished",
        "deep/stopped": "stopped",
        "unsaved": "no checkpoint",
        "cut": "damaged",
        "broken": "damaged",
        "lost": "damaged",
    }
    finished = found["finished"]
    assert (finished["step"], finished["steps"]) == (4, 4)
    assert finished["scores"].keys() == {"fd-digits", "recognised"}
    (record,) = (runs / "finished/evaluation").glob("*.json")
    assert finished["scores"]["recognised"] == json.loads(record.read_text())["scores"]["recognised"]
    speeds = sorted(line["images_per_second"] for line in metrics(RunFolder(runs / "deep/stopped"))[-5:])
    assert found["deep/stopped"]["images_per_second"] == speeds[2]
    assert (found["deep/stopped"]["step"], found["deep/stopped"]["steps"]) == (8, 20)
    assert "model.safetensors has" in found["cut"]["why"]
    assert "not valid YAML" in found["broken"]["why"]
    assert "has no recipe.yaml" in found["lost"]["why"]


def test_rows_and_sorting(runs):
    result = CliRunner().invoke(cli, ["runs", str(runs), "--sort=steps"], catch_exceptions=True)
    assert isinstance(result.exception, UserError)
    assert "did you mean step" in str(result.exception)
    text = CliRunner().invoke(cli, ["runs", str(runs)], catch_exceptions=False).stdout.splitlines()
    assert len(text) == 1 + 6
    (row,) = [line for line in text if "broken" in line]
    assert "damaged: " in row
    (row,) = [line for line in text if "finished" in line]
    assert " 4/4 " in row
    assert "recognised 0" in row
    assert listed(runs, "--sort=recognised")[0]["path"] == str(runs / "finished")
    steps = [run["step"] for run in listed(runs, "--sort=step", "--reverse")]
    assert steps == sorted(steps, reverse=True)
    ages = [run["written"] for run in listed(runs, "--sort=age")]
    assert ages == sorted(ages, reverse=True)


def test_a_run_that_goes_on_is_named_with_its_process(runs):
    folder = runs / "deep/stopped"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=-1, stdout=-1, text=True) as process:
        process.stdout.readline()
        (run,) = listed(folder)
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait()
    assert run["state"] == "running"
    assert run["why"].startswith(f"process {process.pid} on ")
    assert listed(folder)[0]["state"] == "stopped"
    with locked(folder):  # looking at a lock of one's own does not lose it
        assert holder(folder / LOCK) is not None
        assert subprocess.run([sys.executable, "-c", HOLD, folder], capture_output=True, input=b"").returncode == 1


@pytest.mark.slow
def test_as_a_user_and_without_torch(dic_repa, here, tmp_path):
    assert here("runs") == "no runs in runs yet; `dic-repa train RECIPE` makes one\n"
    dic_repa("train", "digits-urepa", *TINY, "--set=train.steps=2", "--set=evaluate=null", "--out=runs/a")
    script = "import sys; from dic_repa.cli import main\ntry: main(['runs'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    row = done.stdout.splitlines()[1].split()
    assert row[:3] == ["runs/a", "digits-urepa", "2/2"]
    assert row[-1] == "finished"
    assert done.stdout.splitlines()[-1] == "False"


def test_mistakes(mistake, tmp_path):
    assert "there is no folder elsewhere" in mistake("runs", "elsewhere")
    (tmp_path / "file").touch()
    assert "is a file" in mistake("runs", "file")
