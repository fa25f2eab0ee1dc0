"""Precision and recall: which samples lie within the manifold of the reference, and the other way round.

Kynkäänniemi et al., arXiv 1904.06991: a set's manifold is the union of balls about its points, each reaching to the
point's k-th nearest neighbour in the set. As in ADM's script k is 3 and the features are Inception's pool features.
ADM computes the distances in float16 where they fit, here they are float32: the third decimal may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
_ENTRIES = 2**26  # of a block of distances: 256 MiB


def within_manifold(points: Tensor, features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Whether each of `points` (M, D) lies within the manifold of `features` (N, D): booleans (M,)."""
    radii = manifold_radii(features, neighbours)
    blocks = points.split(_rows(features))
    return torch.cat([(squared_distances(block, features) <= radii).any(dim=1) for block in blocks])


def manifold_radii(features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """The squared distance (N,) of each of `features` (N, D) to its k-th nearest neighbour among the others."""
    neighbours = min(neighbours, len(features) - 1)
    radii = []
    for start, block in zip(range(0, len(features), _rows(features)), features.split(_rows(features))):
        distances = squared_distances(block, features)
        # Itself is no neighbour; by rounding, its distance would not be exactly 0.
        distances[torch.arange(len(block)), torch.arange(start, start + len(block))] = 0
        radii.append(distances.kthvalue(neighbours + 1, dim=1).values)
    return torch.cat(radii)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """The squared distances (M, N), float32, of a (M, D) and b (N, D)."""
    a, b = a.float(), b.float()
    squares = a.square().sum(dim=1, keepdim=True) - 2 * (a @ b.mT) + b.square().sum(dim=1)
    return squares.clamp(min=0)


def _rows(features: Tensor) -> int:
    return max(1, _ENTRIES // len(features))
