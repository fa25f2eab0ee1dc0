"""What people do around an `Aligner` with diffusers and Accelerate: prepare, accumulate, average, checkpoint, save."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from peft import LoraConfig, inject_adapter_in_model
from small_unet import small_unet
from torch.nn import functional as F
from torch.testing import assert_close

from dic_repa import Aligner

ALIGNMENT = {"encoder": "digits-vit", "tap": "mid_block", "head_options": {"hidden": 16}}
EXAMPLE = {"sample": torch.zeros(1, 1, 16, 16), "timestep": 0}


@pytest.fixture
def accelerate(monkeypatch):
    """Make an Accelerator with these options; Accelerate keeps them for the whole process, so they are forgotten."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield Accelerator
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make(seed: int = 0) -> tuple[UNet2DModel, Aligner]:
    unet = small_unet(seed)
    return unet, Aligner(unet, [ALIGNMENT], image_size=28, example=EXAMPLE)


def batch() -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    images, noise = torch.rand(4, 1, 28, 28, generator=random), torch.randn(4, 1, 16, 16, generator=random)
    return images, noise, torch.randint(1000, (4,), generator=random)


def loss_of(unet, aligner, images, noise, t):
    return F.mse_loss(unet(noise, t).sample, noise) + aligner(images, t / 1000)


def gradients(*modules) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": p.grad.clone() for i, module in enumerate(modules) for name, p in module.named_parameters()}


@pytest.fixture
def expected():
    """Loss and gradients of a batch, without anything around."""
    unet, aligner = make()
    loss = loss_of(unet, aligner, *batch())
    loss.backward()
    return loss.detach(), gradients(unet, aligner)


def test_accumulated_over_both(accelerate, expected):
    accelerator = accelerate(gradient_accumulation_steps=2)
    unet, aligner = make()
    optimizer = torch.optim.SGD([*unet.parameters(), *aligner.parameters()], 0.1)
    unet, aligner, optimizer = accelerator.prepare(unet, aligner, optimizer)
    before = {name: p.detach().clone() for name, p in aligner.named_parameters()}
    for half in zip(*(part.chunk(2) for part in batch())):
        with accelerator.accumulate(unet, aligner):
            accelerator.backward(loss_of(unet, aligner, *half))
            optimizer.step()
    assert_close(gradients(unet, aligner), expected[1], rtol=1e-4, atol=1e-6)
    moved = {name: value - 0.1 * expected[1][f"1.{name}"] for name, value in before.items()}
    assert_close(dict(aligner.named_parameters()), moved, rtol=1e-4, atol=1e-6)


def test_recomputed_blocks(expected):
    unet, aligner = make()
    unet.enable_gradient_checkpointing()
    loss = loss_of(unet, aligner, *batch())
    loss.backward()
    assert_close((loss.detach(), gradients(unet, aligner)), expected, rtol=1e-5, atol=1e-7)


def test_mixed_precision(accelerate):
    """Accelerate converts what the U-Net gives, not what a tap sees: the head gets bfloat16, the loss is float32."""
    accelerator = accelerate(mixed_precision="bf16")
    unet, aligner = accelerator.prepare(*make())
    images, noise, t = batch()
    tapped = []
    accelerator.unwrap_model(unet).mid_block.register_forward_hook(lambda *given: tapped.append(given[2].dtype))
    unet(noise, t)
    loss = aligner(images, t / 1000)
    accelerator.backward(loss)
    assert (tapped, loss.dtype) == ([torch.bfloat16], torch.float32)
    exact, like_it = make()
    exact(noise, t)
    assert_close(loss, like_it(images, t / 1000), rtol=0.02, atol=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(aligner).values())


def test_averaged_weights_and_copies(expected, tmp_path):
    """A copy of the U-Net has its hooks too, but is not taken for it; what is saved is the U-Net alone."""
    unet, aligner = make()
    ema = EMAModel(unet.parameters(), decay=0.5, model_cls=UNet2DModel, model_config=unet.config)
    images, noise, t = batch()
    loss = F.mse_loss(unet(noise, t).sample, noise)
    copy.deepcopy(unet)(noise[:1], t[:1])
    loss = loss + aligner(images, t / 1000)
    assert_close(loss.detach(), expected[0])
    ema.step(unet.parameters())
    ema.save_pretrained(tmp_path / "averaged")
    unet.save_pretrained(tmp_path / "unet")
    for name in ("averaged", "unet"):
        assert UNet2DModel.from_pretrained(tmp_path / name).state_dict().keys() == small_unet().state_dict().keys()


def test_a_validation_between_the_steps(expected):
    """The pass in evaluation is forgotten by the next one, though nobody asked the aligner about it."""
    unet, aligner = make()
    with torch.no_grad():
        unet.eval()(torch.randn(7, 1, 16, 16), 0)
    assert_close(loss_of(unet.train(), aligner, *batch()).detach(), expected[0])


def test_saved_and_loaded_state(accelerate, tmp_path):
    accelerator = accelerate()
    unet, aligner = make()
    optimizer = torch.optim.AdamW([*unet.parameters(), *aligner.parameters()], 0.1)
    unet, aligner, optimizer = accelerator.prepare(unet, aligner, optimizer)
    accelerator.save_state(tmp_path / "state")
    before = {name: value.clone() for name, value in aligner.state_dict().items()}
    accelerator.backward(loss_of(unet, aligner, *batch()))
    optimizer.step()
    assert not before["alignments.0.head.layers.0.weight"].equal(
        aligner.state_dict()["alignments.0.head.layers.0.weight"]
    )
    accelerator.load_state(tmp_path / "state")
    assert_close(dict(aligner.state_dict()), before)


def test_adapters_of_frozen_weights():
    """Alignment alone moves LoRA's matrices at the tap, also of blocks that are computed again."""
    unet = small_unet().requires_grad_(False)
    unet.enable_gradient_checkpointing()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), unet)
    aligner = Aligner(unet, [ALIGNMENT], image_size=28, example=EXAMPLE)
    images, noise, t = batch()
    unet(noise, t)
    aligner(images, t / 1000).backward()
    adapters = {name: p.grad for name, p in unet.named_parameters() if p.requires_grad and "mid_block" in name}
    assert len(adapters) == 4
    assert all(gradient.abs().sum() > 0 for gradient in adapters.values())
