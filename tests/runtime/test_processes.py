"""Several processes on a machine without GPUs, as a launcher starts them."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from dic_repa.errors import UserError
from dic_repa.runtime import processes
from dic_repa.runtime.watchdog import TIMEOUT_CODE, watched

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there the processes join on the GPUs")


def test_processes_that_do_not_join_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    alone = SimpleNamespace(num_processes=1, device=torch.device("cuda"))
    monkeypatch.setattr(processes, "Accelerator", lambda **_: alone)
    with pytest.raises(UserError, match=r"3 processes were launched .* set ACCELERATE_USE_CPU=true"):
        processes.start_processes(timedelta(minutes=1))


def test_process_that_hangs_is_ended_with_a_line_and_time_inside_another_block_does_not_count(tmp_path):
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.dup2(os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT), 2)
            with watched("step", "step 3", 0.8):
                with watched("", "the feature cache", None):
                    time.sleep(1.5)
                (tmp_path / "passed").touch()
                time.sleep(60)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == TIMEOUT_CODE
    assert (tmp_path / "passed").exists()
    (line,) = (tmp_path / "said").read_text().strip().splitlines()
    assert line.startswith("error: process 0 has waited 1 s for step 3, longer than timeouts.step; what was saved is ")
