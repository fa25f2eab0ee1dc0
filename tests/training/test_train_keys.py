"""Keys that change how a step is computed, but not what: compile, gradient checkpointing, mixed precision, TF32."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from small_runs import ALIGNED, assert_same, metrics, small_run, weights
from torch import nn

from dic_repa.encoders import create_encoder
from dic_repa.models import compiled
from dic_repa.models.blocks import Block
from dic_repa.training.parts import cast_weights

KEYS = ["train.steps=3", "train.precision=no"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("plain") / "run", *KEYS, base=ALIGNED)


def test_compiled_run_follows_the_eager_one(tmp_path, monkeypatch, plain):
    graphs = []

    def count(graph, _inputs):  # what dynamo found, run as it is: no minutes of code generation
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    run = small_run(tmp_path / "compiled", *KEYS, "train.compile=true", base=ALIGNED)
    torch._dynamo.reset()
    convolutions = sum(str(node.target).count("conv2d") for graph in graphs for node in graph.graph.nodes)
    assert convolutions >= 14  # 5 blocks of 2, stem, resampling, output
    assert_same(weights(run.newest_checkpoint()), weights(plain.newest_checkpoint()), rtol=1e-4, atol=1e-5)


def test_run_compiled_by_block_follows_the_eager_one_and_resumes(tmp_path, monkeypatch, plain, capsys):
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    compiled._compiled.cache_clear()
    keys = [*KEYS, "train.compile=blocks", "train.checkpoint_every=2", "train.keep_checkpoints=5"]
    run = small_run(tmp_path / "run", *keys, base=ALIGNED)
    expected = weights(run.newest_checkpoint())
    assert len(graphs) == 5  # one for each of its five blocks, which are of five kinds
    assert "compiled: the first step's gradients took" in capsys.readouterr().err
    assert_same(expected, weights(plain.newest_checkpoint()), rtol=1e-6, atol=1e-7)
    shutil.rmtree(run.newest_checkpoint())
    resumed = small_run(tmp_path / "run", *keys, base=ALIGNED, resume=True)
    assert_same(weights(resumed.newest_checkpoint()), expected, rtol=0, atol=0)
    compiled._compiled.cache_clear()
    torch._dynamo.reset()


def test_gradient_checkpointing_changes_nothing(tmp_path, monkeypatch, plain):
    runs = []
    forward = Block._forward
    monkeypatch.setattr(Block, "_forward", lambda *inputs: runs.append(torch.is_grad_enabled()) or forward(*inputs))
    run = small_run(tmp_path / "run", *KEYS, "train.gradient_checkpointing=true", base=ALIGNED)
    assert sum(runs) == 2 * 3 * 5  # each of 5 blocks in each of 3 steps forwards, and again on the way back
    assert_same(weights(run.newest_checkpoint()), weights(plain.newest_checkpoint()), rtol=1e-6, atol=1e-7)


def test_bf16_computes_in_half_and_keeps_whole_weights(tmp_path, monkeypatch, plain):
    seen = set()
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: _note(seen, forward(self, x)))
    run = small_run(tmp_path / "run", *KEYS[:1], "train.precision=bf16", base=ALIGNED)
    assert torch.bfloat16 in seen
    ours, theirs = metrics(run), metrics(plain)
    for a, b in zip(ours, theirs):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    assert {tensor.dtype for name, tensor in weights(run.newest_checkpoint()).items()} == {torch.float32}


def _note(seen: set, output: torch.Tensor) -> torch.Tensor:
    seen.add(output.dtype)
    return output


def test_weights_cast_once_give_the_same_tokens_as_autocast():
    encoder = create_encoder("timm:vit_tiny_patch16_224", pretrained=False)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = encoder(images)
        cast_weights(encoder, "bf16")
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=0)
    assert encoder.model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert encoder.model.blocks[0].norm1.weight.dtype == torch.float32


def test_weights_that_a_layer_normalises_are_not_cast():
    encoder = create_encoder("timm:test_nfnet", pretrained=False)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = encoder(images)
        cast_weights(encoder, "bf16")
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=0)
