"""The discrete noise schedule of DDPM, its posterior, and respacing to fewer steps."""

from __future__ import annotations

from itertools import accumulate, repeat

import torch
from torch import Tensor

from dic_repa.errors import UserError, unknown_name
from dic_repa.interpolants import expand_as

Index = int | Tensor  # a step, or one step for each row (B,)
VARIANCES = ("large", "small")


class BetaSchedule:
    """x_i = sqrt(abar_i) x + sqrt(1 - abar_i) eps at the steps i = 0 ... N - 1, with abar the product of 1 - beta.

    `times[i]` is the time of step i in (0, 1]: (its number in the original schedule + 1) / (the original's steps).
    `fixed_variance` is that of a model that learns none: 'large', beta, as in DiT and ADM; 'small', the posterior's.
    Methods take a step as an int, or one for each row as a tensor (B,).
    """

    def __init__(self, betas: Tensor, times: list[float] | None = None, fixed_variance: str = "large"):
        if fixed_variance not in VARIANCES:
            raise unknown_name("fixed variance", fixed_variance, VARIANCES)
        self.betas, self.fixed_variance = betas.double(), fixed_variance
        self.times = times or [(i + 1) / len(betas) for i in range(len(betas))]
        self.alpha_bar = torch.cumprod(1 - self.betas, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        posterior = self.betas * (1 - before) / (1 - self.alpha_bar)
        # The first step's posterior has no variance; its logarithm is taken to be the second step's.
        posterior = torch.cat([posterior[1:2] if len(betas) > 1 else self.betas, posterior[1:]])
        self._tables = {
            "alpha": self.alpha_bar.sqrt(),
            "sigma": (1 - self.alpha_bar).sqrt(),
            "alpha_before": before.sqrt(),
            "sigma_before": (1 - before).sqrt(),
            "of_data": self.betas * before.sqrt() / (1 - self.alpha_bar),
            "of_state": (1 - before) * (1 - self.betas).sqrt() / (1 - self.alpha_bar),
            "log_beta": self.betas.log(),
            "log_posterior": posterior.log(),
            # Beta, but for the first step: with it the data would be less likely than they need be.
            "log_large": torch.cat([posterior[:1], self.betas[1:]]).log(),
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    @classmethod
    def linear(
        cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02, fixed_variance: str = "large"
    ) -> BetaSchedule:
        """Betas that rise linearly (Ho et al. 2020; ADM, DiT and DiC)."""
        return cls(torch.linspace(start, end, steps, dtype=torch.float64), fixed_variance=fixed_variance)

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012, fixed_variance: str = "large"
    ) -> BetaSchedule:
        """Betas whose roots rise linearly (Rombach et al. 2022; Stable Diffusion, U-ViT-H)."""
        roots = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64)
        return cls(roots.square(), fixed_variance=fixed_variance)

    def __len__(self) -> int:
        return len(self.betas)

    def at(self, name: str, i: Index, x: Tensor) -> Tensor | float:
        """The coefficient `name` at step `i`, to multiply x (B, ...) with."""
        if isinstance(i, int):
            return self._tables[name][i].item()
        if x.device not in self._on_device:
            self._on_device[x.device] = {key: table.float().to(x.device) for key, table in self._tables.items()}
        return expand_as(self._on_device[x.device][name][i], x)

    def noised(self, data: Tensor, noise: Tensor, i: Index) -> Tensor:
        """x_i."""
        return self.at("alpha", i, data) * data + self.at("sigma", i, data) * noise

    def data(self, x: Tensor, noise: Tensor, i: Index) -> Tensor:
        """The data prediction (x_i - sigma_i noise) / alpha_i."""
        return (x - self.at("sigma", i, x) * noise) / self.at("alpha", i, x)

    def posterior_mean(self, data: Tensor, x: Tensor, i: Index) -> Tensor:
        """The mean of q(x_(i-1) | x_i, data) (Ho et al. 2020, eq. 7)."""
        return self.at("of_data", i, x) * data + self.at("of_state", i, x) * x

    def log_posterior_variance(self, x: Tensor, i: Index) -> Tensor:
        """The log variance of q(x_(i-1) | x_i, data), like x."""
        return torch.ones_like(x) * self.at("log_posterior", i, x)

    def log_variance(self, fraction: Tensor | None, x: Tensor, i: Index) -> Tensor:
        """The log variance of the model's step: between the posterior's, where `fraction` is -1, and log beta, where it
        is 1 (Nichol and Dhariwal 2021, eq. 15); without a fraction, `fixed_variance`."""
        if fraction is None and self.fixed_variance == "large":
            return torch.ones_like(x) * self.at("log_large", i, x)
        low = self.log_posterior_variance(x, i)
        if fraction is None:
            return low
        share = 0.5 * (fraction + 1)
        return share * self.at("log_beta", i, x) + (1 - share) * low

    def respaced(self, steps: int, strided: bool = False) -> BetaSchedule:
        """The schedule over `steps` of these steps: evenly from the first to the last, or every k-th from the first.

        They are ADM's and DiT's, its sums of rounded numbers included; one step alone is the first, as there.

        Raises UserError for a count that is out of range or, strided, not to be had with a whole stride.
        """
        count = len(self)
        if steps is None or not 1 <= steps <= count:
            raise UserError(f"steps={steps}: a schedule of {count} steps is respaced to between 1 and {count}")
        if strided:
            kept = _strided(count, steps)
        else:
            stride = (count - 1) / max(steps - 1, 1)
            kept = [round(i) for i in accumulate(repeat(stride, steps - 1), initial=0.0)]
        alpha_bar = self.alpha_bar[kept]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        return BetaSchedule(1 - alpha_bar / before, [self.times[i] for i in kept], self.fixed_variance)


def _strided(count: int, steps: int) -> list[int]:
    found = {len(range(0, count, stride)): stride for stride in range(count, 0, -1)}
    if steps not in found:
        near = sorted(sorted(found, key=lambda known: abs(known - steps))[:2])
        raise UserError(f"no whole stride takes {steps} of {count} steps; near are {near[0]} and {near[1]}")
    return list(range(0, count, found[steps]))
