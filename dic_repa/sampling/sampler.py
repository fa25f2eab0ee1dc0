"""From a trained denoiser to batches of images."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dic_repa.conditions import NoCondition, condition_of_model
from dic_repa.data.autoencoders import Pixels
from dic_repa.errors import UserError
from dic_repa.models.compiled import AUTO, BY_BLOCK, CompiledDenoiser, can_compile
from dic_repa.models.pretrained import Pretrained
from dic_repa.recipe import GuidanceSection, SampleSection
from dic_repa.runtime.copies import send
from dic_repa.runtime.precision import gpu_arithmetic
from dic_repa.samplers import Guidance, SolverInfo, initial_noise, sample, solver_info, time_grids
from dic_repa.samplers.ddpm import split_output
from dic_repa.samplers.field import Watched
from dic_repa.samplers.guidance import guidances

# Solves for some rows of a batch: (rows, velocity, noise (B, C, H, W), solver, **options) -> x, or (x, SampleInfo).
Solve = Callable[..., Any]
# Denoiser evaluations of a batch that are worth compiling by block: DiC-XL gains 12 of 29 ms in each on a H200, at
# batch 32, and takes 10 s to compile.
MANY = 1000
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Sampler:
    """All that turns noise into images: `sampler(labels)` yields batches (B, C, H, W) in [0, 1], on the CPU, in order.

    An image depends on (settings.seed, its index, its label) alone, whatever the batch size, but for an adaptive
    solver, whose steps suit a whole batch. `evaluations` is the number of network evaluations per image in the first
    batch; with `trace`, `states` are that batch's states from noise to data, at `times`. `watch`, if given, is told of
    each evaluation: the row that its batch begins with, the time, and a function that gives the data prediction
    (B, C, H, W); what it raises ends the sampling.

    Args:
        denoiser, objective: what was trained, and for what.
        settings: the solver with its options, guidance, batch size and seed.
        shape: (C, H, W) of the denoiser's data.
        weak: a denoiser of the same objective for autoguidance.
        decode: from the denoiser's data to images in [0, 1], `settings.decode_batch` at once.
        condition: what the labels name; by default the denoiser's own, without examples.
        noise: (N, C, H, W), what each label's image starts from, in place of the seed's; standard normal, whatever the
            path makes of it.
    """

    denoiser: Pretrained
    objective: Any
    settings: SampleSection
    shape: tuple[int, int, int]
    weak: Pretrained | None = None
    decode: Callable[[Tensor], Tensor] = Pixels().decode
    condition: Any = None
    noise: Tensor | None = None
    trace: bool = False
    watch: Callable[[int, float, Callable[[], Tensor]], None] | None = None
    evaluations: int = 0
    states: Sequence[Tensor] = ()
    times: Sequence[float] = ()
    _cast: dict[int, Pretrained] = field(default_factory=dict)  # by the identity of the original
    _compiled: dict[tuple[int, str], CompiledDenoiser] = field(default_factory=dict)  # and by mode

    def __post_init__(self) -> None:
        self.condition = self.condition or condition_of_model(self.denoiser) or NoCondition()

    def __call__(
        self, labels: Tensor, indices: Sequence[int] | None = None, solve: Solve | None = None
    ) -> Iterator[Tensor]:
        """Samples for the `labels` (N,), with the noise of the `indices`, by default 0 to N - 1."""
        for images in decode_batches(self.solved(labels, indices, solve), self.to_images):
            # Later rounding to the nearest level leaves these as they are.
            yield (images * 255).floor() / 255 if self.settings.pixels == "truncate" else images

    def solved(
        self, labels: Tensor, indices: Sequence[int] | None = None, solve: Solve | None = None
    ) -> Iterator[Tensor]:
        """The same as the denoiser's data (B, C, H, W), on its device; `solve` replaces the way from noise to data."""
        indices = range(len(labels)) if indices is None else indices
        solve = solve or _from_noise
        y = self.condition.rows(labels)
        settings, info = self.settings, solver_info(self.settings.solver)
        many = math.ceil(len(labels) / settings.batch_size) * self._steps(info) >= MANY
        mode = self._mode(many)
        model = self._as_model(self._prepare(self.denoiser, mode), info)
        weak = self.weak and self._as_model(self._prepare(self.weak, mode), info)
        guidance, device = build_guidance(settings.guidance), next(self.denoiser.parameters()).device

        size = settings.batch_size
        for start in range(0, len(labels), size):
            rows = list(range(start, min(start + size, len(labels))))
            wanted = len(rows)
            # Compiled for a full batch, the last batch is filled up with copies of an image, not compiled anew.
            # Not with an adaptive solver: its steps depend on all images of a batch.
            if start and mode != "off" and info.kind != "adaptive":
                rows += rows[-1:] * (size - wanted)
            velocity = guidance.bind(model, send(y[rows], device), weak_model=weak)
            places = [indices[row] for row in rows]
            drawn = initial_noise(self.shape, settings.seed, places) if self.noise is None else self.noise[rows]
            noise = send(drawn, device)  # as soon as the GPU has been given the batch before, which it is still at
            options = self._options(info, places)
            first = start == 0  # the details hold every state: too much for each batch
            watched = Watched(velocity, partial(self._tell, info, start)) if self.watch else velocity
            with self._exactly(benchmark=many):
                x = solve(rows, watched, noise, settings.solver, **options, return_info=first)
            if first:
                x, details = x
                self.evaluations = details.nfe
                if self.trace:
                    self.states, self.times = details.states, details.times
            if not velocity.doubled:  # the memory was too small, as it will be for the next batch
                guidance = replace(guidance, doubled=False)
            yield x[:wanted]

    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        device = next(self.denoiser.parameters()).device
        *_, height, width = self.decode(torch.zeros(1, *self.shape, device=device)).shape
        return height, width

    def to_images(self, x: Tensor) -> Tensor:
        """States x decoded, `decode_batch` at once, since an autoencoder needs much memory."""
        with self._exactly():
            return torch.cat([self.decode(part) for part in x.split(self.settings.decode_batch)])

    def trajectory(self, images: int, stages: int = 9) -> tuple[Tensor, list[float]]:
        """The first images on their way from noise (images, stages, C, H, W), in [0, 1], and the stages' times."""
        chosen = torch.linspace(0, len(self.states) - 1, min(stages, len(self.states))).round().long().tolist()
        shown = torch.stack([self.to_images(self.states[stage][:images]).cpu() for stage in chosen], dim=1)
        return shown, [self.times[stage] for stage in chosen]

    def _tell(self, info: SolverInfo, start: int, x: Tensor, t: Tensor, value: Tensor) -> None:
        def data() -> Tensor:
            if info.process != "ddpm":
                return self.objective.path.convert(value, x, t, "velocity", "data")
            schedule = self.objective.schedule
            return schedule.data(x, split_output(value, x.shape[1])[0], round(float(t[0]) * len(schedule)) - 1)

        assert self.watch is not None
        self.watch(start, float(t[0]), data)

    def _exactly(self, benchmark: bool = False) -> AbstractContextManager[None]:
        """Float32 products as exact as the settings' precision says, whatever was set before."""
        return gpu_arithmetic(self.settings.precision == "tf32", benchmark=benchmark)

    def _mode(self, many: bool) -> str:
        """`settings.compile` where the denoiser is evaluated `many` times or not; never 'auto'."""
        if self.settings.compile != AUTO:
            return self.settings.compile
        device = next(self.denoiser.parameters()).device
        return BY_BLOCK if many and can_compile(self.denoiser, device) else "off"

    def _prepare(self, denoiser: Pretrained, mode: str) -> nn.Module:
        """`denoiser` in the settings' precision, compiled if the `mode` is not 'off'.

        Cast at each call, since a run's averaged weights have changed since the last grid; not for each batch.
        """
        dtype, key = DTYPES[self.settings.precision], id(denoiser)
        if dtype == torch.float32:
            self._cast[key] = denoiser
        elif key in self._cast:
            self._cast[key].load_state_dict(denoiser.state_dict())
        else:
            self._cast[key] = copy.deepcopy(denoiser).to(dtype)
        if mode == "off":
            return self._cast[key]
        if (key, mode) not in self._compiled:
            self._compiled[key, mode] = CompiledDenoiser(self._cast[key], mode)
        return self._compiled[key, mode]

    def _steps(self, info: SolverInfo) -> int:
        """Of the solver; about how many, if it is adaptive."""
        s = self.settings
        if s.grid and s.grid.times:
            return len(s.grid.times) - 1
        return s.steps or (50 if info.process == "ode" else 250)

    def _as_model(self, denoiser: nn.Module, info: SolverInfo):
        if info.process != "ddpm":
            return self.objective.velocity_model(denoiser)
        if not hasattr(self.objective, "noise_model"):
            raise UserError(f"solver '{info.name}' needs a model trained with the objective ddpm; take heun or dopri5")
        return self.objective.noise_model(denoiser)

    def _options(self, info: SolverInfo, indices: Sequence[int]) -> dict:
        s = self.settings
        options = {key: getattr(s, key) for key in s.solver_keys() if key != "grid"}
        options["steps"] = s.steps or (None if info.kind == "adaptive" else self._steps(info))
        if s.grid and s.grid.times is None:
            grid = time_grids.create(s.grid.name, **s.grid.options)
            options["times"] = grid.of(math.prod(self.shape)) if hasattr(grid, "of") else grid
        elif s.grid:
            options |= {"times": s.grid.times, "steps": None}  # as many as the times make
        if info.process == "ddpm":
            return options | {"schedule": self.objective.schedule, "seed": s.seed, "indices": indices}
        options["path"] = self.objective.path
        return options if info.deterministic else options | {"seed": s.seed, "indices": indices}


def _from_noise(_rows: list[int], velocity: Any, noise: Tensor, solver: str, **options: Any) -> Any:
    return sample(velocity, getattr(options.get("path"), "noise_scale", 1.0) * noise, solver, **options)


def decode_batches(samples: Iterable[Tensor], decode: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """The images of each batch of `samples`, on the CPU, in order.

    On a GPU a batch is decoded and copied on a second stream, and handed out when the next batch is on its way: neither
    decoding nor saving keeps the sampler waiting.
    """
    stream, pending = None, None
    for x in samples:
        if not x.is_cuda:
            yield decode(x)
            continue
        stream = stream or torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            x.record_stream(stream)
            images = decode(x).to("cpu", non_blocking=True)  # into pinned memory, which torch takes for such a copy
            done = stream.record_event()
        if pending:
            yield _finished(*pending)
        pending = images, done
    if pending:
        yield _finished(*pending)


def _finished(images: Tensor, done: torch.cuda.Event) -> Tensor:
    done.synchronize()
    return images


class _Nothing(Pretrained):
    """A denoiser that predicts zero, to try settings with; also at a middle head, if they guide by one."""

    num_classes = 1

    def __init__(self, middle: bool) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(()))
        self.middle_head = nn.Identity() if middle else None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(len(x), (2 if self.middle_head else 1) * x.shape[1], *x.shape[2:])


def check_sampling(settings: SampleSection, objective) -> None:
    """Raise a UserError for names and options that sampling by `settings` would fail on later."""
    middle = settings.guidance is not None and settings.guidance.internal != 1
    one = settings.model_copy(update={"batch_size": 1, "compile": "off"})
    sampler = Sampler(_Nothing(middle), objective, one, (1, 1, 2))  # two numbers, for guidance.rescale
    for _ in sampler(torch.zeros(1, dtype=torch.int64)):
        pass


def build_guidance(section: GuidanceSection | None) -> Guidance:
    """The guidance of a recipe; a scale of 1 if it has none."""
    if section is None:
        return Guidance(1.0)
    s = section
    internal = {"internal": s.internal, "internal_interval": s.internal_interval} if s.internal != 1 else {}
    return guidances.create(s.kind, s.scale, s.interval, s.channels, s.schedule, s.rescale, s.doubled, **internal)
