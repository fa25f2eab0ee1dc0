"""Ctrl-C at any moment of a command: one line that says what is kept and how to go on, and exit code 130."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import TINY
from pictures import write_tree

from dic_repa.cli import main
from dic_repa.errors import Interrupted, when_interrupted
from dic_repa.models import DiC
from dic_repa.recipe import load_recipe, to_yaml


def interrupted(folder, arguments, when, **environment) -> tuple[str, int]:
    """The standard error and exit code of `dic-repa ARGUMENTS` that gets a SIGINT once `when()` is true."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    # Of a parent in the background a child inherits that Ctrl-C is ignored.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, "-m", "dic_repa", *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed,
    )  # fmt: skip
    while process.poll() is None and not when():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert "Traceback" not in stderr
    assert stderr.count("interrupted") == 1, stderr
    return stderr.splitlines()[-1], process.returncode


@pytest.fixture
def stand_in(tmp_path):
    """A module of mine in the place of one that is imported, for a moment that is long enough to be hit."""

    def write(module: str, text: str) -> dict[str, str]:
        (tmp_path / "modules").mkdir()
        (tmp_path / f"modules/{module}.py").write_text(text)
        return {"PYTHONPATH": str(tmp_path / "modules")}

    return write


HERE = "open('here', 'w').close()"


@pytest.mark.parametrize("module", ["click", "torch"])
def test_while_modules_are_imported(tmp_path, stand_in, module):
    slow = stand_in(module, f"import time\n{HERE}\ntime.sleep(20)\n")
    line, code = interrupted(tmp_path, ["train", "digits-urepa"], (tmp_path / "here").exists, **slow)
    assert line.startswith("interrupted")
    assert line.endswith("nothing was written")
    assert code == 130


def test_where_python_drops_exceptions(tmp_path, stand_in):
    """In a destructor, say; it would go on as if nothing had been asked for."""
    dropping = "import time\nclass Dropped:\n    def __del__(self):\n        " + HERE + "\n        time.sleep(20)\n"
    slow = stand_in("torch", f"{dropping}Dropped()\ntime.sleep(20)\n")
    line, code = interrupted(tmp_path, ["train", "digits-urepa"], (tmp_path / "here").exists, **slow)
    assert line == "interrupted before the run began; nothing was written"
    assert code == 130


def test_while_a_process_ends(tmp_path, stand_in):
    """After the work, in what modules have left to be done at the exit."""
    slow = stand_in("tqdm", f"import atexit, time\ntqdm = None\natexit.register(lambda: ({HERE}, time.sleep(20)))\n")
    line, code = interrupted(tmp_path, ["recipes"], (tmp_path / "here").exists, **slow)
    assert line == "interrupted at the end; all is written"
    assert code == 130


@pytest.mark.slow
def test_while_training(tmp_path):
    arguments = ["train", "digits-baseline", "--out=run", *TINY, "--set=train.steps=100000"]
    line, code = interrupted(tmp_path, arguments, (tmp_path / "run/metrics.jsonl").exists)
    assert line == "interrupted; there is no checkpoint yet; to go on: dic-repa train --resume run"
    assert code == 130


def test_while_preparing(tmp_path):
    write_tree(tmp_path / "pictures", {"a": 60}, size=(200, 200))
    arguments = ["prepare", "pictures", "out", "--size=192", "--autoencoder=none", "--shard-size=1", "--batch-size=1"]
    line, code = interrupted(tmp_path, arguments, lambda: any(tmp_path.glob("out/*.arrow")))
    assert line == "interrupted; the finished shards are in out, and the same command goes on with the others"
    assert code == 130


@pytest.fixture
def model(tmp_path):
    """An inference checkpoint of a small denoiser, as a run's with a judge."""
    DiC(8, (1, 1, 1, 1, 1), in_channels=1, num_classes=10).save_pretrained(tmp_path / "model")
    (tmp_path / "model/recipe.yaml").write_text(to_yaml(load_recipe("digits-baseline", ["sample.solver=euler"])))


def test_while_sampling(tmp_path, model):
    arguments = ["sample", "model", "--out=out", "--num=100000", "--steps=1", "--batch-size=10"]
    line, code = interrupted(tmp_path, arguments, lambda: len(list(tmp_path.glob("out/0*.png"))) > 9)
    assert re.fullmatch(
        r"interrupted; \d+ of 100000 images are in out, and the same command goes on with the others", line
    )
    assert code == 130


@pytest.mark.slow
def test_while_tuning(tmp_path, model):
    arguments = ["tune", "model", "--out=out", "--num=10", "--confirm=1", "--confirm-num=100000", "--steps=1"]
    line, code = interrupted(tmp_path, arguments, (tmp_path / "out/tune.png").exists)
    assert line == "interrupted; the finished cells are in out/tune.json, and the same command goes on with the others"
    assert code == 130


def test_what_is_nearest_to_the_work_is_told(monkeypatch, capsys):
    with (
        pytest.raises(Interrupted, match="inner"),
        when_interrupted(lambda: "outer"),
        when_interrupted(lambda: "inner"),
    ):
        raise KeyboardInterrupt
    for raised, line in (
        (Interrupted("what is kept"), "what is kept"),
        (KeyboardInterrupt(), "interrupted; nothing was written"),
    ):

        def read(*_, raised=raised):
            raise raised

        monkeypatch.setattr("dic_repa.cli.recipes.list_recipes", read)
        with pytest.raises(SystemExit) as exit:
            main(["recipes"])
        assert exit.value.code == 130
        assert capsys.readouterr().err.strip() == line
