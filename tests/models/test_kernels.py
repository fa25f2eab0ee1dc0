"""Triton's kernels: their cases in an interpreter, compiled for GPUs that are not here, and when a block takes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dic_repa.conditions import ClassLabels
from dic_repa.models import DiC, kernel_choice
from dic_repa.models.blocks import Block
from dic_repa.models.kernel_choice import fits, set_kernels, use_kernels
from dic_repa.recipe import load_recipe
from dic_repa.recipe.build import build_denoiser

triton = pytest.importorskip("triton")
CASES = Path(__file__).with_name("kernel_cases.py")


def run_cases(**environment: str) -> None:
    """In a process of their own: Triton reads when it is imported whether it interprets."""
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(CASES)]
    ended = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
    assert "skipped" not in ended.stdout.splitlines()[-1]


@pytest.mark.slow
def test_kernels_in_an_interpreter():
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    run_cases()


@pytest.fixture(scope="module")
def kernels():
    """Each kernel with the types of its pointers and its constants, as `kernels.py` calls it for bf16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from dic_repa.models import triton_kernels

    tile = {"BLOCK_R": 32, "BLOCK_C": 128, "DOUBLE": False}
    group = {"GROUP": 12, "BLOCK_K": 4, "BLOCK_G": 16, "MODULATED": True, "DOUBLE": False}
    biased = {"BIASED": True}
    constants = {"coefficients": group | biased | {"EPS": 1e-5}, "gradient_coefficients": group, "gate": tile | biased}
    halves = {"x", "dy", "y", "dx", "h", "dh", "scale", "shift", "factor"}
    numbers = {"rows": "i32", "channels": "i32", "chunk_rows": "i32", "chunks": "i32", "step": "i32"}

    def build(name: str, capability: int):
        kernel, fixed = getattr(triton_kernels, name), constants.get(name, tile)
        types, aligned = {}, {}
        for i, argument in enumerate(kernel.arg_names):
            pointer = "*bf16" if argument in halves else "*fp32"
            types[argument] = "constexpr" if argument in fixed else numbers.get(argument, pointer)
            if types[argument] == pointer or argument == "channels":
                aligned[(i,)] = [["tt.divisibility", 16]]
        return compile_kernel(ASTSource(kernel, types, fixed, aligned), target=GPUTarget("cuda", capability, 32))

    return build


NAMES = (
    "statistics", "coefficients", "apply_gelu", "gradient_sums", "gradient_coefficients", "gradient_of_input", "gate",
    "gate_gradients",
)  # fmt: skip


@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3), reason="compiles by other words")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile_for_gpus(kernels, name, capability):
    """With the compilers that Triton brings, which need no GPU: 16 bytes at once from feature maps."""
    built = kernels(name, capability)
    assert len(built.asm["cubin"]) > 1000
    assert ("ld.global.v4" in built.asm["ptx"]) == ("coefficients" not in name)
    assert built.metadata.shared < 48 * 1024


@pytest.fixture
def block(monkeypatch):
    """A block on what says it is a GPU that has kernels."""
    monkeypatch.setattr(kernel_choice, "fits", lambda x: True)
    monkeypatch.setattr(kernel_choice, "kernels_work", lambda device: True)
    return Block(8, 8, 8)


def test_a_block_takes_kernels(block):
    assert use_kernels(block, torch.zeros(1, 8, 4, 4))
    set_kernels(block, "off")
    assert not use_kernels(block, torch.zeros(1, 8, 4, 4))


def test_a_block_with_taps_adapters_or_transforms_takes_none(block):
    x = torch.zeros(1, 8, 4, 4)
    hook = block.conv1.register_forward_hook(lambda *_: None)
    assert not use_kernels(block, x)
    hook.remove()
    inside = []
    torch.func.jvp(lambda x: (inside.append(use_kernels(block, x)), x.sin())[1], (x,), (x,))
    assert inside == [False]
    assert use_kernels(block, x)
    block.conv1 = nn.Sequential(block.conv1)
    assert not use_kernels(block, x)


def test_kernels_need_a_gpu(capsys):
    x = torch.zeros(8, 256, 32, 32).contiguous(memory_format=torch.channels_last)
    assert x.numel() >= kernel_choice.FEWEST
    assert not fits(x)
    if not torch.cuda.is_available():
        kernel_choice._tried.cache_clear()
        assert not any(kernel_choice.kernels_work(0) for _ in range(2))
        assert capsys.readouterr().err.count("Triton's kernels do not work on cuda:0") == 1


@pytest.mark.parametrize(("words", "on"), [((), True), (("model.kernels=off",), False)])
def test_a_recipe_turns_them_off(words, on):
    recipe = load_recipe("digits-urepa", ["model.width=8", "model.depths=[1,1,1,1,1]", *words])
    denoiser = build_denoiser(recipe.model, 1, ClassLabels(10))
    assert isinstance(denoiser, DiC)
    assert {block.kernels for block in denoiser.blocks()} == {on}
    assert "kernels" not in denoiser.config
