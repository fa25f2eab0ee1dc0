"""The diffusion coefficient w(t) of the reverse SDE dx = (v - w/2 s) dt + sqrt(w) dW: the six forms of SiT.

Every w(t) >= 0 has the same marginals as the ODE (Ma et al. 2024, eq. 6); it trades new noise against error correction.
SiT writes the noise as sqrt(2 w') dW, so that w is twice its form, and counts time the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from dic_repa.errors import UserError
from dic_repa.interpolants import Interpolant
from dic_repa.registry import Registry

Diffusion = Callable[[float], float]
diffusion_forms = Registry("diffusion form", key="sample.diffusion")  # functions (path, t, norm) -> w(t)


def create_diffusion(form: str | Diffusion, path: Interpolant, norm: float = 1.0) -> Diffusion:
    """w(t) of a `form`, scaled by `norm`; a callable is taken as it is.

    The forms: 'constant', 'sbdm', 'sigma', 'linear', 'decreasing', 'increasing-decreasing'.

    Raises UserError for an unknown form and a norm that is negative.
    """
    if callable(form):
        return form
    if not norm >= 0:
        raise UserError(f"diffusion norm {norm}: give a number of at least 0")
    function = diffusion_forms.find(form)
    return lambda t: function(path, t, norm)


@diffusion_forms.register("constant")
def constant(path: Interpolant, t: float, norm: float) -> float:
    """2 norm: as much noise near the data as elsewhere; with the solver ou and the last step tweedie.

    Stiff near the data, where euler_maruyama wants many steps; the solver ou does not.
    """
    return 2 * norm


@diffusion_forms.register("sbdm")
def sbdm(path: Interpolant, t: float, norm: float) -> float:
    """That of the score-based diffusion with the path's marginals; very large near t = 1.

    2 norm sigma (sigma' - sigma alpha' / alpha).
    """
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    return (2 * norm * c.sigma * c.determinant / c.alpha).item()


@diffusion_forms.register("sigma")
def sigma(path: Interpolant, t: float, norm: float) -> float:
    """2 norm sigma(t): like linear, following the path."""
    return 2 * norm * path.coefficients(torch.tensor(t, dtype=torch.float64)).sigma.item()


@diffusion_forms.register("linear")
def linear(path: Interpolant, t: float, norm: float) -> float:
    """2 norm t: least noise near the data; REPA and U-REPA."""
    return 2 * norm * t


@diffusion_forms.register("decreasing")
def decreasing(path: Interpolant, t: float, norm: float) -> float:
    """(1 - norm cos(pi t))^2 / 2: falls smoothly from 2 at the noise to 0 at the data."""
    return 0.5 * (1 - norm * math.cos(math.pi * t)) ** 2


@diffusion_forms.register("increasing-decreasing")
def increasing_decreasing(path: Interpolant, t: float, norm: float) -> float:
    """2 norm sin(pi t)^2: none at either end."""
    return 2 * norm * math.sin(math.pi * t) ** 2


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def decay(w: Diffusion, path: Interpolant, t: float, s: float) -> float:
    """exp(-int_s^t w / (2 sigma^2)) for s < t: what a step keeps of the noise that is there (0 for s = 0).

    The integral is taken in log t, in which it is smooth towards t = 0.
    """
    if s == 0:
        return 0.0
    middle, half = 0.5 * (math.log(t) + math.log(s)), 0.5 * (math.log(t) - math.log(s))
    times = np.exp(middle + half * _NODES)
    sigma = path.coefficients(torch.from_numpy(times)).sigma.numpy()
    rate = np.array([w(float(tau)) for tau in times]) / (2 * sigma**2)
    return math.exp(-half * float(np.sum(_WEIGHTS * rate * times)))
