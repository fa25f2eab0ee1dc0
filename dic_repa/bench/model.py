"""`dic-repa bench model`: the forward pass of denoisers, side by side."""

import copy
import itertools
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dic_repa.bench.device import look_inside
from dic_repa.bench.peaks import LAYOUTS, measure_peak, rounding
from dic_repa.bench.roofline import rooflines
from dic_repa.bench.timing import Settings, case_label, kernels_label, measure
from dic_repa.errors import UserError, did_you_mean, first_line
from dic_repa.models import create_denoiser, measure_cost
from dic_repa.models.compiled import CompiledDenoiser
from dic_repa.models.kernel_choice import set_kernels
from dic_repa.models.pretrained import Pretrained
from dic_repa.registry import import_plugin
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.sampling.sampler import DTYPES


@dataclass
class ModelCase:
    """A denoiser in one precision and layout, compiled or not, on a batch of one size."""

    label: str
    model: nn.Module
    operations: float
    precision: str
    inputs: tuple[Tensor, Tensor, Tensor]
    reference: Tensor

    def __post_init__(self):
        self.batch = len(self.reference)
        self.graphs = self.inputs[0].is_cuda and getattr(self.model, "graphs", False)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        with rounding(self.precision):
            return self.model(*self.inputs)

    def facts(self, device: torch.device) -> dict[str, Any]:
        difference = float((self().float() - self.reference).norm() / self.reference.norm())
        return {"gmacs": self.operations / 2, "difference": difference} | (
            {} if self.graphs else look_inside(self, device)
        )


def bench_model(
    names: Sequence[str],
    settings: Settings,
    layouts: Sequence[str] = ("channels_last",),
    size: int = 32,
    peaks: bool = True,
    roofline: bool = False,
) -> dict:
    """Time the forward pass of each denoiser as the settings say, in each memory layout, at `size` x `size`.

    Returns as `measure`, with `peaks`, the TFLOP/s that the device can do at most in each precision, if asked for, and
    the `rooflines` of the cases, which need them. A row's `difference` is the relative error of its output against the
    same denoiser's in float32, eager.
    """
    device, baselines, cases = settings.device, settings.baselines_of(names), []
    for name in names:
        torch.manual_seed(0)
        denoiser = randomise(create_denoiser(name)).to(device)
        set_kernels(denoiser, "off")  # what they must agree with
        operations = 2 * measure_cost(denoiser, size).macs / 1e9
        batch_inputs = [random_inputs(denoiser, batch, size, device) for batch in settings.batches]
        with torch.inference_mode(), gpu_arithmetic(tf32=False):
            references = [denoiser(*inputs) for inputs in batch_inputs]
        for kind, layout in itertools.product(settings.precisions, layouts):
            models: dict[str, nn.Module] = {}
            for kernels in settings.kernels:
                model = copy.deepcopy(denoiser).to(DTYPES[kind])
                model.to(memory_format=LAYOUTS[layout])
                set_kernels(model, kernels)
                shown = " ".join(filter(None, [layout if len(layouts) > 1 else "", kernels_label(kernels)]))
                for mode in settings.compiles:
                    label = case_label(name, kind, mode, shown)
                    models[label] = model if mode == "off" else CompiledDenoiser(model, mode)
            for baseline in baselines[name] if layout == layouts[0] else ():
                other = build_baseline(baseline, denoiser, size).to(DTYPES[kind]).eval()
                models[f"{name} {kind} by {baseline.rpartition(':')[2]}"] = other
            for label, called in models.items():
                for (x, t, y), reference in zip(batch_inputs, references):
                    cases.append(ModelCase(label, called, operations, kind, (x.to(DTYPES[kind]), t, y), reference))
    limits = {kind: measure_peak(kind, device) for kind in settings.precisions} if peaks or roofline else {}
    result = measure(cases, settings, "forward")
    for case, row in zip(cases, result["rows"]):
        row |= {f"{kind}_share": row["tflops"] / peak for kind, peak in limits.get(case.precision, {}).items()}
    return {"peaks": limits, **result} | ({"rooflines": rooflines(cases, device, limits)} if roofline else {})


def randomise(denoiser: Pretrained) -> Pretrained:
    """A new denoiser for timing: random where it starts at zero, so that nothing is skipped or trivial."""
    for parameter in denoiser.eval().requires_grad_(False).parameters():
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


def build_baseline(name: str, denoiser: Pretrained, size: int) -> Any:
    """What the factory `name` makes of `denoiser`, on its device, tried on one input of `size`; a UserError if it fails
    or its output does not have the denoiser's shape."""
    device = next(denoiser.parameters()).device
    inputs = random_inputs(denoiser, 1, size, device)
    with torch.no_grad():
        expected = denoiser(*inputs)
        try:
            other = load_factory(name)(denoiser).to(device)
            out = other(*inputs)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # anything that a user's own code may raise
            raise UserError(
                f"baseline '{name}' does not fit ({type(error).__name__}: {first_line(error)}); it is called with the "
                "denoiser, and returns an nn.Module that is called with (x, t, y)"
            ) from error
    shape = getattr(out, "shape", None)
    if shape != expected.shape:
        given = type(out).__name__ if shape is None else f"an output of shape {tuple(shape)}"
        raise UserError(f"baseline '{name}' gives {given}, the denoiser one of shape {tuple(expected.shape)}")
    return other


def load_factory(name: str) -> Any:
    """The function `package.module:name` or `file.py:name`."""
    place, colon, attribute = name.rpartition(":")
    if not colon:
        raise UserError(f"baseline '{name}' names no function; write FILE.py:FUNCTION or package.module:FUNCTION")
    if place.endswith(".py") and not Path(place).is_file():
        raise UserError(f"baseline '{name}': there is no file {place}")
    found = runpy.run_path(place) if place.endswith(".py") else vars(import_plugin(place))
    if not callable(found.get(attribute)):
        public = [key for key, value in found.items() if isinstance(value, type)]
        raise UserError(f"baseline '{name}': {place} has no '{attribute}' to call{did_you_mean(attribute, public)}")
    return found[attribute]
