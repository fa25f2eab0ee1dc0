"""What a denoiser is trained for. An objective draws time and noise, corrupts the data, and weighs the error:

    t, noise = objective.draw(shape, generator, device=device)
    noisy = objective.corrupt(x, t, noise)
    loss = objective.loss(denoiser(noisy.x_t, noisy.t, y), noisy)

and `objective.velocity_model(denoiser)` is what the samplers take.
"""

from __future__ import annotations

from dic_repa.objectives.base import Noisy, VelocityModel, create_objective, objectives
from dic_repa.objectives.ddpm import DDPM
from dic_repa.objectives.flow_matching import FlowMatching
from dic_repa.objectives.time_sampling import (
    LogitNormal,
    LogNormal,
    Uniform,
    create_time_sampling,
    resolution_shift,
    time_samplings,
)
from dic_repa.objectives.weighting import create_weighting, weightings

__all__ = [
    "DDPM",
    "FlowMatching",
    "LogNormal",
    "LogitNormal",
    "Noisy",
    "Uniform",
    "VelocityModel",
    "create_objective",
    "create_time_sampling",
    "create_weighting",
    "objectives",
    "resolution_shift",
    "time_samplings",
    "weightings",
]
