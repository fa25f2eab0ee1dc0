"""The training loop's promises: what is drawn, what a run leaves behind, what Ctrl-C and damaged metadata cost."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from dic_repa.errors import UserError
from dic_repa.models import DiC
from dic_repa.recipe import load_recipe
from dic_repa.runs.folder import RunFolder
from dic_repa.training.ema import EMA
from dic_repa.training.inputs import check_batch, data_order, process_rows, step_generator

ALIGNED = [*TINY, "--set=evaluate=null", "--set=train.steps=8", "--set=train.checkpoint_every=4"]


def weights(run, step=8):
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "ema" / "model.safetensors")}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_data_order_is_one_stream_of_permutations():
    stream = data_order(seed=3, count=10, batch_size=4)
    seen = [index for _ in range(5) for index in next(stream)]
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    resumed = data_order(seed=3, count=10, batch_size=4, start_step=3)
    assert next(resumed) == seen[12:16]
    assert next(data_order(seed=4, count=10, batch_size=4)) != seen[:4]
    assert sorted(next(data_order(seed=0, count=3, batch_size=6))) == [0, 0, 1, 1, 2, 2]


def test_randomness_depends_on_seed_and_step_alone():
    def draw(seed, step):
        return torch.rand(4, generator=step_generator(seed, step))

    torch.testing.assert_close(draw(0, 5), draw(0, 5), rtol=0, atol=0)
    assert not torch.equal(draw(0, 5), draw(0, 6))
    assert not torch.equal(draw(0, 5), draw(1, 5))
    rows = [list(range(12))[process_rows(12, process, 3)] for process in range(3)]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_ema_is_the_recurrence():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    expected = model.weight.detach().clone()
    for _ in range(5):
        torch.nn.init.normal_(model.weight)
        ema.update(model)
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected)
    assert not ema.model.weight.requires_grad


def test_batch_that_does_not_divide_is_refused():
    settings = load_recipe("digits-urepa", ["train.micro_batch=16"]).train
    assert check_batch(settings, 2) == 2
    with pytest.raises(UserError, match="batch_size 64 does not divide among 3 processes"):
        check_batch(settings, 3)
    assert check_batch(settings, 8) == 1  # 8 images at once are at most 16
    settings = load_recipe("digits-urepa", ["train.batch_size=96", "train.micro_batch=32"]).train
    with pytest.raises(UserError, match="micro_batch 32 does not divide the 48 images"):
        check_batch(settings, 2)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run of eight aligned steps."""
    folder = tmp_path_factory.mktemp("whole")
    start(folder, "whole").communicate(timeout=300)
    return folder / "whole"


def start(folder, name, *arguments, **environment):
    command = [sys.executable, "-m", "dic_repa", "train", "digits-urepa", "--out", name, *ALIGNED, *arguments]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    # Of a parent in the background a child inherits that Ctrl-C is ignored.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed)


def test_run_folder_has_all_that_ran(whole_run):
    recipe = load_recipe(whole_run / "recipe.yaml")
    assert recipe.train.steps == 8
    session = json.loads((whole_run / "environment.json").read_text())[0]
    assert session["packages"]["torch"]
    assert "git" in session
    assert [record["step"] for record in metrics(whole_run)] == [2, 4, 6, 8]
    assert {"loss", "denoising", "alignment.0.token", "alignment.0.manifold"} <= set(metrics(whole_run)[0])
    assert sorted(p.name for p in (whole_run / "checkpoints").iterdir()) == ["step_00000004", "step_00000008"]
    assert (whole_run / "curves.png").stat().st_size > 5000
    denoiser = DiC.from_pretrained(whole_run / "checkpoints/step_00000008/ema")
    assert denoiser.config["width"] == 8


def test_loss_is_what_it_says(whole_run):
    section = load_recipe("digits-urepa").alignments[0]
    for record in metrics(whole_run):
        aligned = record["alignment.0.token"] + section.manifold_weight * record["alignment.0.manifold"]
        assert record["loss"] == pytest.approx(record["denoising"] + section.weight * aligned, rel=1e-5)


@pytest.mark.slow
def test_damaged_metadata_does_not_keep_a_run_from_going_on(tmp_path, whole_run, here):
    run = RunFolder(shutil.copytree(whole_run, tmp_path / "run"))
    (run.path / "environment.json").write_text('[{"comm')
    (run.checkpoints / "step_00000009.bak").mkdir()
    here("train", "digits-urepa", "--out", "run", *ALIGNED, "--resume", "--set=train.steps=10")
    assert run.newest_checkpoint().name == "step_00000010"
    run.recipe_file.write_text("")
    with pytest.raises(UserError, match=r"recipe\.yaml is not a recipe"):
        run.recipe()


def test_a_mistake_in_two_processes_is_one_line(dic_repa, whole_run):
    done = dic_repa("train", "digits-urepa", "--out", whole_run, *ALIGNED, processes=2, check=False)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {whole_run} exists; pass --resume to go on with it, or --overwrite to begin anew"
    ]
    assert "gloo" not in done.stderr


def test_the_line_of_a_slow_process_is_out_before_a_launcher_stops_it(dic_repa, tmp_path):
    """A launcher stops all processes once one has ended; here the one that prints is late by half a second."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/sitecustomize.py").write_text(
        "import os, time\n"
        "if os.environ.get('LOCAL_RANK') == '0':\n"
        "    import click\n"
        "    echo = click.echo\n"
        "    click.echo = lambda *args, **options: (time.sleep(0.5), echo(*args, **options))\n"
    )
    environment = {"PYTHONPATH": str(tmp_path / "modules")}
    done = dic_repa("train", "digits-urep", processes=2, check=False, env=environment)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: unknown recipe 'digits-urep'; did you mean digits-urepa")


@pytest.mark.slow
def test_ctrl_c_keeps_the_checkpoint_and_says_how_to_go_on(tmp_path, here):
    process = start(tmp_path, "stopped", "--set=train.steps=100000")
    newest = tmp_path / "stopped/checkpoints/step_00000004"
    while not newest.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    said, _, command = stderr.splitlines()[-1].partition("; to go on: ")
    assert said.startswith("interrupted; the checkpoint of step ")
    assert command == "dic-repa train --resume stopped"
    step = int(RunFolder(tmp_path / "stopped").newest_checkpoint().name[5:])
    here(*command.split()[1:], f"--set=train.steps={step + 2}")
