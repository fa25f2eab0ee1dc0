"""What happens on a GPU alone: second streams, CUDA graphs, events. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from oracle import OracleDiC
from small_samplers import images, small_sampler

from dic_repa.bench.timing import interleave
from dic_repa.models import DiC
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.sampling.sampler import decode_batches

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_float32():
    with gpu_arithmetic(tf32=False):  # TF32, which torch lets convolutions use by default, is good for three digits
        yield


def on_gpu(sampler):
    sampler.denoiser.to("cuda")
    return sampler


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_and_graphed_sampling_gives_the_eager_images(mode):
    compiled = images(on_gpu(small_sampler(compile=mode)))
    torch.testing.assert_close(compiled, images(on_gpu(small_sampler())), rtol=1e-3, atol=1e-3)


def test_decoding_beside_the_next_batch_gives_each_batch_in_order():
    work = torch.randn(2048, 2048, device="cuda")

    def samples():
        for k in range(4):
            for _ in range(20):
                work @ work  # so that the next batch is under way while this one is decoded
            yield torch.full((1000,), float(k), device="cuda")

    decoded = list(decode_batches(samples(), lambda x: x + 1))
    assert [batch.unique().tolist() for batch in decoded] == [[1.0], [2.0], [3.0], [4.0]]
    assert not any(batch.is_cuda for batch in decoded)


def test_the_oracle_on_the_gpu():
    torch.manual_seed(0)
    model = DiC(16, (2, 2, 2, 2, 2), num_classes=5).cuda()
    torch.nn.init.normal_(model.output.conv2.weight, std=0.1)
    arguments = torch.randn(2, 4, 16, 16).cuda(), torch.rand(2).cuda(), torch.tensor([1, 5]).cuda()
    with torch.no_grad():
        expected = OracleDiC(model)(*arguments)
        for call in (model, torch.compile(model)):
            assert (call(*arguments) - expected).norm() <= 1e-4 * expected.norm()


def test_timing_waits_for_the_device():
    x = torch.randn(4096, 4096, device="cuda")
    (timing,) = interleave([lambda: x @ x], rounds=3, seconds=0.0)
    assert timing.median > 2 * 4096**3 / 2e15  # faster than any GPU: only the launches would have been timed
