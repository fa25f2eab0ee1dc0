"""Operations, bytes and least times against closed forms, and what they are compared with."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dic_repa.bench.peaks import COPIED, measure_bandwidth
from dic_repa.bench.roofline import FUSED, Operation, compare, measured_by_kind, record
from dic_repa.models import DiC, measure_cost
from dic_repa.models.blocks import Block
from dic_repa.models.compiled import CompiledDenoiser, compile_blocks
from dic_repa.models.sit import SiT

CPU, B = torch.device("cpu"), 3


@pytest.fixture(autouse=True)
def shapes_alone():
    with torch.device("meta"):
        yield


def activation(channels=8, side=16, dtype=torch.bfloat16):
    return torch.empty(B, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)


def sums(found):
    """kind: (calls, operations, bytes)."""
    kinds = dict.fromkeys(each.kind for each in found)
    return {
        kind: tuple(map(sum, zip(*((1, e.operations, e.read + e.written) for e in found if e.kind == kind))))
        for kind in kinds
    }


def test_single_operations_in_bf16():
    x, weight = activation(), torch.empty(16, 8, 3, 3, dtype=torch.bfloat16)
    pixels, (norm, wide) = B * 16 * 16, (torch.empty(8, dtype=torch.bfloat16), torch.empty(4, 8).bfloat16())
    a = 2 * 8 * pixels  # bytes of x
    (conv,) = record(lambda: F.conv2d(x, weight, padding=1), B)
    assert conv == Operation("3x3 convolutions", 2 * 9 * 8 * 16 * pixels, a + 2 * 9 * 8 * 16, 2 * a)
    (gelu,) = record(lambda: F.gelu(x), B)
    assert gelu == Operation("GELU and SiLU", 0, a, a)
    (found,) = record(lambda: F.group_norm(x, 2, norm, norm), B)
    assert (found.kind, found.operations, found.read) == ("norms", 0, a + 2 * 2 * 8)
    assert 0 <= found.written - a <= 2 * 4 * 2 * B  # mean and rstd of each group
    tall = torch.empty(100, 8, dtype=torch.bfloat16)
    (product,) = record(lambda: tall @ wide.T, B)
    assert product == Operation("matrix products", 2 * 100 * 8 * 4, 2 * (100 * 8 + 8 * 4), 2 * 100 * 4)
    assert record(lambda: x.permute(0, 2, 3, 1).flatten(1, 2)[:, 1:], B) == []  # views
    (summed,) = record(lambda: x + torch.empty(1, dtype=torch.bfloat16).expand(8)[:, None, None], B)
    assert summed.read == a + 2  # an expanded value is there once
    (copied,) = record(lambda: torch.empty_like(x).copy_(x), B)
    assert (copied.read, copied.written) == (a, a)


@pytest.mark.parametrize("grad", [torch.inference_mode, torch.enable_grad], ids=["inference", "training"])
def test_a_block(grad):
    block, x, c = Block(8, 8, 6).bfloat16(), activation(), torch.empty(B, 6, dtype=torch.bfloat16)
    with grad():
        found = sums(record(lambda: block(x, c), B))
    a, pixels = 2 * B * 8 * 16 * 16, B * 16 * 16
    calls, operations, size = found["3x3 convolutions"]
    assert (calls, operations) == (2, 2 * 2 * 9 * 8 * 8 * pixels)
    assert size == 2 * (2 * a + 2 * (9 * 8 * 8 + 8))
    assert found["GELU and SiLU"] == (2, 0, 4 * a)
    assert found["norms"][0] == 2
    vector = 2 * B * 8
    assert found["modulation, gates, sums"] == (2, 0, (2 * a + 2 * vector) + (3 * a + vector))  # two addcmul
    assert found["conditioning"][:2] == (2, 2 * B * 6 * 24)  # the linear layer, and 1 + scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: DiC(8, (1, 1, 1, 1, 1)), lambda: SiT(16, 1, 2)], ids=["DiC", "SiT"])
def test_sums_are_those_of_measure_cost_in_any_precision(make, dtype):
    model = make()
    expected = measure_cost(model, 8)
    model = model.to(dtype)
    assert measure_cost(model, 8) == expected
    inputs = activation(4, 8, dtype), torch.empty(B), torch.empty(B, dtype=torch.int64)
    with torch.no_grad():
        found = record(lambda: model(*inputs), B)
    assert sum(each.operations for each in found) == 2 * B * expected.macs


def test_a_backward_pass_is_two_and_compiled_is_counted_as_eager():
    model = DiC(8, (1, 1, 1, 1, 1))
    eager = measure_cost(model, 8)
    inputs = activation(4, 8, torch.float32), torch.empty(B), torch.empty(B, dtype=torch.int64)
    forward = sums(record(lambda: model(*inputs), B))["3x3 convolutions"]
    both = sums(record(lambda: model(*inputs).sum().backward(), B))["3x3 convolutions"]
    first = 2 * 9 * 4 * 8 * B * 64  # of the stem's, whose input needs no gradient
    assert both[1] == 3 * forward[1] - first
    compile_blocks(model)
    assert measure_cost(model, 8) == eager


def test_known_peaks_give_known_times():
    found = [
        Operation("3x3 convolutions", 2e9, 1000, 1000),  # 1 ms at 2 TFLOP/s
        Operation("matrix products", 1e9, 10**6, 10**6),  # 1 ms at 1 TFLOP/s; its bytes take 0.02 ms
        Operation("norms", 0, 10**8, 10**8),  # 2 ms at 100 GB/s
    ]
    seconds = {"norms": 0.005, "3x3 convolutions": 0.0011, "matrix products": 0.002, FUSED: 0.0005}
    result = compare(found, seconds, {"matrix": 1.0, "convolution": 2.0}, 100.0)
    assert [row["kind"] for row in result["rows"]] == ["norms", "matrix products", FUSED, "3x3 convolutions"]
    assert [row["limit_ms"] for row in result["rows"]] == pytest.approx([2, 1, 0, 1])
    assert result["rows"][0]["share"] == pytest.approx(0.4)
    assert (result["limit_ms"], result["ideal_ms"], result["measured_ms"]) == pytest.approx((4, 2, 8.6))
    assert "Farthest from its limit: norms, 3 ms lost" in result["words"]


def test_measured_kinds_are_those_that_are_counted(monkeypatch):
    monkeypatch.setitem(COPIED, "cpu", 1 << 22)
    with CPU, torch.inference_mode():
        model = DiC(8, (1, 1, 1, 1, 1), num_classes=5)
        inputs = torch.randn(B, 4, 16, 16), torch.rand(B), torch.tensor([0, 1, 5])
        counted = {each.kind for each in record(lambda: model(*inputs), B)}
        measured = measured_by_kind(lambda: model(*inputs), CPU, B)
        assert {*measured} - {FUSED} == counted
        assert all(seconds > 0 for seconds in measured.values())
        assert 0.1 < measure_bandwidth(CPU, rounds=1) < 1e5
        compiled = CompiledDenoiser(model, "blocks")
        assert {each.kind for each in record(lambda: compiled(*inputs), B)} == counted  # and nothing is compiled
