"""Manifolds of features: unions of balls about each of them, to its k-th nearest neighbour among the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEIGHBOURS = 3  # of precision and recall
BLOCK = 2**26  # distances computed at once: 256 MiB


def within_manifold(points: Tensor, features: Tensor) -> Tensor:
    """Whether each of `points` (M, D) lies within the manifold of `features` (N, D): booleans (M,).

    The manifold (Kynkäänniemi et al., arXiv 1904.06991) is the union of balls about the features, each reaching to its
    third nearest neighbour among them, as in ADM's script. ADM computes the distances in float16 where they fit, here
    they are float32: the third decimal may differ.
    """
    radii = manifold_radii(features)
    blocks = points.split(_rows(features))
    return torch.cat([(_squared_distances(block, features) <= radii).any(dim=1) for block in blocks])


def balls_around(points: Tensor, features: Tensor, neighbours: int) -> Tensor:
    """How many of the balls about `features` (N, D) hold each of `points` (M, D): (M,).

    A ball reaches to the feature's `neighbours`-th nearest one. Its edge does not belong to it, as in the `prdc` of
    density's and coverage's authors.
    """
    radii = manifold_radii(features, neighbours)
    blocks = points.split(_rows(features))
    return torch.cat([(_squared_distances(block, features) < radii).sum(dim=1) for block in blocks])


def balls_that_hold(points: Tensor, features: Tensor, neighbours: int) -> Tensor:
    """Whether each of these balls about `features` (N, D) holds any of `points` (M, D): booleans (N,)."""
    radii = manifold_radii(features, neighbours)
    blocks = points.split(_rows(features))
    return torch.stack([(_squared_distances(block, features) < radii).any(dim=0) for block in blocks]).any(dim=0)


def expected_coverage(real: int, samples: int, neighbours: int) -> float:
    """The share of `real` images' balls that hold a sample, on average, if these are real too (arXiv 2002.09797)."""
    return 1 - math.prod((real - i) / (real + samples - i) for i in range(1, neighbours + 1))


def manifold_radii(features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """The squared distance (N,) of each of `features` (N, D) to its `neighbours`-th nearest one among the others."""
    radii, start = [], 0
    for block in features.split(_rows(features)):
        distances = _squared_distances(block, features)
        # A feature is no neighbour of itself; by rounding, this distance would not be exactly 0.
        distances[torch.arange(len(block)), torch.arange(start, start + len(block))] = 0
        radii.append(distances.kthvalue(min(neighbours + 1, len(features)), dim=1).values)
        start += len(block)
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.float(), b.float()
    squares = a.square().sum(dim=1, keepdim=True) - 2 * (a @ b.mT) + b.square().sum(dim=1)
    return squares.clamp(min=0)


def _rows(features: Tensor) -> int:
    return max(1, BLOCK // len(features))
