"""`dic-repa bench model`: the forward pass of denoisers, side by side."""

from __future__ import annotations

import copy
import itertools
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dic_repa.bench.device import check_precisions, look_inside, precision
from dic_repa.bench.peak import measure_peak
from dic_repa.bench.timing import measure
from dic_repa.errors import UserError, did_you_mean, first_line, unknown_name
from dic_repa.models import create_denoiser, measure_cost
from dic_repa.models.compiled import CompiledDenoiser
from dic_repa.models.pretrained import Pretrained
from dic_repa.registry import Registry
from dic_repa.sampling.sampler import DTYPES

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass
class ModelCase:
    """A denoiser in one precision and layout, compiled or not, on a batch of one size."""

    label: str
    model: nn.Module
    gmacs: float
    precision: str
    inputs: tuple[Tensor, Tensor, Tensor]
    reference: Tensor
    peak: dict[str, float] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return len(self.inputs[0])

    @property
    def operations(self) -> float:
        return 2 * self.gmacs

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        with precision(self.precision):
            return self.model(*self.inputs)

    def facts(self, row: dict[str, Any], device: torch.device) -> dict[str, Any]:
        shares = {f"{kind}_share": row["tflops"] / peak for kind, peak in self.peak.items()}
        graphs = device.type == "cuda" and getattr(self.model, "graphs", False)
        found = {"gmacs": self.gmacs, **shares, **({} if graphs else look_inside(self, device))}
        return found | {"difference": float((self().float() - self.reference).norm() / self.reference.norm())}


def bench_model(
    names: Sequence[str],
    device: torch.device,
    precisions: Sequence[str] = ("fp32",),
    layouts: Sequence[str] = ("channels_last",),
    compiles: Sequence[str] = ("off",),
    batches: Sequence[int] = (1, 8),
    size: int = 32,
    baselines: Sequence[str] = (),
    rounds: int = 7,
    seconds: float = 0.2,
    peaks: bool = True,
) -> dict:
    """Time the forward pass of each denoiser in each precision, layout, compile mode and batch size, interleaved.

    Args:
        baselines: Factories `package.module:name` or `file.py:name`, called with each denoiser: what they return runs
            beside it, eager. `NAME=FACTORY` is for the denoiser of that name only.
        peaks: Whether to measure what the device can do at most, in each precision.

    Returns:
        As `measure`, with `peaks` (TFLOP/s by precision). A row's `difference` is the relative error of its output
        against the same denoiser's in float32, eager.
    """
    check_precisions(precisions, device)
    check_baselines(names, baselines)
    cases = []
    for name in names:
        denoiser = random_denoiser(name).to(device)
        gmacs = measure_cost(denoiser, size).macs / 1e9
        batch_inputs = [random_inputs(denoiser, batch, size, device) for batch in batches]
        with torch.inference_mode(), precision("fp32"):
            references = [denoiser(*inputs) for inputs in batch_inputs]
        for kind, layout in itertools.product(precisions, layouts):
            model = copy.deepcopy(denoiser).to(DTYPES[kind])
            model.to(memory_format=LAYOUTS[layout])
            shown = layout if len(layouts) > 1 else ""
            models: dict[str, nn.Module] = {
                case_label(name, kind, shown, mode): model if mode == "off" else CompiledDenoiser(model, mode)
                for mode in compiles
            }
            for baseline in baselines_of(name, baselines) if layout == layouts[0] else ():
                other = build_baseline(baseline, denoiser, size).to(DTYPES[kind]).eval()
                models[f"{name} {kind} by {baseline.rpartition(':')[2]}"] = other
            for label, called in models.items():
                for (x, t, y), reference in zip(batch_inputs, references):
                    cases.append(ModelCase(label, called, gmacs, kind, (x.to(DTYPES[kind]), t, y), reference))
    limits = {kind: measure_peak(kind, device) for kind in precisions} if peaks else {}
    for case in cases:
        case.peak = limits.get(case.precision, {})
    return {"peaks": limits, **measure(cases, device, rounds, seconds, "forward")}


def case_label(name: str, kind: str, layout: str, mode: str) -> str:
    how = {"off": "eager", "default": "compiled"}.get(mode, mode)
    return " ".join(part for part in (name, kind, layout, how) if part)


def random_denoiser(name: str, **options) -> Pretrained:
    """The denoiser `name` with random weights, those that start at zero too."""
    torch.manual_seed(0)
    return randomise(create_denoiser(name, **options).eval().requires_grad_(False))


def randomise(denoiser: Pretrained) -> Pretrained:
    """Give random values to what starts at zero, so that nothing is skipped or trivial."""
    for parameter in denoiser.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return denoiser


def random_inputs(denoiser: Pretrained, batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Data, times and labels of a batch, the same on every device."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, denoiser.in_channels, size, size, generator=generator)
    t = torch.rand(batch, generator=generator)
    y = torch.randint(denoiser.num_classes, (batch,), generator=generator)
    return x.to(device), t.to(device), y.to(device)


def baselines_of(name: str, baselines: Sequence[str]) -> list[str]:
    """The factories that are for `name`: those without a name, and those with this one."""
    split = [baseline.rpartition("=") for baseline in baselines]
    return [factory for only, _, factory in split if only in ("", name)]


def check_baselines(names: Sequence[str], baselines: Sequence[str]) -> None:
    """Raise a UserError for a baseline of a denoiser that is not among the `names`."""
    for baseline in baselines:
        only, equals, _ = baseline.rpartition("=")
        if equals and only not in names:
            raise unknown_name(f"name in --baseline {baseline}:", only, names)


def build_baseline(name: str, denoiser: Pretrained, size: int) -> Any:
    """What the factory `name` makes of `denoiser`, on its device, tried on one input of `size`.

    Raises:
        UserError: It cannot be made or called, or its output does not have the denoiser's shape.
    """
    factory, device = load_factory(name), next(denoiser.parameters()).device
    inputs = random_inputs(denoiser, 1, size, device)
    with torch.no_grad():
        expected = denoiser(*inputs)
        try:
            other = factory(denoiser).to(device)
            out = other(*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # anything that a function of the user's own may raise
            raise UserError(
                f"baseline '{name}' does not fit ({type(error).__name__}: {first_line(error)}); it is called with the "
                "denoiser, and returns an nn.Module that is called with (x, t, y)"
            ) from error
    shape = getattr(out, "shape", None)
    if shape != expected.shape:
        given = type(out).__name__ if shape is None else f"an output of shape {tuple(shape)}"
        raise UserError(f"baseline '{name}' gives {given}, the denoiser one of shape {tuple(expected.shape)}")
    return other


def load_factory(name: str) -> Callable[[nn.Module], nn.Module]:
    """The function `package.module:name` or `file.py:name`; a UserError if there is none."""
    place, colon, attribute = name.rpartition(":")
    if not colon:
        raise UserError(f"baseline '{name}' names no function; write FILE.py:FUNCTION or package.module:FUNCTION")
    if place.endswith(".py") and not Path(place).is_file():
        raise UserError(f"baseline '{name}': there is no file {place}")
    try:
        if not place.endswith(".py"):
            return Registry("baseline").find(name)
        found = runpy.run_path(place)
    except UserError:
        raise
    except Exception as error:  # of the module itself, or of what it imports
        raise UserError(f"baseline '{name}': importing it gives {type(error).__name__}: {first_line(error)}") from error
    if not callable(found.get(attribute)):
        public = [key for key, value in found.items() if isinstance(value, type)]
        raise UserError(f"baseline '{name}': {place} has no '{attribute}' to call{did_you_mean(attribute, public)}")
    return found[attribute]
