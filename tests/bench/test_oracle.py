"""Every path through the denoiser against the oracle: outputs and gradients to 1e-4."""

from __future__ import annotations

import pytest
import torch
from conftest import DATA
from oracle import OracleDiC, PlainDiC
from oracle_pairs import assert_close, inputs, outputs_and_gradients, pair
from safetensors.torch import load_file

from dic_repa.models import load_authors_checkpoint
from dic_repa.samplers import Guidance, sample_ode


def test_oracle_gives_the_authors_output():
    """The oracle itself stands on the authors' reference values."""
    reference = load_file(DATA / "authors_dic_tiny_io.safetensors")
    oracle = OracleDiC(load_authors_checkpoint(DATA / "authors_dic_tiny.safetensors"))
    with torch.no_grad():
        out = oracle(reference["x"], reference["t"], reference["y"])
    assert (out - reference["out"]).norm() <= 1e-5 * reference["out"].norm()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_eager_paths(layout, checkpointing):
    model, oracle = pair(gradient_checkpointing=checkpointing)
    model.to(memory_format=layout)
    kept = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _m, given: kept.append(given[0].is_contiguous(memory_format=layout))
            )
    expected = outputs_and_gradients(oracle, oracle, inputs())
    assert_close(outputs_and_gradients(model, model, inputs()), expected)
    assert kept
    assert all(kept)


def test_plain_model_is_the_oracle_with_torchs_group_norm():
    plain, oracle = pair(PlainDiC)[1], pair()[1]
    assert_close(outputs_and_gradients(plain, plain, inputs()), outputs_and_gradients(oracle, oracle, inputs()))


def test_a_time_that_the_batch_shares_is_embedded_once():
    model, oracle = pair()
    x, _, y = inputs()
    shared = torch.tensor(0.3).expand(3)  # as samplers give it
    rows = []
    model.condition[0].time1.register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    expected = outputs_and_gradients(oracle, oracle, (x, torch.full((3,), 0.3), y))
    assert_close(outputs_and_gradients(model, model, (x, shared, y)), expected)
    sample_ode(Guidance(2.0, (0.0, 1.0)).bind(model, y), x, "euler", 1)
    assert rows == [1, 1]


@pytest.mark.slow
def test_traced_whole():
    """As torch.compile traces and differentiates it; generating code for the whole would take minutes."""
    model, oracle = pair(depths=(2, 1, 1, 1, 2))
    compiled = torch.compile(model, backend="aot_eager")
    expected = outputs_and_gradients(oracle, oracle, inputs())
    assert_close(outputs_and_gradients(compiled, model, inputs()), expected)


def test_compiled_block():
    """Generated code, forward and backward, for one block: what a compiled model consists of."""
    model, oracle = pair()
    x = torch.randn(2, 64, 4, 4).contiguous(memory_format=torch.channels_last)
    c = torch.randn(2, 64)

    def outputs_and_gradients_of_block(call, block):
        out = call(x, c)
        out.square().mean().backward()
        return {"output": out.detach()} | {name: parameter.grad for name, parameter in block.named_parameters()}

    expected = outputs_and_gradients_of_block(oracle.mid[0], oracle.mid[0])
    assert_close(outputs_and_gradients_of_block(torch.compile(model.mid[0]), model.mid[0]), expected)


def test_half_precision_is_within_its_rounding():
    model, oracle = pair()
    with torch.no_grad():
        expected = oracle(*inputs())
        x, t, y = inputs()
        out = model.bfloat16()(x.bfloat16(), t, y).float()
    assert (out - expected).norm() <= 0.03 * expected.norm()  # bfloat16 has 8 bits: 0.4 % an operation
