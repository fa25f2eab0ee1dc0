"""Pictures and a small autoencoder for the tests of data."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """Coarse noise of (width, height): different for each seed, and smooth enough for a JPEG."""
    values = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def as_file(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_tree(folder: Path, classes: dict[str, int], size: tuple[int, int] = (50, 40)) -> Path:
    """A class-per-folder tree of PNG files."""
    seed = 0
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for k in range(count):
            picture(seed, size).save(folder / name / f"{k:03d}.png")
            seed += 1
    return folder


def save_vae(folder: Path, seed: int = 0, std: float | None = None, **config) -> Path:
    """A tiny diffusers.AutoencoderKL with random weights; with `std`, its posterior has that deviation everywhere."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
            "latent_channels": 4,
        }
        model = AutoencoderKL(**options | config)
    if std is not None:
        channels = model.config.latent_channels
        with torch.no_grad():
            model.quant_conv.weight[channels:] = 0
            model.quant_conv.bias[channels:] = 2 * float(np.log(std))
    model.save_pretrained(folder)
    return folder
