"""Images in files: PNG, and many as one labelled picture."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.files.atomic import write_aside
from dic_repa.files.outputs import MARK, check_file

MOST_ROWS, GRID_HEIGHT, CELL = 20, 480, 48  # of a grid: rows at most, pixels, and those of an image at least
FIGURES = (".png", ".pdf", ".svg")
INK, BACKGROUND = (40, 40, 40), (250, 250, 250)


def unit_images(images: Tensor) -> Tensor:
    """uint8 images, which data sets give since they are a quarter of the bytes, as float32 in [0, 1]; floats as is."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def to_pil(image: Tensor) -> Image.Image:
    """One image (C, H, W) in [0, 1], of one or three channels, as a PIL image, rounded to the nearest of 256 levels."""
    array = (image * 255).round().to(torch.uint8).movedim(-3, -1).numpy()
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def save_png(image: Tensor, path: Path) -> None:
    """One image (C, H, W) in [0, 1], of one or three channels, as a PNG, written aside and renamed."""
    aside = path.with_name(f".writing-{path.name}")
    to_pil(image).save(aside, "PNG", compress_level=1)
    os.replace(aside, path)


def save_picture(image: Image.Image, path: str | Path) -> None:
    """Write a PIL image in the format of its ending, with our mark in its Exif data; see `write_aside`."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = MARK
    with write_aside(path) as aside, aside.open("wb") as file:
        image.save(file, Image.registered_extensions()[Path(path).suffix.lower()], exif=exif)


def check_figure(path: str | Path, endings: Sequence[str] = FIGURES) -> None:
    """A UserError if no picture may be written at `path`, or its ending is not one of the `endings`."""
    check_file(path)
    if Path(path).suffix.lower() not in endings:
        raise UserError(f"{path} is not a picture; end it in {', '.join(endings)}")


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, np.ndarray]:
    """A matplotlib figure without a window, of `size` (width, height) in inches, and its axes (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG, PDF or SVG, with our mark in its metadata; see `write_aside`."""
    check_figure(path)
    ending = Path(path).suffix.lower()[1:]
    metadata = {"Software" if ending == "png" else "Creator": MARK}
    with write_aside(path) as aside, aside.open("wb") as file:
        figure.savefig(file, format=ending, dpi=dpi, metadata=metadata)


def load_png(path: Path) -> Tensor:
    """A PNG as (C, H, W) in [0, 1]; a UserError names a damaged file."""
    array = load_levels(path, ("L", "RGB"))
    return torch.from_numpy(array).view(*array.shape[:2], -1).movedim(-1, 0).float() / 255


def load_levels(path: Path, modes: Sequence[str] = ("RGB",)) -> np.ndarray:
    """An image of one of our samples, uint8, (H, W, 3), or (H, W) if `modes` has "L"."""
    try:
        with Image.open(path) as image:
            return np.array(image if image.mode in modes else image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path} is not a whole image ({error}); remove it and sample again") from None


def shown_in_grid(labels: Tensor, columns: int) -> list[int]:
    """The indices of the images that a grid shows: a row of each of the first classes, or all of the only one."""
    found = labels.unique()[:MOST_ROWS]
    each = columns * MOST_ROWS if len(found) == 1 else columns
    return [i for label in found for i in (labels == label).nonzero()[:each, 0].tolist()]


def save_side_by_side(pictures: dict[str, Image.Image], path: Path) -> None:
    """Write pictures of the same height as one, each under its title."""
    font = ImageFont.load_default(size=20)
    head, gap = 36, 24
    widths = [max(picture.width, int(font.getlength(title)) + 1) for title, picture in pictures.items()]
    width = sum(widths) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, head + max(picture.height for picture in pictures.values())), BACKGROUND)
    draw, left = ImageDraw.Draw(sheet), 0
    for (title, picture), width in zip(pictures.items(), widths):
        draw.text((left + width // 2, head // 2), title, fill=INK, font=font, anchor="mm")
        sheet.paste(picture, (left, head))
        left += width + gap
    save_picture(sheet, path)


def draw_grid(
    images: Tensor, labels: Tensor, class_names: Sequence[str], columns: int, headings: Sequence[str] = ()
) -> Image.Image:
    """The images (N, C, H, W) in [0, 1] of `shown_in_grid` as one picture: a row for each class, with its name, and
    `headings` above the columns. Small ones are enlarged by a whole number: to `CELL` pixels at least, and more if the
    grid stays below `GRID_HEIGHT`.
    """
    shown = shown_in_grid(labels, columns)
    images, labels = images[shown], labels[shown]
    captions = dict(enumerate(class_names))
    rows = [
        (captions.get(label, "none"), row)
        for label in labels.unique().tolist()
        for row in images[labels == label].split(columns)
    ]
    size = images.shape[-1]
    scale = max(-(-CELL // size), GRID_HEIGHT // (size * len(rows)))
    cell, gap = size * scale, max(2, scale // 2)
    font = ImageFont.load_default(size=max(11, min(28, cell // 2)))
    margin = int(max(font.getlength(caption) for caption, _ in rows)) + 16
    widest = max(len(row) for _, row in rows)
    small_size = max(8, min(28, cell // 4))
    small = ImageFont.load_default(size=small_size)
    head = small_size + 8 if headings else 0
    sheet = Image.new("RGB", (margin + widest * (cell + gap), head + len(rows) * (cell + gap) + gap), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for j, heading in enumerate(headings[:widest]):
        middle = margin + j * (cell + gap) + cell // 2
        draw.text((middle, head // 2 + 2), heading, fill=INK, font=small, anchor="mm")
    for i, (caption, row) in enumerate(rows):
        top = head + gap + i * (cell + gap)
        draw.text((margin - 8, top + cell // 2), caption, fill=INK, font=font, anchor="rm")
        for j, image in enumerate(row):
            tile = to_pil(image[:3]).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + j * (cell + gap), top))
    return sheet
