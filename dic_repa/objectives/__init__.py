"""What a denoiser is trained for. An objective draws what is random, and runs the model:

    draws = objective.draw(shape, generator)      # for the global batch, to be cut into rows
    out = objective(model, Batch(x, y, draws))    # the loss of each image, and what the model's taps saw

and `objective.velocity_model(denoiser)` is what the samplers take.
"""

from dic_repa.objectives.base import (
    Batch,
    Denoising,
    Noisy,
    ObjectiveOutput,
    VelocityModel,
    check_middle_head,
    objectives,
)
from dic_repa.objectives.contrastive import ContrastiveFlowMatching
from dic_repa.objectives.ddpm import DDPM
from dic_repa.objectives.flow_matching import (
    FlowMatching,
    LogitNormal,
    LogNormal,
    Uniform,
    time_samplings,
    weightings,
)
from dic_repa.objectives.jit import JiT
from dic_repa.objectives.meanflow import ImprovedMeanFlow, MeanFlow
from dic_repa.samplers.grids import resolution_shift

__all__ = [
    "DDPM",
    "Batch",
    "ContrastiveFlowMatching",
    "Denoising",
    "FlowMatching",
    "ImprovedMeanFlow",
    "JiT",
    "LogNormal",
    "LogitNormal",
    "MeanFlow",
    "Noisy",
    "ObjectiveOutput",
    "Uniform",
    "VelocityModel",
    "check_middle_head",
    "objectives",
    "resolution_shift",
    "time_samplings",
    "weightings",
]
