"""What several tests need: the command line as a user runs it, and the fixtures' folder."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two test processes share two cores

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_samplers import write_tiny_checkpoint

from dic_repa.cli import main

DATA = Path(__file__).parent / "fixtures"

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


def pytest_configure(config):
    # Else the files of fewest tests come last, and the longest tests are often alone in theirs.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)  # so that no long test runs alone at the end
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
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        # torchrun takes --num for an abbreviation of its own options, unless a -- says where they end.
        module = ["-m", "--", "dic_repa"] if processes > 1 else ["-m", "dic_repa"]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*launcher, *module, *map(str, arguments)],
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
def in_process(tmp_path, monkeypatch, capsys):
    """Run `dic-repa ARGUMENTS` in this process, in an empty folder: exit code, standard output and error.

    As `dic_repa` does where a test needs no process of its own: the start of one costs seconds.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return exit.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture
def here(in_process):
    """Run `dic-repa ARGUMENTS` in this process, in an empty folder; returns what it prints."""

    def run(*arguments) -> str:
        code, output, error = in_process(*arguments)
        assert code == 0, output + error
        return output

    return run


@pytest.fixture
def mistake(in_process):
    """Call the command line's entry point with a mistake, in this process: exit code 2 and one line on standard error,
    which is returned."""

    def run(*arguments) -> str:
        code, _, error = in_process(*arguments)
        assert code == 2, error
        lines = [line for line in error.splitlines() if line.strip() and not line.startswith("training into ")]
        assert len(lines) == 1, error
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture
def plugin_folder(tmp_path, monkeypatch):
    """An empty current folder; what is imported from it, and what that registers, is forgotten afterwards."""
    from dic_repa.cli.parts import find_registries

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for registry in find_registries().values():
        registry.names()  # those of the package are there before
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if (file := getattr(module, "__file__", None)) and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An inference checkpoint of a small denoiser."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
