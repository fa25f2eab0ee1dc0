"""`Aligner` in loops that are not ours: the same numbers as our trainer's, and every way to hold it wrong."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from aligner_steps import ENCODER, EXAMPLE, HEAD, SPECS, Net, aligner_of, batch, gradients, make
from diffusers import UNet2DModel
from small_runs import ALIGNED, small_recipe
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dic_repa import Aligner
from dic_repa.alignment import suggest_taps
from dic_repa.encoders import create_encoder
from dic_repa.errors import UserError
from dic_repa.training.parts import build_parts
from dic_repa.training.step import TrainingStep


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("options", [[], ["train.micro_batch=2"], ["train.gradient_checkpointing=true"]])
def test_the_trainers_own_loss_and_gradients(options, monkeypatch):
    """On our DiC, in one pass, in several, and with checkpointed blocks: to 1e-6."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerator = Accelerator(mixed_precision="no")  # not what an earlier test has left
    recipe = small_recipe(*options, "train.label_dropout=0", base=ALIGNED)
    parts = build_parts(recipe, accelerator)
    for parameter in parts.denoiser.parameters():
        nn.init.normal_(parameter, std=0.05)
    ours, heads = copy.deepcopy(parts.denoiser), copy.deepcopy(parts.aligner.state_dict())
    step = TrainingStep(parts, recipe.train, accelerator)
    samples = [parts.data[i] for i in range(recipe.train.batch_size)]
    rows = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    inputs = list(step.inputs(rows, 0, [1.0]))
    recipe.train.gradient_clip = None
    _, losses = step.gradients(rows, 0)

    spec = {"encoder": ENCODER, "tap": "mid.0", "head_options": {"hidden": 16}}
    example = (inputs[0][0].x, inputs[0][0].draws["t"], inputs[0][0].y)
    aligner = Aligner(ours, [spec], image_size=rows["image"].shape[-1], example=example)
    aligner.load_state_dict(heads)
    images = rows["image"].chunk(step.passes)
    for (given, _), image, expected in zip(inputs, images, losses):
        noisy = parts.objective.corrupt(given.x, **given.draws)
        prediction = ours(noisy.x_t, noisy.t, given.y)
        loss = parts.objective.loss(prediction, noisy).mean() + aligner(image, noisy.t)
        (loss / step.passes).backward()
        torch.testing.assert_close(loss.detach(), expected["loss"], rtol=1e-6, atol=1e-6)
        assert aligner.logs["alignment.0.token"] == pytest.approx(expected["alignment.0.token"].item(), abs=1e-6)
    for mine, trainers in ((ours, parts.denoiser), (aligner, parts.aligner)):
        for (name, a), (_, b) in zip(mine.named_parameters(), trainers.named_parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6, msg=name)
            assert b.grad.abs().sum() > 0 or "condition" in name


def test_accumulated_and_checkpointed_gradients_are_the_plain_ones():
    plain = gradients()
    assert all(gradient.abs().sum() > 0 for name, gradient in plain.items() if name.startswith("1."))
    for options in ({"passes": 4}, {"checkpointing": True}, {"passes": 2, "checkpointing": True}):
        for name, gradient in gradients(**options).items():
            torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6, msg=name)


def test_autocast_and_half_precision():
    """A model in bfloat16 by itself, and one under autocast: heads in what the aligner has, the loss in float32."""
    images, noise, t, y = batch()
    model, aligner = make()
    with torch.autocast("cpu", torch.bfloat16):
        model(noise, t, y)
        loss = aligner(images, t)
    assert loss.dtype == torch.float32
    model.to(torch.bfloat16)(noise.bfloat16(), t, y)
    half = aligner(images, t)
    assert half.dtype == torch.float32
    torch.testing.assert_close(loss, half, rtol=0.05, atol=0.05)
    half.backward()
    assert model.mid[0].conv1.weight.grad.abs().sum() > 0


def test_a_unet_of_diffusers():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(8, 16, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2 + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 2, attention_head_dim=8,
    )  # fmt: skip
    example = {"sample": torch.zeros(2, 1, 16, 16), "timestep": torch.zeros(2)}
    assert suggest_taps(unet, example)[0] == "mid_block"
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    state = torch.get_rng_state()
    specs = [{"encoder": ENCODER}, {"encoder": ENCODER, "tap": "down_blocks.1", "target": "spatial-norm"}]
    aligner = Aligner(unet, specs, image_size=16, example=example)
    assert torch.equal(torch.get_rng_state(), state)
    assert unet.training
    assert [alignment.tap for alignment in aligner.alignments] == ["mid_block", "down_blocks.1"]
    unet.enable_gradient_checkpointing()
    images, t = torch.rand(2, 1, 16, 16), torch.rand(2)
    unet(torch.randn(2, 1, 16, 16), 1000 * t)
    loss = aligner(images, t)
    loss.backward()
    assert unet.mid_block.resnets[0].conv1.weight.grad.abs().sum() > 0
    assert set(aligner.logs) == {f"alignment.{i}.{term}" for i in (0, 1) for term in ("token", "manifold")}
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert {name.split(".")[0] for name in aligner.state_dict()} == {"alignments"}


@pytest.mark.parametrize("gives", ["map", "tuple", "dict", "tokens"])
def test_what_a_tap_may_give(gives):
    """The same map in another wrapping is the same loss; of a dict or tuple the first map counts."""
    images, x, t, losses = torch.rand(2, 1, 16, 16), torch.randn(2, 1, 16, 16), torch.rand(2), []
    for kind in ("map", gives):
        torch.manual_seed(0)
        model = Net(kind)
        aligner = aligner_of(model)
        model(x, t)
        losses.append(aligner(images, t))
    torch.testing.assert_close(*losses)


def test_a_function_selects_where_the_first_map_is_not_the_one(net):
    aligner = aligner_of(net, tap="middle.conv", select=lambda hidden: hidden[:, :4])
    assert aligner.alignments[0].head.layers[0].in_features == 4
    net(*EXAMPLE)
    assert aligner(torch.rand(2, 1, 16, 16), torch.rand(2)).isfinite()


def test_each_alignment_of_a_tap_selects_for_itself(net):
    kinds = ({}, {"select": lambda hidden: hidden[:, :4]}, {"select": lambda hidden: hidden[:, 4:]})
    specs = [{"encoder": ENCODER, "tap": "middle", **HEAD, **kind} for kind in kinds]
    aligner = Aligner(net, specs, image_size=16, example=EXAMPLE)
    assert [alignment.head.layers[0].in_features for alignment in aligner.alignments] == [6, 4, 2]
    net(*EXAMPLE)
    projections = aligner.project(EXAMPLE[1])
    assert [tuple(projection.shape) for projection in projections] == [(2, 49, 96)] * 3


def test_making_an_aligner_leaves_the_model_as_it_was(net):
    """No running statistics, no gradients, no hooks after `remove`; copies and pickles of the model do not listen."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    aligner = aligner_of(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net(*EXAMPLE)
    averaged, sent = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    averaged(*EXAMPLE)  # between the model's pass and the aligner's call
    sent(*EXAMPLE)
    images, t = torch.rand(2, 1, 16, 16), torch.rand(2)
    loss = aligner(images, t)
    loss.backward()
    assert net.down.weight.grad is not None
    aligner.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    with pytest.raises(UserError, match="was removed from its model"):
        aligner(images, t)


def test_tokens_can_be_given_or_cached(net, tmp_path, monkeypatch):
    monkeypatch.setenv("DIC_REPA_CACHE", str(tmp_path))
    aligner = aligner_of(net)
    images = torch.randint(0, 256, (6, 1, 16, 16), dtype=torch.uint8)
    data = aligner.cached([{"image": image} for image in images])
    x, t, losses = torch.randn(2, 1, 16, 16), torch.rand(2), []
    tokens = torch.stack([data[i]["tokens.0"] for i in range(2)])
    for given in (images[:2], None, None):
        net(x, t)
        known = None if given is not None else [tokens] if len(losses) == 1 else aligner.encode(images[:2])[0]
        losses.append(aligner(given, t, tokens=known))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)  # the cache is in float16
    torch.testing.assert_close(losses[2], losses[0])


def test_alignments_of_one_encoder_share_its_pass(net):
    calls = 0

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = create_encoder(ENCODER)
            self.embed_dim, self.token_grid = self.inner.embed_dim, self.inner.token_grid

        def forward(self, images):
            nonlocal calls
            calls += 1
            return self.inner(images)

    encoder = Counting()
    specs = [{"encoder": encoder, "tap": tap, **HEAD} for tap in ("middle", "down")]
    aligner = Aligner(net, specs, image_size=16, example=EXAMPLE)
    calls = 0
    net(*EXAMPLE)
    aligner(torch.rand(2, 1, 16, 16), torch.rand(2))
    assert calls == 1


def test_schedules_go_by_the_step(net):
    """After HASTE's stop the encoder does not run, and the loss is a zero that still reaches the heads."""
    aligner = aligner_of(net, schedule={"name": "stop", "steps": 3})
    images, t, losses = torch.rand(2, 1, 16, 16), torch.rand(2), []
    for step in (0, 2, 3):
        net(*EXAMPLE)
        losses.append(aligner(images, t, step=step))
    assert losses[0] == losses[1] != 0
    assert losses[2] == 0
    losses[2].backward()
    assert all(parameter.grad is not None for parameter in aligner.parameters())
    net(*EXAMPLE)
    with pytest.raises(UserError, match=r"schedule of tap 'middle' needs the step: aligner\(images, t, step="):
        aligner(images, t)


def test_a_stop_at_a_similarity_is_decided_once_a_step(net):
    aligner = aligner_of(net, schedule={"name": "stop-at-similarity", "similarity": -1.0, "every": 2})
    images, t, nonzero = torch.rand(2, 1, 16, 16), torch.rand(2), []
    for step in (0, 0, 1, 1, 2, 2):  # two passes a step
        net(*EXAMPLE)
        nonzero.append(bool(aligner(images, t, step=step) != 0))
    assert nonzero == [True, True, True, True, False, False]


def test_compiled_models():
    """Whole graphs with the taps in them, through `torch.compile` and in place, made before and after the aligner."""
    images, x, t = torch.rand(2, 1, 16, 16), torch.randn(2, 1, 16, 16), torch.rand(2)
    losses = []
    for way in ("plain", "before", "after", "in place"):
        torch.manual_seed(0)
        torch.compiler.reset()
        model = Net().eval()
        run = torch.compile(model, backend="eager", fullgraph=True) if way == "before" else model
        aligner = aligner_of(run)
        if way == "after":
            run = torch.compile(model, backend="eager", fullgraph=True)
        elif way == "in place":
            model.compile(backend="eager", fullgraph=True)
        for _ in range(2):
            run(x, t)
            losses.append(aligner(images, t))
        losses[-1].backward()
        assert model.down.weight.grad.abs().sum() > 0
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


def test_what_is_computed_again_is_not_counted(net):
    """A tap inside of a checkpointed block: its hook is called a second time, in the backward pass."""
    images, x, t = torch.rand(2, 1, 16, 16), torch.randn(2, 1, 16, 16), torch.rand(2)
    aligner, plain, calls, found = aligner_of(net, tap="middle.conv.0"), net.middle.forward, 0, []

    def count(*_):
        nonlocal calls
        calls += 1

    net.middle.conv[0].register_forward_hook(count)
    for forward in (plain, lambda x: checkpoint(plain, x, use_reentrant=False)):
        net.middle.forward = forward
        net.zero_grad()
        for _ in range(2):  # two passes of a step
            net(x, t)
            aligner(images, t).backward()
        found.append(net.down.weight.grad)
    assert calls == 2 + 4
    torch.testing.assert_close(found[1], found[0])
    assert found[0].abs().sum() > 0


def test_a_reentrant_checkpoint_has_no_gradient_to_give(net):
    plain, aligner = net.middle.forward, aligner_of(net, tap="middle.conv.0")
    net.middle.forward = lambda x: checkpoint(plain, x, use_reentrant=True)
    net(*EXAMPLE)
    with pytest.raises(UserError, match="checkpoint with use_reentrant=False"):
        aligner(torch.rand(2, 1, 16, 16), torch.rand(2))


def test_specs_are_the_readers_own():
    """The mappings that are given are not changed: they may be a script's constants."""
    before = copy.deepcopy(SPECS)
    make()
    assert before == SPECS


def test_loss_is_that_of_the_formula(net):
    aligner = aligner_of(net, manifold_weight=2.0, weight=0.7)
    images, t = torch.rand(2, 1, 16, 16), torch.rand(2)
    net.eval()
    feature = net.middle(net.down(EXAMPLE[0]))
    net(*EXAMPLE)
    loss = aligner(images, t)
    head = aligner.alignments[0].head.layers
    h = F.interpolate(head(feature.movedim(1, -1)).movedim(-1, 1), (7, 7), mode="bilinear").flatten(2).mT
    y = create_encoder(ENCODER)(images)
    token = -F.cosine_similarity(h, y, dim=-1).mean()
    h, y = F.normalize(h, dim=-1), F.normalize(y, dim=-1)
    manifold = (h @ h.mT - y @ y.mT).square().mean()
    torch.testing.assert_close(loss, 0.7 * (token + 2 * manifold))
