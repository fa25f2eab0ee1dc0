"""What a denoiser is trained for. An objective draws time and noise, corrupts the data, and weighs the error:

    t, noise = objective.draw(shape, generator, device=device)
    noisy = objective.corrupt(x, t, noise)
    loss = objective.loss(denoiser(noisy.x_t, noisy.t, y), noisy)

and `objective.velocity_model(denoiser)` is what the samplers take.
"""

from __future__ import annotations

from dic_repa.objectives.base import Noisy, VelocityModel, create_objective, objectives
from dic_repa.objectives.flow_matching import FlowMatching
from dic_repa.objectives.time_sampling import LogitNormal, Uniform, create_time_sampling, time_samplings

__all__ = [
    "FlowMatching",
    "LogitNormal",
    "Noisy",
    "Uniform",
    "VelocityModel",
    "create_objective",
    "create_time_sampling",
    "objectives",
    "time_samplings",
]
