"""The second head of a denoiser: what it computes, that it changes nothing else, and that it is saved and trained."""

from __future__ import annotations

import copy

import pytest
import torch

from dic_repa.alignment import AlignedDenoiser
from dic_repa.errors import UserError
from dic_repa.models import DiC, Pretrained, add_middle_head, create_denoiser, load_denoiser
from dic_repa.objectives import DDPM, Batch, FlowMatching, check_middle_head
from dic_repa.training.optimizers import hidden_matrices

X = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
T, Y = torch.tensor([0.3, 0.8]), torch.tensor([1, 2])
MODELS = {
    "DiC": ({"width": 8, "depths": [1] * 5}, "mid.0", 4),
    "DiC of patches": ({"width": 8, "depths": [1] * 5, "patch_size": 2}, "enc.1.0", 4),
    "SiT": ({"width": 16, "depth": 2, "num_heads": 2}, "blocks.0", 2),
    "U-ViT": ({"width": 16, "depth": 3, "num_heads": 2, "size": 16}, "enc.0", 2),
}


def denoiser(kind: str, middle_head=None):
    torch.manual_seed(0)
    model = create_denoiser(kind.partition(" ")[0], 1, 10, middle_head=middle_head, **MODELS[kind][0])
    generator = torch.Generator().manual_seed(1)
    for _name, parameter in sorted(model.named_parameters(), key=lambda entry: entry[0].startswith("middle_head")):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model, weight_of_own: float = 1.0, weight_of_middle: float | None = None):
    """Of the objective's loss, or of the two squared errors as they are written down here."""
    draws = {"t": T, "noise": torch.randn(X.shape, generator=torch.Generator().manual_seed(2))}
    if weight_of_middle is None:
        out = FlowMatching()(AlignedDenoiser(model), Batch(X, Y, draws))
        loss = sum((values.mean() for values in out.others.values()), out.loss.mean())
    else:
        noisy = (1 - T)[:, None, None, None] * X + T[:, None, None, None] * draws["noise"]
        errors = (model(noisy, T, Y) - torch.cat([draws["noise"] - X] * 2, dim=1)).square()
        loss = weight_of_own * errors[:, :1].mean() + weight_of_middle * errors[:, 1:].mean()
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_a_last_layer_at_the_tapped_block(kind):
    _, tap, side = MODELS[kind]
    model, seen = denoiser(kind, tap), []
    dict(model.named_modules())[tap].register_forward_hook(lambda _block, given, gave: seen.append((given, gave)))
    both = model(X, T, Y)
    torch.testing.assert_close(both[:, :1], denoiser(kind)(X, T, Y), rtol=0, atol=0)
    ((inputs, feature),) = seen
    if feature.ndim == 3:
        feature = feature[:, -64:].transpose(1, 2).unflatten(2, (8, 8))
    places = (feature - feature.mean(1, keepdim=True)) / (feature.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    head = model.middle_head
    if kind != "U-ViT":  # whose blocks are not modulated
        shift, scale = (inputs[1] @ head.modulation.weight.T + head.modulation.bias)[:, :, None, None].chunk(2, 1)
        places = places * (1 + scale) + shift
    pixels = torch.einsum("bchw,pc->bhwp", places, head.linear.weight) + head.linear.bias
    expected = torch.zeros(2, 16, 16)
    for i in range(side):
        for j in range(side):
            expected[:, i::side, j::side] = pixels[..., i * side + j]
    torch.testing.assert_close(both[:, 1], expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_both_losses():
    for weight in (0.0, 0.5):
        found = gradients(denoiser("DiC", {"tap": "mid.0", "weight": weight}))
        expected = gradients(denoiser("DiC", "mid.0"), 1.0, weight)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        plain = gradients(denoiser("DiC"))
        same = all(torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-7) for name, gradient in plain.items())
        assert same == (weight == 0)


def test_it_is_saved_and_copied_with_the_denoiser(tmp_path):
    model = denoiser("DiC", {"tap": "mid.0", "weight": 0.25})
    model.save_pretrained(tmp_path)
    loaded, copied, both = load_denoiser(tmp_path), copy.deepcopy(model), model(X, T, Y)
    assert loaded.middle_head.loss_weight == 0.25
    for parameter in model.middle_head.parameters():  # neither shares them, nor runs the other's hooks
        parameter.data.zero_()
    assert model(X, T, Y)[:, 1].abs().max() == 0
    for other in (loaded, copied):
        torch.testing.assert_close(other(X, T, Y), both)
    assert "middle_head" not in denoiser("DiC").config  # which stays as it was before there were any


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mid.7", "unknown tap of the middle head 'mid.7'; did you mean mid.0"),
        ("mid", "'mid' is no block that gives one feature map"),
        ("condition.0", "'condition.0' is no block that gives one feature map"),
        ({"tap": "mid.0", "wait": 1}, "unknown key of middle_head 'wait'; did you mean weight"),
        ({"tap": "mid.0", "weight": -1}, "weight -1: give a number of at least 0"),
    ],
)
def test_mistakes_are_told(given, message):
    with pytest.raises(UserError, match=message):
        DiC(8, (1, 1, 1, 1, 1), 1, 10, middle_head=given)


def test_what_does_not_go_together():
    with pytest.raises(UserError, match="set learn_sigma to false"):
        DiC(8, (1, 1, 1, 1, 1), 1, 10, learn_sigma=True, middle_head="mid.0")
    with pytest.raises(UserError, match="the objective DDPM does not train it"):
        check_middle_head(denoiser("DiC", "mid.0"), DDPM())
    check_middle_head(denoiser("DiC"), DDPM())


class Net(Pretrained):
    """A denoiser of a user's own, whose block is a convolution."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.config = {"in_channels": in_channels, "num_classes": num_classes}
        self.in_channels, self.num_classes = in_channels, num_classes
        self.first = torch.nn.Conv2d(in_channels, 8, 3, stride=2, padding=1)
        self.last = torch.nn.ConvTranspose2d(8, in_channels, 2, stride=2)
        add_middle_head(self, "first")

    def forward(self, x, t, y):
        return self.last(self.first(x))


def test_a_denoiser_of_ones_own_has_one():
    model = Net(3, 10)
    assert model.middle_head.modulation is None
    torch.nn.init.normal_(model.middle_head.linear.weight)
    assert model(torch.randn(2, 3, 8, 12), T, Y).shape == (2, 6, 8, 12)


def test_its_last_layer_is_no_hidden_one_to_muon():
    chosen = []
    for model in (denoiser("DiC"), denoiser("DiC", "mid.0")):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        chosen.append({names[id(parameter)] for parameter in hidden_matrices(model)})
    assert chosen[1] - chosen[0] == {"middle_head.modulation.weight"}
    assert "output.conv2.weight" not in chosen[0] | chosen[1]
