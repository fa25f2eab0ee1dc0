"""A training step waits for the device at log steps only."""

from __future__ import annotations

import collections
import functools
import traceback
from pathlib import Path

import pytest
import timm  # noqa: F401 - before a test watches torch: in torch 2.6 what it imports cannot be watched
import torch
from small_runs import ALIGNED, small_recipe, small_run

WAITING = ("item", "cpu", "numpy", "tolist", "__bool__", "__float__", "__int__", "__index__")


def values_read(monkeypatch, run) -> collections.Counter:
    """How often each file of the package reads a tensor's value while `run` runs."""
    readers = collections.Counter()
    with monkeypatch.context() as patch:
        for name in WAITING:
            original = getattr(torch.Tensor, name)

            def read(tensor, *arguments, original=original, **options):
                files = [Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
                ours = [file.name for file in files if "dic_repa" in file.parts and "tests" not in file.parts]
                readers[ours[-1] if ours else ""] += 1
                return original(tensor, *arguments, **options)

            patch.setattr(torch.Tensor, name, read)
        run()
    return readers


def test_no_value_is_read_between_log_steps(tmp_path, monkeypatch):
    """The longer run reads no more than the shorter, since both log once."""
    keys = ["train.log_every=100", "train.checkpoint_every=100", "data.workers=0"]

    def counted(steps: int) -> collections.Counter:
        run = functools.partial(small_run, tmp_path / str(steps), *keys, f"train.steps={steps}", base=ALIGNED)
        return values_read(monkeypatch, run)

    short, long = counted(2), counted(6)
    assert short["log.py"] > 0  # the log's line: this test sees what there is to see
    more = {name: long[name] - short[name] for name in long if long[name] > short[name]}
    # On a CPU, where nothing is waited for, the guard looks at once; on a GPU at values that have long been there.
    assert more.pop("step.py") == 4  # once in each of the longer run's further steps
    assert set(more) <= {"digits.py"}, more


@pytest.mark.gpu
def test_no_synchronisation_between_log_steps(tmp_path):
    """The same as the driver sees it: torch raises where the host would wait for the device."""
    from dic_repa.bench.train import TrainCase, build_step

    recipe = small_recipe("train.batch_size=4", base=ALIGNED)
    parts, accelerator = build_step(recipe, torch.device("cuda"))
    case = TrainCase("", recipe, parts, accelerator)
    for _ in range(3):
        case()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            case()
    finally:
        torch.cuda.set_sync_debug_mode("default")
