"""The script for a GPU, as far as a CPU goes: its steps run, and its comparison of gradients sees a wrong one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from places import SCRIPTS

SMALL = ["model.width=8", "model.depths=[1,1,1,1,1]", "alignments.0.head_options.hidden=16"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    spec = importlib.util.spec_from_file_location("train_dic_xl", SCRIPTS / "train_dic_xl_gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_steps_and_gradients(script):
    device = torch.device("cpu")
    cases = [script.build_case("digits-urepa", SMALL, "fp32", 4, script.PLAIN, device) for _ in range(2)]
    found = script.measure(cases[0], 2, device)
    assert found["losses_finite"]
    assert found["images_per_second"] > 0
    assert sum(found["shares"].values()) == pytest.approx(1, abs=0.01)
    assert {"encoder", "alignment"} <= {name for name, share in found["shares"].items() if share > 0}
    gradients = script.gradients(cases[1])
    assert all(gradient.any() for name, gradient in gradients.items() if "conv" in name and name.endswith("weight"))
    assert script.worst_difference(gradients, gradients)[0] == 0
    name = next(iter(gradients))
    wrong = gradients | {name: gradients[name] * 1.01}
    assert script.worst_difference(wrong, gradients) == (pytest.approx(0.01, rel=1e-3), name)
