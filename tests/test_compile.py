"""`train.compile`: the compiled step is taken, and trains as the eager one does."""

from __future__ import annotations

import functools

import torch
from small_runs import ALIGNED, assert_same, small_run, weights


def test_compiled_run_follows_the_eager_one(tmp_path, monkeypatch):
    graphs = []

    def count(graph, _inputs):  # what dynamo found, run as it is: no minutes of code generation
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    keys = ["train.steps=3", "train.precision=no"]
    eager = small_run(tmp_path / "eager", *keys, base=ALIGNED)
    assert not graphs
    compiled = small_run(tmp_path / "compiled", *keys, "train.compile=true", base=ALIGNED)
    torch._dynamo.reset()
    convolutions = sum(str(node.target).count("conv2d") for graph in graphs for node in graph.graph.nodes)
    assert convolutions >= 14  # 5 blocks of 2, stem, resampling, output
    assert_same(weights(compiled.newest_checkpoint()), weights(eager.newest_checkpoint()), rtol=1e-4, atol=1e-5)
