"""The denoiser keeps to one layout from end to end: in channels_last no activation is copied to change its layout.

Fake tensors tell the layouts that a GPU's operations give, with no GPU. What is seen are the calls that this release of
torch dispatches: inside an operation it may copy still, as the CUDA kernel of GroupNorm does in every release up to
2.14.1, which makes its input contiguous and leaves its output so.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dic_repa.models import DiC
from dic_repa.models.layers import pixel_shuffle

_COPIES = {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous"}
BATCH, SIDE, WIDTH = 8, 16, 16
SMALLEST = BATCH * 4 * WIDTH * (SIDE // 4) ** 2  # an activation of the middle stage


class Watch(TorchDispatchMode):
    """Notes each copy of at least `size` elements, and each feature map or kernel that is not in `layout`."""

    def __init__(self, size=SMALLEST, layout=torch.channels_last):
        super().__init__()
        self.size, self.layout, self.copies, self.elsewhere = size, layout, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name in _COPIES and out.numel() >= self.size:
            self.copies.append((name, tuple(out.shape)))
        if name in ("aten::convolution", "aten::native_group_norm", "aten::cat"):
            taken = args[0] if name == "aten::cat" else args[:2]
            for x in taken:
                if isinstance(x, torch.Tensor) and x.ndim == 4 and not x.is_contiguous(memory_format=self.layout):
                    self.elsewhere.append((name, tuple(x.shape)))
        return out


def inputs(layout=torch.channels_last):
    x = torch.empty(BATCH, 4, SIDE, SIDE).contiguous(memory_format=layout)
    return x, torch.zeros(BATCH), torch.zeros(BATCH, dtype=torch.int64)


@pytest.fixture
def model():
    return DiC(width=WIDTH, depths=(2, 2, 2, 2, 2), num_classes=3)


@pytest.mark.parametrize("train", [False, True])
def test_on_a_cpu(model, train):
    given = inputs()
    with torch.set_grad_enabled(train), Watch() as watch:
        out = model(*given)
        if train:
            out.square().sum().backward()
    assert (watch.copies, watch.elsewhere) == ([], [])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("given", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_contiguous_weights_make_all_contiguous(model, given, train):
    model.to(memory_format=torch.contiguous_format)
    with torch.set_grad_enabled(train), Watch(layout=torch.contiguous_format) as watch:
        out = model(*inputs(given))
        if train:
            out.square().sum().backward()
    assert watch.elsewhere == []


def fakes_a_gpu() -> bool:
    """Whether fake tensors can be on a GPU that is not there: torch 2.6 asks for its driver."""
    try:
        with FakeTensorMode(), torch.device("cuda"):
            torch.empty(1, 2, 2, 2).contiguous(memory_format=torch.channels_last)
    except (RuntimeError, AssertionError):
        return False
    return True


needs_fakes = pytest.mark.skipif(not fakes_a_gpu(), reason="this release's fake tensors on a GPU need one")


def on_a_gpu(model, inputs, layout):
    weights = model.state_dict()
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        state = {name: torch.empty_strided(w.shape, w.stride()) for name, w in weights.items()}
        given = inputs()
        with Watch(layout=layout) as watch:
            torch.func.functional_call(model, state, given)
    return watch


@needs_fakes
def test_contiguous_weights_make_all_contiguous_on_a_gpu(model):
    model.to(memory_format=torch.contiguous_format)
    assert on_a_gpu(model, inputs, torch.contiguous_format).elsewhere == []


@needs_fakes
@pytest.mark.skipif(torch.__version__ < (2, 15), reason="CUDA's GroupNorm leaves channels_last before torch 2.15.0")
def test_on_a_gpu(model):
    watch = on_a_gpu(model, inputs, torch.channels_last)
    assert watch.elsewhere == []
    shuffled = [(BATCH, SIDE // 2, SIDE // 2, 2 * WIDTH), (BATCH, SIDE, SIDE, WIDTH)]
    # Shuffling is a copy by nature: as large as its result, one for each level.
    assert sorted(torch.Size(shape).numel() for _, shape in watch.copies) == sorted(
        torch.Size(shape).numel() for shape in shuffled
    )


def test_pixel_shuffle_is_torchs():
    class OnGPU(torch.Tensor):  # takes the path of a GPU
        is_cuda = True

    x = torch.randn(2, 12, 3, 5).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pixel_shuffle(x.as_subclass(OnGPU)).as_subclass(torch.Tensor), F.pixel_shuffle(x, 2))


def test_a_copy_is_noticed():
    with Watch(size=16) as watch:
        torch.randn(2, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    assert watch.copies == [("aten::clone", (2, 4, 4, 4))]
