"""What several tests need: the command line as a user runs it, and the fixtures' folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent / "data"

# A run that ends in seconds: the digits recipe with a smaller model and few steps.
TINY = [
    "--set=model.width=8",
    "--set=model.depths=[1,1,1,1,1]",
    "--set=train.batch_size=8",
    "--set=train.log_every=2",
    "--set=train.sample_every=0",
    "--set=sample.steps=2",
    "--set=sample.num=20",
]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def dic_repa(tmp_path):
    """Run `dic-repa ARGUMENTS` in a subprocess, in an empty folder; returns the finished process."""

    def run(*arguments, processes: int = 1, check: bool = True, **options) -> subprocess.CompletedProcess:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*launcher, "-m", "dic_repa", *map(str, arguments)],
            cwd=tmp_path,
            env=environment | options.pop("env", {}),
            capture_output=True,
            text=True,
            timeout=300,
            **options,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def mistake(dic_repa):
    """Run a command that must fail: exit code 2, one line on standard error, which is returned."""

    def run(*arguments, **options) -> str:
        done = dic_repa(*arguments, check=False, **options)
        assert done.returncode == 2, done.stdout + done.stderr
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    return run
