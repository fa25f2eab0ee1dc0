"""Several processes on a machine without GPUs, as a launcher starts them."""

from __future__ import annotations

import json
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from dic_repa.errors import UserError
from dic_repa.runtime import processes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there the processes join on the GPUs")


@pytest.mark.slow
def test_processes_of_torchrun_join_without_being_told_of_the_cpu(dic_repa, tmp_path):
    more = ["--set=train.steps=2", "--set=evaluate=null"]
    done = dic_repa("train", "digits-baseline", *TINY, *more, processes=2, env={"ACCELERATE_USE_CPU": "false"})
    assert done.stdout.count("trained 2 steps") == 1
    (session,) = json.loads((tmp_path / "runs/digits-baseline/environment.json").read_text())
    assert session["machine"]["processes"] == 2


def test_processes_that_do_not_join_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    alone = SimpleNamespace(num_processes=1, device=torch.device("cuda"))
    monkeypatch.setattr(processes, "Accelerator", lambda **_: alone)
    with pytest.raises(UserError, match=r"3 processes were launched .* set ACCELERATE_USE_CPU=true"):
        processes.start_processes(timedelta(minutes=1))
