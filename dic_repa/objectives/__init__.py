"""What a denoiser is trained for. An objective draws what is random, and runs the model:

    draws = objective.draw(shape, generator)      # for the global batch, to be cut into rows
    out = objective(model, Batch(x, y, draws))    # the loss of each image, and what the model's taps saw

and `objective.velocity_model(denoiser)` is what the samplers take.
"""

from __future__ import annotations

from dic_repa.objectives.base import (
    Batch,
    Denoising,
    Noisy,
    ObjectiveOutput,
    VelocityModel,
    create_objective,
    objectives,
)
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
    "Batch",
    "Denoising",
    "FlowMatching",
    "LogNormal",
    "LogitNormal",
    "Noisy",
    "ObjectiveOutput",
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
