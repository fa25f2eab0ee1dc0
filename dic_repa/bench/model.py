"""`dic-repa bench model`: the forward pass of denoisers, side by side."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Measurement

from dic_repa.bench.device import DTYPES, check_precision, convolution_share, describe_device, peak_memory, precision
from dic_repa.bench.peak import measure_peak
from dic_repa.bench.report import add_ratios, speed
from dic_repa.bench.timing import interleave
from dic_repa.errors import UserError, did_you_mean, first_line, unknown_name
from dic_repa.models import create_denoiser, measure_cost
from dic_repa.models.compiled import CompiledDenoiser
from dic_repa.models.pretrained import Pretrained
from dic_repa.registry import Registry

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass
class Case:
    """A denoiser in one precision and layout, compiled or not, on a batch of one size."""

    label: str
    model: nn.Module
    gmacs: float
    precision: str
    inputs: tuple[Tensor, Tensor, Tensor]
    reference: Tensor

    @property
    def batch(self) -> int:
        return len(self.inputs[0])

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        with precision(self.precision):
            return self.model(*self.inputs)


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

    `baselines` are factories `package.module:name` or `file.py:name`, called with each denoiser: what they return runs
    beside it, eager. `NAME=FACTORY` is for the denoiser of that name only. Returns `environment` before and `after`,
    `peaks` (TFLOP/s by precision) and `rows`, one for each case. A row's `difference` is the relative error of its
    output against the same denoiser's in float32, eager.
    """
    for name in precisions:
        check_precision(name, device)
    check_baselines(names, baselines)
    environment = describe_device(device)
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
            models = [
                (case_label(name, kind, layout if len(layouts) > 1 else "", mode), mode, model) for mode in compiles
            ]
            if layout == layouts[0]:
                for baseline in baselines_of(name, baselines):
                    other = build_baseline(baseline, denoiser, size).to(DTYPES[kind]).eval()
                    models.append((f"{name} {kind} by {baseline.rpartition(':')[2]}", "off", other))
            for label, mode, model in models:
                called = model if mode == "off" else CompiledDenoiser(model, mode)
                cases += [
                    Case(label, called, gmacs, kind, (x.to(DTYPES[kind]), t, y), reference)
                    for (x, t, y), reference in zip(batch_inputs, references)
                ]
    limits = {kind: measure_peak(kind, device) for kind in precisions} if peaks else {}
    timings = interleave(cases, rounds, seconds, description="forward")
    rows = [_row(case, timing, limits.get(case.precision), device) for case, timing in zip(cases, timings)]
    add_ratios(rows)
    return {"environment": environment, "after": describe_device(device), "peaks": limits, "rows": rows}


def _row(case: Case, timing: Measurement, limits: dict[str, float] | None, device: torch.device) -> dict:
    row: dict[str, Any] = {"label": case.label, "batch": case.batch, "gmacs": case.gmacs, **speed(timing, case.batch)}
    row["tflops"] = 2 * case.gmacs * row["images_per_second"] / 1000
    if limits:
        row |= {f"{kind}_share": row["tflops"] / limit for kind, limit in limits.items()}
    if not (device.type == "cuda" and getattr(case.model, "graphs", False)):
        row |= inside(case, device)
    row["difference"] = float((case().float() - case.reference).norm() / case.reference.norm())
    return row


def inside(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """What a look inside of a call tells. Not of CUDA graphs, whose memory is set aside before and whose kernels belong
    to no operation: both would come out as next to nothing."""
    return {
        "memory_mb": peak_memory(call, device) / 1e6,
        "time_in_convolutions": convolution_share(call, device),
    }


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
    """A UserError for a baseline of what is not among the `names` to be measured."""
    for baseline in baselines:
        only, equals, _ = baseline.rpartition("=")
        if equals and only not in names:
            raise unknown_name(f"name in --baseline {baseline}:", only, names)


def build_baseline(name: str, denoiser: Pretrained, size: int) -> Any:
    """What the factory `name` makes of `denoiser`, on its device, tried on one input of `size`.

    A UserError where it cannot be made or called, or where its output has not the denoiser's shape.
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
    """The function `package.module:name` or `file.py:name`; a UserError where there is none."""
    place, colon, attribute = name.rpartition(":")
    if not colon:
        raise UserError(f"baseline '{name}' names no function; write FILE.py:FUNCTION or package.module:FUNCTION")
    try:
        if not place.endswith(".py"):
            return Registry("baseline").find(name)
        module = _import_file(Path(place), name)
    except UserError:
        raise
    except Exception as error:  # of the module itself, or of what it imports
        raise UserError(f"baseline '{name}': importing it gives {type(error).__name__}: {first_line(error)}") from error
    if not callable(getattr(module, attribute, None)):
        public = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"baseline '{name}': {place} has no '{attribute}' to call{did_you_mean(attribute, public)}")
    return getattr(module, attribute)


def _import_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"baseline '{name}': there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"baseline '{name}': {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
