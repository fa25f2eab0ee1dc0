"""A part of one's own of each kind, as a user may write it: each notes that it was used, in USED."""

from __future__ import annotations

import torch
from torch import nn

from dic_repa.data.autoencoders import AutoencoderSpec
from dic_repa.interpolants import LinearPath
from dic_repa.models import Pretrained
from dic_repa.models.blocks import Block
from dic_repa.objectives import FlowMatching
from dic_repa.samplers import Guidance

USED = []


class OwnDenoiser(Pretrained, nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        USED.append("denoiser")
        self.config = {"in_channels": in_channels, "num_classes": num_classes}
        self.in_channels, self.num_classes = in_channels, num_classes

    def forward(self, x, t, y):
        return x


class OwnBlock(Block):
    def __init__(self, in_channels, channels, condition_width):
        super().__init__(in_channels, channels, condition_width)
        USED.append("block")


class OwnDataSet:
    channels, num_classes, class_names = 3, 2, ("a", "b")

    def __init__(self, size, split):
        USED.append("data-set")
        self.size = size

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = torch.full((3, self.size, self.size), 0.1 * index)
        return {"x": 2 * image - 1, "image": image, "label": torch.tensor(index % 2)}


class OwnAutoencoder:
    """32 channels, each a pixel's mean."""

    device = torch.device("cpu")

    def __init__(self):
        USED.append("autoencoder")
        self.spec = AutoencoderSpec("of whatever name", 32, 2, (0.0,) * 32, (1.0,) * 32)

    def encode(self, images):
        latents = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2).expand(-1, 32, -1, -1)
        return torch.cat([latents, torch.zeros_like(latents)], dim=1)

    def decode(self, x):
        return x[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).clamp(0, 1)

    def to(self, device):
        return self


class OwnObjective(FlowMatching):
    def __init__(self):
        super().__init__()
        USED.append("objective")


class OwnInterpolant(LinearPath):
    def __init__(self):
        USED.append("interpolant")


class OwnTimeSampling:
    def __call__(self, count, generator, path):
        USED.append("time-sampling")
        return torch.full((count,), 0.5)


class OwnLossWeighting:
    unit = None

    def __call__(self, path, t, prediction):
        USED.append("loss-weighting")
        return 2 * torch.ones_like(t)


class OwnEncoder:
    embed_dim = 3

    def __init__(self):
        USED.append("encoder")

    def token_grid(self, size):
        return size[0] // 4, size[1] // 4

    def __call__(self, images):
        return nn.functional.avg_pool2d(images, 4).flatten(2).mT


class OwnHead(nn.Module):
    def __init__(self, channels, embed_dim, grid):
        super().__init__()
        USED.append("head")
        self.grid, self.layer = grid, nn.Conv2d(channels, embed_dim, 1)

    def forward(self, feature, t):
        return nn.functional.interpolate(self.layer(feature), self.grid).flatten(2).mT


class OwnTeacher:
    tap = "mid.0"

    def earlier(self, uniform):
        USED.append("teacher")
        return 0.5 * uniform


class OwnTarget:
    def __call__(self, tokens):
        USED.append("target")
        return tokens.tanh()


class OwnAlignmentLoss:
    def __call__(self, projection, target):
        USED.append("alignment-loss")
        loss = (projection - target).square().mean((1, 2))
        return loss, {"squared": loss}


class OwnTimeWeight:
    def __call__(self, t):
        USED.append("time-weight")
        return t


class OwnAlignmentSchedule:
    def __call__(self, step):
        USED.append("alignment-schedule")
        return 1.0


class OwnOptimizer(torch.optim.SGD):
    def __init__(self, parameters, lr):
        USED.append("optimizer")
        super().__init__(parameters, lr)


class OwnLearningRateSchedule:
    def __call__(self, progress):
        USED.append("learning-rate-schedule")
        return 0.5


def own_ode_solver(field, x, t, s):
    USED.append("ode-solver")
    return x + (s - t) * field(x, t)


def own_sde_solver(sde, x, t, s, z):
    USED.append("sde-solver")
    return x + (s - t) * sde.drift(x, t) + sde.noise(x, t, s, z)


class OwnDDPMSolver:
    process = "ddpm"

    def __call__(self, schedule, x, data, fraction, i):
        USED.append("ddpm-solver")
        return data, 0.0


class OwnGuidance(Guidance):
    def bind(self, model, y, weak_model=None):
        USED.append("guidance")
        return super().bind(model, y, weak_model)


def own_guidance_schedule(progress):
    USED.append("guidance-schedule")
    return progress**2


class OwnTimeGrid:
    def __call__(self, steps, high, low, path):
        USED.append("time-grid")
        return [high + (low - high) * (i / steps) ** 2 for i in range(steps + 1)]


def own_diffusion_form(path, t, norm):
    USED.append("diffusion-form")
    return norm * t**2


def own_last_step(sde, x, t):
    USED.append("last-step")
    return x
