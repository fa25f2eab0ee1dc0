"""How alike two sets of features (N, D1) and (N, D2) of the same N images are, and what can be read from one.

All in float64: the scores are ratios of sums over N^2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dic_repa.errors import UserError


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414), in [0, 1].

    `|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)` for features x (N, D1) and y (N, D2) whose columns are centred. 1 for features
    that are rotated, shifted or scaled as a whole; its value for unrelated ones is about D1 D2 / N where that is small.
    0 where one of them is constant. UserError for fewer than two rows or features that are not finite.
    """
    x, y = _checked(x, y)
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    if len(x) < max(x.shape[1], y.shape[1]):  # the same sums from the smaller matrices
        k, m = x @ x.mT, y @ y.mT
        together, apart = (k * m).sum(), k.norm() * m.norm()
    else:
        together, apart = (y.mT @ x).square().sum(), (x.mT @ x).norm() * (y.mT @ y).norm()
    return (together / apart).item() if apart > 0 else 0.0


def cknna(x: Tensor, y: Tensor, k: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment (Huh et al., arXiv 2405.07987): CKA over mutual neighbours alone.

    With the rows of features x (N, D1) and y (N, D2) at unit length, kernels K = x x^T and L = y y^T and
    a(i, j) = 1 where j is among the k nearest of i in both, and not i itself:
    `A(K, L) / sqrt(A(K, K) A(L, L))`, `A(K, L) = sum_ij a(i, j) (K_ij - mean_l K_il) (L_ij - mean_l L_il)`, where
    A(K, K) counts the neighbours in x, A(L, L) those in y. With k = N - 1 it is over all pairs. Unrelated features
    have about k / N of their neighbours in common. UserError where k is not below N, or as `linear_cka`.
    """
    x, y = _checked(x, y)
    if not 1 <= k < len(x):
        raise UserError(f"CKNNA takes 1 to {len(x) - 1} neighbours of {len(x)} images, not {k}")
    (kernel_x, near_x), (kernel_y, near_y) = _neighbours(x, k), _neighbours(y, k)
    together = (kernel_x * kernel_y)[near_x & near_y].sum()
    apart = (kernel_x[near_x].square().sum() * kernel_y[near_y].square().sum()).sqrt()
    return (together / apart).item() if apart > 0 else 0.0


def _neighbours(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The kernel less its rows' means, and which k others of each row are the nearest, both (N, N)."""
    unit = torch.nn.functional.normalize(features, dim=1)
    kernel = unit @ unit.mT
    nearest = kernel.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices
    near = torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, nearest, True)
    return kernel - kernel.mean(dim=1, keepdim=True), near


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, num_classes: int, ridge: float = 1e-3
) -> float:
    """The share of the test features (M, D) whose class a linear classifier of the training features (N, D) tells.

    Ridge regression on one-hot classes in closed form, `(X^T X + ridge N I)^-1 X^T Y`, on features that are
    standardised with the training ones' mean and standard deviation; the largest output is the class.
    """
    train_x, test_x = train_x.double(), test_x.double()
    mean, std = train_x.mean(dim=0), train_x.std(dim=0).clamp(min=1e-8)
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    targets = torch.nn.functional.one_hot(train_y, num_classes).double()
    offset = targets.mean(dim=0)
    gram = train_x.mT @ train_x
    gram.diagonal().add_(ridge * len(train_x))
    weights = torch.linalg.solve(gram, train_x.mT @ (targets - offset))
    return ((test_x @ weights + offset).argmax(dim=1) == test_y).double().mean().item()


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise UserError(
            f"features to compare are (N, D) of the same two or more images, not {tuple(x.shape)}, {tuple(y.shape)}"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise UserError("the features hold NaN or infinity; the model may have diverged")
    return x.double(), y.double()
