"""Compiled by block: as eager, with one graph for each kind of block, and of the copy what is the copy's."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import distributed, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from dic_repa.alignment import AlignedDenoiser, Alignment
from dic_repa.errors import UserError
from dic_repa.models import compiled, create_denoiser, measure_cost
from dic_repa.models.adapters import add_adapters
from dic_repa.models.compiled import CompiledDenoiser, compile_blocks, find_blocks, training_mode
from dic_repa.models.derivative import total_derivative
from dic_repa.models.pretrained import Pretrained

DIC = {"width": 8, "depths": (2, 2, 2, 2, 2)}
SIT = {"width": 16, "depth": 3, "num_heads": 2}
UVIT = {"width": 16, "depth": 5, "num_heads": 2, "size": 8}
X, T, Y = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([3, 10])


@pytest.fixture
def graphs(monkeypatch):
    """What torch.compile has found to compile, which here runs as it is."""
    found = []

    def keep(graph, _inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    yield found
    compiled._compiled.cache_clear()
    torch._dynamo.reset()


def small(name: str, **options) -> Pretrained:
    torch.manual_seed(0)
    model = create_denoiser(name, 1, 10, **options)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def outputs_and_gradients(model: AlignedDenoiser) -> list[torch.Tensor]:
    out = model(X, T, Y)
    loss = out.prediction.square().mean() + out.projections[0].square().mean()
    return [out.prediction, out.projections[0], *torch.autograd.grad(loss, list(model.parameters()))]


# DiC has a kind of block for each width, and two more where a skip enters; U-ViT's second half takes skips.
@pytest.mark.parametrize(
    ("name", "options", "tap", "kinds"),
    [("DiC", DIC, "mid.0", 5), ("DiC", DIC, "mid.1.conv1", 5), ("SiT", SIT, "blocks.1", 1), ("U-ViT", UVIT, "mid", 2)],
)
def test_aligned_denoiser_is_as_eager(graphs, name, options, tap, kinds):
    denoiser = small(name, **options)
    model = AlignedDenoiser(denoiser, [Alignment.build(denoiser, tap, 6, (4, 4), (8, 8), hidden=8)])
    names = [*model.state_dict()]
    eager = outputs_and_gradients(model)
    compile_blocks(denoiser)
    torch.testing.assert_close(outputs_and_gradients(model), eager, rtol=1e-5, atol=1e-6)
    denoiser.set_gradient_checkpointing()
    torch.testing.assert_close(outputs_and_gradients(model), eager, rtol=1e-5, atol=1e-6)
    assert len(graphs) == kinds
    assert len(find_blocks(denoiser)) > kinds
    assert [*model.state_dict()] == names


@pytest.fixture
def sit(graphs):
    model = small("SiT", **SIT, two_times=True)
    compile_blocks(model)
    return model


def test_a_copy_computes_with_its_own_weights(sit):
    expected = sit(X, T, Y)
    copies = [copy.deepcopy(sit), pickle.loads(pickle.dumps(sit))]
    with torch.no_grad():
        for parameter in sit.parameters():
            parameter.zero_()
    for each in copies:
        torch.testing.assert_close(each(X, T, Y), expected)
        assert all(vars(block)["_forward"].module is block for block, _ in find_blocks(each))


def test_other_weights_shapes_and_derivatives(sit, graphs):
    plain = small("SiT", **SIT, two_times=True)
    doubled = {name: 2 * parameter for name, parameter in sit.named_parameters()}
    torch.testing.assert_close(functional_call(sit, doubled, (X, T, Y)), functional_call(plain, doubled, (X, T, Y)))
    seen = len(graphs)
    assert measure_cost(sit, 8).macs == measure_cost(plain, 8).macs
    times = torch.stack([T, T / 2], dim=1)
    torch.testing.assert_close(total_derivative(sit, X, times, Y, X), total_derivative(plain, X, times, Y, X))
    assert len(graphs) == seen  # neither was compiled for


def test_adapters_and_a_middle_head(graphs):
    model = small("SiT", **SIT, middle_head="blocks.0")
    add_adapters(model, ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.2.attn.qkv"], rank=2, alpha=2)
    model.train()
    expected = model(X, T, Y)
    compile_blocks(model)
    torch.testing.assert_close(model(X, T, Y), expected)
    assert len(graphs) == 2  # of the first block the input needs no gradient, since what is before it is frozen


def test_sampling_leaves_the_denoiser_as_it_is(graphs):
    model = small("SiT", **SIT)
    with torch.inference_mode():
        expected = model(X, T, Y)
        torch.testing.assert_close(CompiledDenoiser(model, "blocks")(X, T, Y), expected)
        assert len(graphs) == 1
        compiled._compiled.cache_clear()
        model(X[:1], T[:1], Y[:1])
    assert len(graphs) == 1
    assert not any("_forward" in vars(block) for block, _ in find_blocks(model))


class OfDiffusers(nn.Module):
    """A denoiser that holds a U-Net of diffusers."""

    def __init__(self):
        super().__init__()
        from diffusers import UNet2DModel

        sizes = {"block_out_channels": (8, 8), "layers_per_block": 2, "norm_num_groups": 4, "num_class_embeds": 11}
        names = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        self.network = UNet2DModel(8, 1, 1, **sizes, **names, add_attention=False)

    def forward(self, x, t, y):
        return self.network(x, t, y).sample


def test_blocks_of_diffusers(graphs):
    torch.manual_seed(0)
    model = OfDiffusers()
    expected = model(X, T, Y)
    compile_blocks(model)
    torch.testing.assert_close(model(X, T, Y), expected)
    assert len(find_blocks(model)) == 2 * 2 + 2 + 2 * 3
    assert 2 <= len(graphs) <= 6  # with and without a skip, at two sizes


def test_a_denoiser_without_blocks():
    with pytest.raises(UserError, match="Linear has no blocks that could be compiled one by one"):
        compile_blocks(nn.Linear(1, 1))


def test_blocks_are_compiled_by_themselves_on_a_gpu(monkeypatch):
    monkeypatch.setattr(compiled, "compiler_works", lambda device: True)
    model, gpu, cpu = small("DiC", **DIC), torch.device("cuda"), torch.device("cpu")
    assert training_mode("auto", model, gpu) == "blocks"
    assert training_mode("auto", model, cpu) is False
    assert training_mode("auto", nn.Linear(1, 1), gpu) is False
    assert training_mode(False, model, gpu) is False
    assert training_mode("reduce-overhead", model, cpu) == "reduce-overhead"


def test_where_the_compiler_fails_that_is_told_once(monkeypatch, capsys):
    def fail(graph, _inputs):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    compiled.compiler_works.cache_clear()
    assert not any(compiled.compiler_works(torch.device("cpu")) for _ in range(2))
    assert capsys.readouterr().err.count("Failed to find C compiler") == 1
    compiled.compiler_works.cache_clear()
    torch._dynamo.reset()


def test_ddp_cuts_no_block(graphs):
    """torch's own way cuts a graph where an exchange of gradients may begin, first after 1 MiB of them."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = small("SiT", width=256, depth=2, num_heads=2)
        assert sum(p.nbytes for p in model.blocks[0].parameters()) > 2**20
        compile_blocks(model)
        DistributedDataParallel(model, bucket_cap_mb=200, gradient_as_bucket_view=True)(X, T, Y).sum().backward()
    finally:
        distributed.destroy_process_group()
    assert len(graphs) == 1
