"""Every way to hold an `Aligner` wrong is one line; and which taps are suggested."""

from __future__ import annotations

import pytest
import torch
from aligner_steps import ENCODER, EXAMPLE, Net, aligner_of
from torch import nn

from dic_repa import Aligner
from dic_repa.alignment import suggest_taps
from dic_repa.errors import UserError
from dic_repa.models import create_denoiser


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_mistakes_in_a_step(net):
    images, t = torch.rand(2, 1, 16, 16), torch.rand(2)
    aligner = aligner_of(net)
    with pytest.raises(UserError, match="the model has not run since the aligner was used"):
        aligner(images, t)
    net(*EXAMPLE)
    with pytest.raises(UserError, match="3 images for 2 feature maps of tap 'middle'"):
        aligner(torch.rand(3, 1, 16, 16), t)
    with pytest.raises(UserError, match="the model has not run since"):  # what was kept is gone
        aligner(images, t)
    for bad, line in (
        ((images, torch.rand(4)), "4 times for 2 feature maps"),
        ((torch.rand(2, 1, 32, 32), t), r"the images are 32x32, but the aligner was made with image_size \(16, 16\)"),
        ((2 * images - 1, t), r"the images are in \[-.*must be in \[0, 1\]; perhaps images / 2 \+ 0.5"),
        ((images, 1000 * t + 2), r"the times are in .*perhaps t / 1000"),
    ):
        net(*EXAMPLE)
        with pytest.raises(UserError, match=line):
            aligner(*bad)
    with torch.no_grad():
        net(*EXAMPLE)
    with pytest.raises(UserError, match="tap 'middle' has no gradient"):
        aligner(images, t)
    net(*EXAMPLE)
    with pytest.raises(UserError, match="2 tensors of tokens were given for 1 alignments"):
        aligner(None, t, tokens=[torch.rand(2, 49, 64)] * 2)


def test_taps_that_do_not_run_once(net):
    class Twice(Net):
        def forward(self, x, t):
            return self.up(self.middle(self.middle(self.down(x))))

    class Never(Net):
        def forward(self, x, t):
            return self.up(self.down(x))

    for model, what in ((Twice(), "ran 2 times"), (Never(), "did not run")):
        with pytest.raises(UserError, match=f"tap 'middle' {what} in the model's forward pass"):
            aligner_of(model)
        assert not model._forward_hooks


def test_mistakes_at_the_start(net):
    for spec, line in (
        ({"tap": "midle"}, "unknown tap 'midle'; did you mean middle"),
        ({"wieght": 1}, "unknown key of an alignment 'wieght'; did you mean weight"),
        ({"head": "mlpp"}, "unknown head 'mlpp'"),
        ({"encoder": "digits-vitt"}, "unknown encoder 'digits-vitt'"),
        ({"head_options": {"hiden": 8}}, "unknown option of head 'mlp'"),
    ):
        with pytest.raises(UserError, match=line):
            aligner_of(net, **spec)
    with pytest.raises(UserError, match="needs an encoder"):
        Aligner(net, [{"tap": "middle"}], image_size=16, example=EXAMPLE)
    for options in ({"image_size": 16}, {"example": EXAMPLE}):
        with pytest.raises(UserError, match="with image_size, the pixels of the images' side, and example"):
            Aligner(net, [{"encoder": ENCODER}], **options)
    with pytest.raises(UserError, match=r"gives a tensor of shape \(2, 16\), but a tap must give one feature map"):
        Aligner(Pooled(), [{"encoder": ENCODER, "tap": "pool"}], image_size=16, example=EXAMPLE)
    assert not net._forward_hooks


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())

    def forward(self, x, t):
        return self.pool(x)


def test_the_middle_of_the_bottom_is_suggested_first():
    y = torch.zeros(1, dtype=torch.int64)
    dic = create_denoiser("DiC", 1, 10, width=8, depths=(1, 1, 8, 1, 1))
    names = suggest_taps(dic, (torch.zeros(1, 1, 16, 16), torch.zeros(1), y))
    assert names[0] == "mid.3"  # U-REPA's: the 4th of 8
    assert {f"mid.{i}" for i in range(8)} <= set(names)
    assert not any(name.startswith(("enc", "dec")) for name in names)
    with pytest.raises(UserError, match="no module of this model gives a feature map"):
        suggest_taps(nn.Sequential(nn.Sequential(nn.Flatten())), torch.zeros(1, 1, 4, 4))
