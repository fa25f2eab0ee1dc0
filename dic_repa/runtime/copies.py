"""Copies to a device that the CPU does not wait for."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; to a GPU by pinned memory. Else the CPU would wait for all that the GPU has yet to do, and
    then the GPU for the CPU."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
