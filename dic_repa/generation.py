"""From a trained denoiser to images: batches of samples, PNG files and a labelled grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from dic_repa.build import build_objective
from dic_repa.errors import UserError
from dic_repa.models import DiC
from dic_repa.recipe import Recipe, SampleSection, load_training_recipe
from dic_repa.samplers import Guidance, initial_noise, sample_ode, sample_sde
from dic_repa.samplers.catalog import solver_info
from dic_repa.training.run_folder import RunFolder


@dataclass
class Checkpoint:
    """A denoiser to sample from, with the recipe that it was trained by."""

    denoiser: nn.Module
    recipe: Recipe
    source: Path


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """The averaged weights of a run (of its newest checkpoint), of one checkpoint, or of an inference checkpoint.

    A UserError says what `path` lacks.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no run or checkpoint folder {path}")
    folder = path
    if (path / "checkpoints").is_dir():
        folder = RunFolder.open(path).newest_checkpoint()
        if folder is None:
            raise UserError(f"{path} has no checkpoint yet")
    if (folder / "ema").is_dir():
        folder = folder / "ema"
    denoiser = DiC.from_pretrained(folder).to(device)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} has no recipe.yaml, which tells the objective and the size of the data")
    return Checkpoint(denoiser, load_training_recipe(folder / "recipe.yaml"), folder)


def balanced_labels(num: int, classes: Sequence[int]) -> Tensor:
    """Labels (num,) that go round the `classes`, so that each is drawn as often as the others."""
    return torch.tensor(list(classes), dtype=torch.int64).repeat(num // len(classes) + 1)[:num]


def generate(
    denoiser: nn.Module, objective, settings: SampleSection, shape: tuple[int, int, int], labels: Tensor
) -> Iterator[Tensor]:
    """Samples of the classes `labels` (N,) in batches: images (B, C, H, W) in [0, 1], on the CPU, in order.

    Sample i depends on (settings.seed, i, labels[i]) alone. `shape` is the (C, H, W) of the denoiser's data. A
    UserError names a label that is out of range.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > denoiser.num_classes:
        raise UserError(
            f"label {low if low < 0 else high} is out of range: the model has classes 0 to {denoiser.num_classes - 1}, "
            f"and {denoiser.num_classes} for none"
        )
    device = next(denoiser.parameters()).device
    model = objective.velocity_model(denoiser)
    guidance = Guidance(settings.guidance.scale, settings.guidance.interval) if settings.guidance else Guidance(1.0)
    for start in range(0, len(labels), settings.batch_size):
        y = labels[start : start + settings.batch_size]
        indices = range(start, start + len(y))
        noise = initial_noise(shape, settings.seed, indices).to(device)
        field = guidance.bind(model, y.to(device))
        if solver_info(settings.solver).process == "sde":
            solver = {"solver": settings.solver, "steps": settings.steps, "seed": settings.seed, "indices": indices}
            x = sample_sde(field, noise, objective.path, **solver)
        else:
            x = sample_ode(field, noise, settings.solver, settings.steps)
        yield (x.float() / 2 + 0.5).clamp(0, 1).cpu()


def generate_from(checkpoint: Checkpoint, settings: SampleSection, labels: Tensor) -> Iterator[Tensor]:
    """`generate` with the objective and the data's shape of the checkpoint's recipe."""
    size = checkpoint.recipe.data.size
    shape = (checkpoint.denoiser.in_channels, size, size)
    return generate(checkpoint.denoiser, build_objective(checkpoint.recipe.objective), settings, shape, labels)


def to_uint8(images: Tensor) -> Tensor:
    """Images (..., C, H, W) in [0, 1] as uint8 (..., H, W, C), rounded to the nearest level."""
    return (images * 255).round().to(torch.uint8).movedim(-3, -1)


def save_png(image: Tensor, path: Path) -> None:
    """One image (C, H, W) in [0, 1], of one or three channels, as a PNG."""
    array = to_uint8(image).numpy()
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(path)


def load_png(path: Path) -> Tensor:
    """A PNG as (C, H, W) in [0, 1]; a UserError names a file that is no whole image."""
    try:
        with Image.open(path) as image:
            array = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path} is not a whole image ({error})") from None
    return torch.from_numpy(array).view(*array.shape[:2], -1).movedim(-1, 0).float() / 255


def save_grid(
    images: Tensor, path: Path, labels: Tensor, class_names: Sequence[str], columns: int, height: int = 480
) -> None:
    """Images (N, C, H, W) in [0, 1] as one picture, a row for each class, its name in front.

    At most `columns` of each class are shown; small images are enlarged by a whole number until the grid is about
    `height`.
    """
    rows = [(int(label), images[labels == label][:columns]) for label in labels.unique()]
    size = images.shape[-1]
    scale = max(1, height // (size * len(rows)))
    cell, gap = size * scale, max(2, scale // 2)
    font = ImageFont.load_default(size=max(11, min(28, cell // 2)))
    margin = int(max(font.getlength(_name(label, class_names)) for label, _ in rows)) + 16
    widest = max(len(row) for _, row in rows)
    sheet = Image.new("RGB", (margin + widest * (cell + gap), len(rows) * (cell + gap) + gap), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for i, (label, row) in enumerate(rows):
        top = gap + i * (cell + gap)
        draw.text((margin - 8, top + cell // 2), _name(label, class_names), fill=(40, 40, 40), font=font, anchor="rm")
        for j, image in enumerate(row):
            array = to_uint8(image.expand(3, -1, -1) if len(image) == 1 else image[:3]).numpy()
            tile = Image.fromarray(array).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + j * (cell + gap), top))
    sheet.save(path)


def _name(label: int, class_names: Sequence[str]) -> str:
    return class_names[label] if label < len(class_names) else "none"
