"""From a trained denoiser to batches of images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dic_repa.build import build_class_names, build_decoder, build_objective, import_plugins
from dic_repa.data.latents import pixels_decoder
from dic_repa.data.saved import SavedData
from dic_repa.decoding import decode_batches
from dic_repa.errors import UserError, did_you_mean
from dic_repa.models import load_denoiser
from dic_repa.models.compiled import CompiledDenoiser
from dic_repa.models.pretrained import CONFIG, WEIGHTS
from dic_repa.precision import tf32
from dic_repa.progress import detail
from dic_repa.recipe import GuidanceSection, Recipe, SampleSection, load_training_recipe
from dic_repa.samplers import CFGPlusPlus, Guidance, SolverInfo, create_grid, initial_noise, sample, solver_info
from dic_repa.training.ema import RAW
from dic_repa.training.manifest import MANIFEST, find_damage
from dic_repa.training.run_folder import RunFolder, meant_runs
from dic_repa.weights import load_weights, read_tensors, weights_fingerprint

_LABELS = 3
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Checkpoint:
    """A denoiser to sample from, with the recipe that it was trained by and what is known of its data."""

    denoiser: nn.Module
    recipe: Recipe
    source: Path
    data: SavedData | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names; their numbers where nothing tells them."""
        if self.data:
            return self.data.class_names
        return build_class_names(self.recipe.data, self.denoiser.num_classes)


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", recipe: Recipe | None = None, weights: str | None = None
) -> Checkpoint:
    """The denoiser of a run (of its newest checkpoint), of one checkpoint, or of an inference checkpoint.

    `weights` are 'ema', the average that is sampled from; 'raw', the model itself; or a further average such as
    'ema-0.999'. By default those of the recipe's `sample` section. `recipe` stands in for the one that a checkpoint of
    ours has beside its weights, and others lack. Its plugins are imported. A UserError says what `path` lacks.
    """
    folder = weights_folder(path)
    if (folder / "recipe.yaml").is_file():
        recipe = load_training_recipe(folder / "recipe.yaml")
    if recipe is None and not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} is neither a run nor a checkpoint: it has no recipe.yaml and no {CONFIG}{meant_runs(folder)}"
        )
    if recipe is None:
        raise UserError(
            f"{folder} has no recipe.yaml to tell objective and data size; put a training recipe there or pass --recipe"
        )
    import_plugins(recipe)
    if weights is None:
        weights = "ema" if folder == Path(path) else recipe.sample.weights
    source = folder if weights == "ema" else _other_weights(folder, weights)
    detail(f"weights: {source}")
    denoiser = load_denoiser(folder if weights == RAW else source)
    if weights == RAW:
        load_raw(denoiser, source)
    return Checkpoint(denoiser.to(device), recipe, source, SavedData.read(folder))


def weights_folder(path: str | Path) -> Path:
    """Where the weights that `load_checkpoint` takes of `path` are."""
    path = Path(path)
    if path.is_file():
        raise UserError(f"{path} is a file; {_folder_of(path)}")
    if not path.is_dir():
        raise UserError(f"there is no run or checkpoint folder {path}{meant_runs(path)}")
    folder = path
    is_run = (path / "recipe.yaml").is_file() and not (path / CONFIG).is_file()
    if is_run or (path / "checkpoints").is_dir():
        folder = RunFolder.open(path).newest_checkpoint("ema")
        if folder is None:
            raise UserError(f"{path} has no checkpoint yet")
    average = folder / "ema"
    is_average = average.is_dir() and not (average / "checkpoints").is_dir()  # that would be a run of this name
    return average if is_average else folder


def checkpoint_of(weights: Path) -> Path:
    """The training checkpoint that a folder of averaged weights lies in, links followed; or else this folder itself."""
    weights = weights.resolve()  # checkpoints/best is a link
    return weights.parent if (weights.parent / WEIGHTS).is_file() else weights


def load_raw(denoiser: nn.Module, checkpoint: Path) -> None:
    """Load the weights themselves of a training checkpoint, which are in one file with the heads'."""
    prefix, tensors = "denoiser.", read_tensors(checkpoint / WEIGHTS)[0]
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    load_weights(denoiser, own, checkpoint / WEIGHTS)


def _other_weights(ema: Path, name: str) -> Path:
    """The folder of the weights `name` in the checkpoint that the folder `ema` is in."""
    checkpoint = ema.parent
    if not (checkpoint / MANIFEST).is_file():
        raise UserError(f"{ema} has one set of weights alone, so not the weights '{name}'; leave --weights out")
    there = [RAW, *sorted(file.parent.name for file in checkpoint.glob(f"ema*/{CONFIG}"))]
    if name not in there:
        raise UserError(f"{checkpoint} has no weights '{name}'{did_you_mean(name, there)}")
    if damage := find_damage(checkpoint, WEIGHTS if name == RAW else name):
        raise UserError(f"{checkpoint} is damaged: {damage}")
    return checkpoint if name == RAW else checkpoint / name


def _folder_of(file: Path) -> str:
    """What to name in place of a file."""
    if (file.parent / CONFIG).is_file():
        return f"name its folder, {file.parent}"
    if file.suffix in (".pt", ".pth", ".safetensors"):
        return "`dic-repa convert` makes a folder of the authors' weights, to sample from"
    return "name the folder of a run or a checkpoint"


def weak_weights(settings: SampleSection) -> dict[str, str]:
    """The weaker model that `settings` guide with, as what tells samples from others; nothing where there is none.

    Its path would not tell that it has been trained on, or written over.
    """
    weak = settings.guidance and settings.guidance.weak
    return {"weak_weights": weights_fingerprint(weights_folder(weak) / WEIGHTS)} if weak else {}


def balanced_labels(recipe: Recipe, num_classes: int, num: int, classes: Sequence[int] | None = None) -> Tensor:
    """Labels (num,) that go round the `classes`, so that each is drawn as often as the others.

    By default all classes; only the null class for a model that was trained without labels (data without classes, or
    label dropout 1), which knows no other.
    """
    if classes is None:
        without = not num_classes or recipe.train.label_dropout == 1
        classes = [num_classes] if without else range(num_classes)
    return torch.tensor(list(classes), dtype=torch.int64).repeat(num // len(classes) + 1)[:num]


def random_labels(
    recipe: Recipe, num_classes: int, num: int, classes: Sequence[int] | None = None, seed: int = 0
) -> Tensor:
    """Labels (num,) drawn from the same `classes`, each from (seed, its index) alone."""
    choices = balanced_labels(recipe, num_classes, len(classes) if classes else max(1, num_classes), classes).unique()
    drawn = []
    for index in range(num):
        # A purpose of its own in the counter, beside those of dic_repa.samplers.noise.
        bits = np.random.Philox(key=[index, seed & (2**64 - 1)], counter=[0, 0, 0, _LABELS])
        drawn.append(np.random.Generator(bits).integers(len(choices)))
    return choices[torch.tensor(drawn)]


def draw_labels(
    recipe: Recipe, num_classes: int, settings: SampleSection, classes: Sequence[int] | None = None
) -> Tensor:
    """The labels (settings.num,) of samples of the `classes`, balanced or random, as `settings.classes` says."""
    if settings.classes == "random":
        return random_labels(recipe, num_classes, settings.num, classes, settings.seed)
    return balanced_labels(recipe, num_classes, settings.num, classes)


@dataclass
class Sampler:
    """All that turns noise into images: `sampler(labels)` yields batches (B, C, H, W) in [0, 1], on the CPU, in order.

    An image depends on (settings.seed, its index, its label) alone, whatever the batch size, but for an adaptive
    solver, whose steps suit a whole batch. `evaluations` is the number of network evaluations per image in the first
    batch; with `trace`, `states` are that batch's states from noise to data.

    Args:
        denoiser, objective: what was trained, and for what.
        settings: the solver with its options, guidance, batch size and seed.
        shape: (C, H, W) of the denoiser's data.
        weak: a denoiser of the same objective for autoguidance.
        decode: from the denoiser's data to images in [0, 1], `settings.decode_batch` at once.
    """

    denoiser: nn.Module
    objective: object
    settings: SampleSection
    shape: tuple[int, int, int]
    weak: nn.Module | None = None
    decode: Callable[[Tensor], Tensor] = pixels_decoder
    trace: bool = False
    evaluations: int = 0
    states: Sequence[Tensor] = ()
    times: Sequence[float] = ()
    _prepared: dict[int, tuple[nn.Module, nn.Module]] = field(default_factory=dict)  # by the identity of the original

    def __call__(self, labels: Tensor, indices: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Samples of the classes `labels` (N,) with the `indices` (0 to N - 1 by default) that tell their noise."""
        indices = range(len(labels)) if indices is None else indices
        check_labels(labels, self.denoiser.num_classes)
        settings, info = self.settings, solver_info(self.settings.solver)
        model = self._as_model(self._prepare(self.denoiser), info)
        weak = self.weak and self._as_model(self._prepare(self.weak), info)
        guidance, device = build_guidance(settings.guidance), next(self.denoiser.parameters()).device

        def samples() -> Iterator[Tensor]:
            nonlocal guidance
            size = settings.batch_size
            for start in range(0, len(labels), size):
                rows = list(range(start, min(start + size, len(labels))))
                wanted = len(rows)
                # Compiled for a full batch, the last one repeats an image to be of that size, rather than compile anew.
                # An adaptive solver's steps suit all that is in a batch, so there it would change the others.
                if start and settings.compile != "off" and info.kind != "adaptive":
                    rows += rows[-1:] * (size - wanted)
                velocity = guidance.bind(model, labels[rows].to(device), weak_model=weak)
                places = [indices[row] for row in rows]
                noise = initial_noise(self.shape, settings.seed, places).to(device)
                options = self._options(info, places)
                first = start == 0  # the details hold every state, which is too much to keep for each batch
                with self._exactly():
                    x = sample(velocity, noise, settings.solver, **options, return_info=first)
                if first:
                    x, details = x
                    self.evaluations = details.nfe
                    if self.trace:
                        self.states, self.times = details.states, details.times
                if not velocity.doubled:  # nor will the next batch fit
                    guidance = replace(guidance, doubled=False)
                yield x[:wanted]

        for images in decode_batches(samples(), self.to_images):
            # Who writes or judges them rounds to the nearest level, which leaves these as they are.
            yield (images * 255).floor() / 255 if settings.pixels == "truncate" else images

    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        device = next(self.denoiser.parameters()).device
        return tuple(self.decode(torch.zeros(1, *self.shape, device=device)).shape[-2:])

    def to_images(self, x: Tensor) -> Tensor:
        """States x decoded, `decode_batch` at once, since an autoencoder takes far more memory than they do."""
        with self._exactly():
            return torch.cat([self.decode(part) for part in x.split(self.settings.decode_batch)])

    def _exactly(self) -> AbstractContextManager[None]:
        """As exactly as the settings' precision says, whatever training or a measurement has asked for."""
        return tf32(self.settings.precision == "tf32")

    def _prepare(self, denoiser: nn.Module) -> nn.Module:
        """`denoiser` in the settings' precision, compiled where they say so.

        Cast at each call, not for each batch or step: a run's averaged weights have moved on since the last grid.
        """
        dtype = DTYPES[self.settings.precision]
        cast, prepared = self._prepared.get(id(denoiser), (None, None))
        if prepared is None:
            cast = denoiser if dtype == torch.float32 else copy.deepcopy(denoiser).to(dtype)
            compiles = self.settings.compile != "off"
            prepared = CompiledDenoiser(cast, self.settings.compile) if compiles else cast
            self._prepared[id(denoiser)] = cast, prepared
        elif cast is not denoiser:
            cast.load_state_dict(denoiser.state_dict())
        return prepared

    def _as_model(self, denoiser: nn.Module, info: SolverInfo):
        if info.process != "ddpm":
            return self.objective.velocity_model(denoiser)
        if not hasattr(self.objective, "noise_model"):
            raise UserError(f"solver '{info.name}' needs a model trained with the objective ddpm; take heun or dopri5")
        return self.objective.noise_model(denoiser)

    def _options(self, info: SolverInfo, indices: Sequence[int]) -> dict:
        s = self.settings
        given = ("rtol", "atol", "diffusion", "diffusion_norm", "last_step", "last_step_size", "eta", "clip", "options")
        options = {name: getattr(s, name) for name in given}
        options["steps"] = s.steps or (None if info.kind == "adaptive" else 50 if info.process == "ode" else 250)
        if s.grid and s.grid.times is None:
            options["times"] = create_grid(s.grid.name, **s.grid.options)
        elif s.grid:
            options |= {"times": s.grid.times, "steps": None}  # as many as the times make
        if info.process == "ddpm":
            return options | {"schedule": self.objective.schedule, "seed": s.seed, "indices": indices}
        options["path"] = self.objective.path
        return options if info.deterministic else options | {"seed": s.seed, "indices": indices}


class _Nothing(nn.Module):
    """A denoiser that predicts zero, to find out whether it could be sampled from at all."""

    num_classes = 1

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


def check_sampling(settings: SampleSection, objective) -> None:
    """A UserError now for what sampling by `settings` would fail on later: names, options and how they fit together."""
    sampler = Sampler(_Nothing(), objective, settings.model_copy(update={"batch_size": 1, "compile": "off"}), (1, 1, 1))
    for _ in sampler(torch.zeros(1, dtype=torch.int64)):
        pass


def build_guidance(section: GuidanceSection | None) -> Guidance:
    """The guidance of a recipe; a scale of 1 where there is none."""
    if section is None:
        return Guidance(1.0)
    kind = {"cfg": Guidance, "cfg++": CFGPlusPlus}[section.kind]
    return kind(section.scale, section.interval, section.channels, section.schedule, section.rescale, section.doubled)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """A UserError for a label that is neither a class nor the null class."""
    wrong = labels[(labels < 0) | (labels > num_classes)]
    if len(wrong):
        raise UserError(
            f"label {int(wrong[0])} is out of range: the model has {classes_in_words(num_classes)}, "
            f"and {num_classes} for none"
        )


def classes_in_words(num_classes: int) -> str:
    """'the classes 0 to 9', or 'no classes'."""
    return f"the classes 0 to {num_classes - 1}" if num_classes else "no classes"


def build_sampler(checkpoint: Checkpoint, settings: SampleSection) -> Sampler:
    """A sampler of the checkpoint's denoiser, with the objective and the data's shape of its recipe.

    A UserError where the guidance asks for what the model never learnt.
    """
    recipe, denoiser = checkpoint.recipe, checkpoint.denoiser
    guidance, weak = settings.guidance, None
    if guidance and guidance.weak:
        device = next(denoiser.parameters()).device
        weak = load_checkpoint(guidance.weak, device).denoiser
    elif guidance and guidance.scale != 1 and not denoiser.num_classes:
        raise UserError(
            f"{checkpoint.source} was trained on data without classes, so there is no class to guide towards; sample "
            "without guidance (--scale 1; sample.guidance=null in a recipe)"
        )
    elif guidance and guidance.scale != 1 and recipe.train.label_dropout == 0:
        raise UserError(
            f"{checkpoint.source} was trained without label dropout, so it has no null class to guide with; "
            "sample without guidance, or with a weaker model (guidance.weak)"
        )
    shape = (denoiser.in_channels, recipe.data.size, recipe.data.size)
    device = next(denoiser.parameters()).device
    decode = build_decoder(recipe.data, device, checkpoint.data, settings.autoencoder)
    return Sampler(denoiser, build_objective(recipe.objective), settings, shape, weak, decode)
