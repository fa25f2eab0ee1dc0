"""Inception weights that need no network: random ones, in the format and under the names of torch-fidelity's file."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import torch
from torch import Tensor

from dic_repa.evaluation import extractors


@functools.cache
def _state() -> dict[str, Tensor]:
    model = extractors._torch_fidelity_inception()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith((".bn.weight", ".bn.bias", "running_mean")):
            centre = 1.0 if name.endswith(".bn.weight") else 0.0
            tensor.copy_(centre + 0.2 * torch.randn(tensor.shape, generator=generator))
        elif tensor.ndim > 1:  # He's deviation, so that the features of different images differ in the last layer
            fan_in = tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5)
    return copy.deepcopy(dict(model.state_dict()))


def write_inception(path: Path) -> Path:
    """Random weights as torch-fidelity stores them: a plain state dict, without the counters of batch norm."""
    torch.save({name: t for name, t in _state().items() if not name.endswith("num_batches_tracked")}, path)
    return path
