"""How alike two sets of features (N, D1) and (N, D2) of the same N images are, and what can be read from one.

All in float64: the scores are ratios of sums over N^2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dic_repa.errors import UserError


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414), in [0, 1].

    `|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)` for features x (N, D1) and y (N, D2) with centred columns. 1 for features that
    are rotated, shifted or scaled as a whole, 0 for constant ones, and about D1 D2 / N (if small) for unrelated ones.
    """
    x, y = (features - features.mean(dim=0) for features in _checked(x, y))
    if len(x) < max(x.shape[1], y.shape[1]):  # the same sums from the smaller matrices
        k, m = x @ x.mT, y @ y.mT
        together, apart = (k * m).sum(), k.norm() * m.norm()
    else:
        together, apart = (y.mT @ x).square().sum(), (x.mT @ x).norm() * (y.mT @ y).norm()
    return (together / apart).item() if apart > 0 else 0.0


def cknna(x: Tensor, y: Tensor, k: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment (Huh et al., arXiv 2405.07987): CKA over mutual neighbours alone.

    With the rows of features x (N, D1) and y (N, D2) at unit length, kernels K = x x^T and L = y y^T, and M_ij = 1
    where j is among the k nearest of i in both, and not i itself:
    `HSIC(M K, M L) / sqrt(HSIC(M_x K, M_x K) HSIC(M_y L, M_y L))`, products by element, M_x and M_y the neighbours in
    one of the two. HSIC is the unbiased estimate, as in the authors' evaluation and published figures; with k = N - 1
    this is unbiased CKA. Unrelated features give about 0, or a little less.
    """
    x, y = _checked(x, y)
    if len(x) < 4 or not 2 <= k < len(x):
        raise UserError(f"CKNNA takes at least 4 images and 2 to N - 1 neighbours, not {k} of {len(x)}")
    (kernel_x, near_x), (kernel_y, near_y) = _neighbours(x, k), _neighbours(y, k)
    both = near_x & near_y
    together = unbiased_hsic(kernel_x * both, kernel_y * both)
    kernel_x, kernel_y = kernel_x * near_x, kernel_y * near_y
    apart = unbiased_hsic(kernel_x, kernel_x) * unbiased_hsic(kernel_y, kernel_y)
    return together / apart**0.5 if apart > 0 else 0.0


def unbiased_hsic(k: Tensor, m: Tensor) -> float:
    """The Hilbert-Schmidt independence criterion of kernels K and L (N, N), unbiased (Song et al. 2012, eq. 5).

    `(tr(K L) + 1^T K 1 1^T L 1 / ((N - 1)(N - 2)) - 2 / (N - 2) 1^T K L 1) / (N (N - 3))`, without their diagonals.
    """
    n = len(k)
    k, m = (kernel - kernel.diagonal().diag() for kernel in (k, m))
    crossed = k.sum(dim=0) @ m.sum(dim=1)
    total = (k * m.mT).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * crossed
    return total.item() / (n * (n - 3))


def _neighbours(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The kernel of the rows at unit length, and which k others of each row are the nearest, both (N, N)."""
    unit = torch.nn.functional.normalize(features, dim=1)
    kernel = unit @ unit.mT
    nearest = kernel.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices
    return kernel, torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, nearest, True)


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
