"""Alignments without an encoder, against NumPy, hooks and autograd written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from small_runs import SMALL, small_recipe
from torch import nn
from torch.nn import functional as F

from dic_repa.alignment import Aligner, Alignment, alignment_losses, averaged_tokens
from dic_repa.errors import UserError
from dic_repa.models import DiC
from dic_repa.objectives import DDPM, Batch, FlowMatching
from dic_repa.training.parts import build_parts
from dic_repa.training.step import TrainingStep

SELF = "alignments=[{tap: enc.1.0, teacher: {name: self-alignment, tap: dec.1.0}, head: linear, loss: smooth-l1}]"
SYNC = "alignments=[{tap: enc.1.0, teacher: {name: layer-sync, tap: dec.1.0}, head: identity, manifold_weight: 0.0}]"
APART = "alignments=[{tap: enc.1.0, loss: dispersive, head: identity}]"
FAST = [key for key in SMALL if key != "alignments=[]"]


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_the_dispersive_loss_is_the_papers(tau):
    z = torch.randn(6, 4, 5, requires_grad=True)
    loss, terms = alignment_losses.create({"name": "dispersive", "tau": tau})(z, None)
    flat = z.detach().double().numpy().reshape(6, -1)
    squared = ((flat[:, None] - flat[None]) ** 2).sum(-1)  # all 36 pairs, those of an image with itself too
    expected = np.log(np.exp(-squared / (tau * 20)).mean())
    np.testing.assert_allclose(loss.detach().numpy(), np.full(6, expected), rtol=1e-6)
    assert terms["dispersive"] is loss
    p = np.exp(-squared / (tau * 20))
    by_hand = -4 / (tau * 20) * (p[:, :, None] * (flat[:, None] - flat[None])).sum(1) / p.sum()
    loss.mean().backward()
    np.testing.assert_allclose(z.grad.numpy().reshape(6, -1), by_hand, rtol=1e-4, atol=1e-7)


def test_features_that_are_alike_are_driven_apart():
    z = (torch.ones(4, 2, 3) + 0.01 * torch.randn(4, 2, 3)).requires_grad_()
    loss = alignment_losses.create("dispersive")
    (before,) = {round(value, 4) for value in loss(z)[0].tolist()}
    loss(z)[0].mean().backward()
    assert loss(z - 10 * z.grad)[0][0] < before <= 0
    assert torch.isfinite(loss(torch.ones(4, 2, 3))[0]).all()


def test_smooth_l1_is_its_formula():
    a, b = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    d = np.abs((a - b).numpy())
    expected = np.where(d < 0.05, d**2 / 0.1, d - 0.025).mean((1, 2))
    np.testing.assert_allclose(alignment_losses.create("smooth-l1")(a, b)[0].numpy(), expected, rtol=1e-5)


def built(*overrides):
    recipe = small_recipe(*overrides, base=FAST)
    accelerator = Accelerator(cpu=True, mixed_precision="no")  # not what an earlier test has left
    return build_parts(recipe, accelerator), recipe, accelerator


def one_batch(parts, count=4):
    return torch.utils.data.default_collate([parts.data[i] for i in range(count)])


def test_layer_sync_stops_the_gradient_at_the_later_layer():
    parts, recipe, accelerator = built(SYNC)
    step = TrainingStep(parts, recipe.train, accelerator)
    ((example, tokens),) = step.inputs(one_batch(parts), 3, [1.0])
    assert tokens == [None]
    out = parts.objective(parts.model, example)
    loss, terms = parts.aligner.compare(out.projections, tokens, out.time, [1.0])
    seen = {}
    early, late = parts.denoiser.enc[1][0], parts.denoiser.dec[1][0]
    handles = [each.register_forward_hook(lambda m, i, o: seen.update({m: o})) for each in (early, late)]
    parts.objective(parts.model, example)
    for handle in handles:
        handle.remove()
    expected = -0.5 * F.cosine_similarity(seen[early], seen[late].detach(), dim=1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms["alignment.0.token"], 2 * expected.detach())
    weights = list(parts.denoiser.parameters())
    found, by_hand = (torch.autograd.grad(each, weights, allow_unused=True) for each in (loss, expected))
    names = [name for name, _ in parts.denoiser.named_parameters()]
    for name, one, other in zip(names, found, by_hand):
        assert (one is None) == (other is None), name
        assert name.startswith(("stem", "condition", "enc", "down.0")) or one is None, name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_self_alignment_shows_the_averaged_weights_the_same_data_with_less_noise():
    parts, recipe, accelerator = built(SELF, "train.label_dropout=0.5")
    for parameter in parts.ema.model.parameters():
        nn.init.normal_(parameter, std=0.1)  # no longer the denoiser's
    step = TrainingStep(parts, recipe.train, accelerator)
    batch = one_batch(parts)
    ((example, (tokens,)),) = step.inputs(batch, 3, [1.0])
    assert tokens.shape == (4, 64, 16)
    assert not tokens.requires_grad
    ((same, _),) = step.inputs(batch, 3, [0.0])
    torch.testing.assert_close(same.draws["noise"], example.draws["noise"], rtol=0, atol=0)
    # The interval is the last of what is drawn: one number for each image.
    generator = torch.Generator().manual_seed(0)
    intervals = []
    for uniform in torch.rand(100, 4, generator=generator):
        intervals.append(parts.aligner.alignments[0].teacher.earlier(uniform))
    assert 0 <= torch.stack(intervals).min() < 0.01
    assert 0.19 < torch.stack(intervals).max() <= 0.2
    seen, calls = [], []
    late = parts.ema.model.dec[1][0].register_forward_hook(lambda m, i, o: seen.append(o))
    whole = parts.ema.model.register_forward_pre_hook(lambda m, i: calls.append(i))
    ((_, (again,)),) = step.inputs(batch, 3, [1.0])
    late.remove(), whole.remove()
    x_t, t, y = calls[0]
    torch.testing.assert_close(again, seen[0].flatten(2).mT)
    torch.testing.assert_close(again, tokens)
    torch.testing.assert_close(y, example.y)
    passed = example.draws["t"] - t
    assert (passed >= 0).all()
    assert 0 < passed.max() <= 0.2
    mixed = (1 - t)[:, None, None, None] * example.x + t[:, None, None, None] * example.draws["noise"]
    torch.testing.assert_close(x_t, mixed)


def test_less_noise_for_both_objectives():
    x, noise = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    interval = torch.tensor([0.1, 0.2, 0.0])
    flow = FlowMatching().with_less_noise(Batch(x, x, {"t": torch.tensor([0.5, 0.1, 1.0]), "noise": noise}), interval)
    torch.testing.assert_close(flow.t, torch.tensor([0.4, 0.0, 1.0]))
    torch.testing.assert_close(flow.x_t[0], 0.6 * x[0] + 0.4 * noise[0])
    torch.testing.assert_close(flow.x_t[1:], torch.stack([x[1], noise[2]]))
    ddpm = DDPM().with_less_noise(Batch(x, x, {"t": torch.tensor([500.0, 100, 999]), "noise": noise}), interval)
    torch.testing.assert_close(ddpm.t, torch.tensor([400.0, 0, 999]))


def test_an_aligner_needs_no_images_for_them():
    torch.manual_seed(0)
    net = DiC(8, (1, 1, 2, 1, 1), in_channels=3, num_classes=5)
    example = (torch.randn(4, 3, 16, 16), torch.rand(4), torch.zeros(4, dtype=torch.long))
    specs = [
        {"loss": "dispersive", "head": "identity", "tap": "enc.1.0"},
        {"teacher": {"name": "layer-sync", "tap": "mid.1"}, "head": "identity", "tap": "mid.0", "manifold_weight": 0},
    ]
    aligner = Aligner(net, specs, image_size=16, example=example)
    seen = {}
    for name in ("enc.1.0", "mid.0", "mid.1"):
        net.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    net(*example)
    loss = aligner(None, example[1])
    apart = alignment_losses.create("dispersive")(seen["enc.1.0"].flatten(2).mT)[0][0]
    cosine = F.cosine_similarity(seen["mid.0"], seen["mid.1"].detach(), dim=1).mean()
    torch.testing.assert_close(loss, 0.5 * apart - 0.5 * cosine)
    assert list(aligner.logs) == ["alignment.0.dispersive", "alignment.1.token", "alignment.1.manifold"]
    averaged = [{"teacher": {"name": "self-alignment", "tap": "mid.1"}, "tap": "mid.0", "loss": "smooth-l1"}]
    other = Aligner(DiC(8, (1, 1, 2, 1, 1), 3, 5), averaged, image_size=16, example=example)
    other._taps.model(*example)
    with pytest.raises(UserError, match=r"tokens=\[averaged_tokens\(ema"):
        other(None, example[1])
    other._taps.model(*example)
    assert other(None, example[1], tokens=averaged_tokens(net, "mid.1", *example)).requires_grad


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("{}", "tap 'mid.0' needs an encoder"),
        ("{encoder: digits-vit, loss: dispersive, head: identity}", "has an encoder and a loss that compares with no"),
        ("{encoder: digits-vit, teacher: {name: layer-sync, tap: enc.0.0}}", "has an encoder and its own teacher"),
        ("{loss: dispersive}", "compares the tap's features themselves; set head: identity"),
        ("{teacher: {name: layer-sync, tap: mid.0}, tap: mid.0}", "is its own teacher"),
        ("{teacher: {name: layer-sync, tap: mid.9}}", "unknown tap 'mid.9'"),
        ("{teacher: {name: layer-sink, tap: mid.0}}", "unknown teacher 'layer-sink'; did you mean layer-sync"),
        ("{teacher: {name: self-alignment, tap: mid.0, interval: 2.0}}", r"lies in \[0, 1\], not at 2.0"),
        ("{teacher: {name: layer-sync, tap: enc.0.0}, head: identity}", "changes no widths, but the tap has 32"),
    ],
)
def test_mistakes_are_one_line(section, line):
    with pytest.raises(UserError, match=line) as error:
        built(f"alignments=[{section}]")
    assert "\n" not in str(error.value)


def test_an_objective_without_less_noise_is_told(plugin_folder):
    (plugin_folder / "other.py").write_text(
        "from dic_repa.objectives import FlowMatching, objectives\nfrom dic_repa.objectives.base import Denoising\n"
        "@objectives.register('other')\nclass Other:\n"
        "    def __init__(self): self.path = FlowMatching().path\n"
        "    def draw(self, shape, generator, device=None): return {}\n"
        "@objectives.register('another')\nclass Another(Denoising):\n"
        "    def draw(self, shape, generator, device=None): return {}\n"
    )
    with pytest.raises(UserError, match="which Other cannot; take flow-matching or ddpm"):
        built(SELF, "plugins=[other]", "objective={name: other}")
    with pytest.raises(UserError, match="which Another cannot"):
        built(SELF, "plugins=[other]", "objective={name: another}")


def test_a_head_is_built_for_the_teachers_width_and_grid():
    net = DiC(8, (1, 1, 2, 1, 1), in_channels=3, num_classes=5)
    teacher = {"name": "layer-sync", "tap": "mid.0"}
    alignment = Alignment.build(net, "enc.0.0", None, None, (16, 16), head="linear", teacher=teacher)
    assert alignment.head(torch.randn(2, 8, 16, 16), torch.rand(2)).shape == (2, 16, 32)
