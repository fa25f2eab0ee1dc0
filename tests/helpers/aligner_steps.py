"""One step of a plain training loop with an `Aligner`, as somebody else's script has it, in one process or several."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.alignment import Aligner
from dic_repa.models import DiC

SPECS = [
    {"encoder": "digits-vit", "tap": "mid.0", "head_options": {"hidden": 16}},
    {"encoder": "digits-vit", "tap": "dec.1.0", "head": "conv", "weight": 0.25, "target": "spatial-norm"},
]
BATCH = 8


def make(checkpointing: bool = False) -> tuple[DiC, Aligner]:
    torch.manual_seed(0)
    model = DiC(8, (1, 1, 1, 1, 1), in_channels=1, num_classes=10)
    for parameter in model.parameters():  # not zero, as at the start
        nn.init.normal_(parameter, std=0.05)
    model.set_gradient_checkpointing(checkpointing)
    model.class_dropout = 0
    example = (torch.zeros(1, 1, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return model, Aligner(model, SPECS, image_size=16, example=example)


def batch() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH, 1, 16, 16, generator=generator)
    noise, t = torch.randn(images.shape, generator=generator), torch.rand(BATCH, generator=generator)
    return images, noise, t, torch.arange(BATCH)


def gradients(
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    rows: slice = slice(None),
    passes: int = 1,
    checkpointing: bool = False,
) -> dict[str, Tensor]:
    """The gradients of all parameters by their names, with the loss as "loss"."""
    model, aligner = make(checkpointing)
    wrapped, wrapped_aligner = wrap(model), wrap(aligner)
    total = torch.zeros(())
    for part in zip(*(tensor[rows].chunk(passes) for tensor in batch())):
        images, noise, t, y = part
        x, at = 2 * images - 1, t[:, None, None, None]
        prediction = wrapped((1 - at) * x + at * noise, t, y)
        loss = (F.mse_loss(prediction[:, :1], noise - x) + wrapped_aligner(images, t)) / passes
        loss.backward()
        total += loss.detach()
    found = {f"{i}.{name}": p.grad for i, each in enumerate((model, aligner)) for name, p in each.named_parameters()}
    full = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}
    return full | {"loss": total}


ENCODER = "digits-vit"  # 7x7 tokens


class Net(nn.Module):
    """A plain U-Net of two levels, with what people's modules give: maps, tuples, tokens, a dict."""

    def __init__(self, gives="map"):
        super().__init__()
        self.gives = gives
        self.down = nn.Conv2d(1, 6, 3, 2, 1)
        self.middle = Middle(gives)
        self.up = nn.ConvTranspose2d(6, 1, 2, 2)

    def forward(self, x, t):
        hidden = self.middle(self.down(x))
        hidden = hidden["map"] if isinstance(hidden, dict) else hidden[0] if isinstance(hidden, tuple) else hidden
        return self.up(hidden.mT.unflatten(2, (8, 8)) if hidden.ndim == 3 else hidden)


class Middle(nn.Module):
    def __init__(self, gives):
        super().__init__()
        self.gives, self.conv = gives, nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6))

    def forward(self, x):
        x = self.conv(x)
        return {
            "map": x,
            "tuple": (x, None),
            "dict": {"scale": x.mean(), "map": x},
            "tokens": x.flatten(2).mT,
        }[self.gives]


EXAMPLE = (torch.zeros(2, 1, 16, 16), torch.zeros(2))
HEAD = {"head_options": {"hidden": 8}}


def aligner_of(model, **spec):
    return Aligner(model, [{"encoder": ENCODER, "tap": "middle", **HEAD, **spec}], image_size=16, example=EXAMPLE)
