"""How fast data is prepared and read, against reading the same images from loose files one at a time.

The loose files are as REPA's preprocessing leaves them: an uncompressed PNG and an .npy of moments for each image.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dic_repa.data.autoencoders import Autoencoder
from dic_repa.data.prepare import PrepareSettings, begin, finish, write_shards
from dic_repa.data.sources import open_source
from dic_repa.protocols import Samples

PER_FOLDER = 1000


def write_loose_files(data: Samples, folder: Path, count: int) -> list[Path]:
    """Write the first `count` samples as 00000/img00000000.png and .npy; their names without the ending."""
    stems = []
    for k in range(min(count, len(data))):
        sample, stem = data[k], folder / f"{k // PER_FOLDER:05d}" / f"img{k:08d}"
        stem.parent.mkdir(exist_ok=True, parents=True)
        if "image" in sample:
            image = sample["image"]
            levels = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
            Image.fromarray(levels.permute(1, 2, 0).squeeze(-1).numpy()).save(
                stem.with_suffix(".png"), compress_level=0
            )
        latents = sample.get("moments", sample.get("x"))
        if latents is not None:
            np.save(stem.with_suffix(".npy"), latents.float().numpy())
        stems.append(stem)
    return stems


def loose_files_speed(stems: list[Path]) -> float:
    """Samples per second of a plain loop over loose files, which are in the page cache, as in the best case."""
    begin = time.perf_counter()
    for stem in stems:
        for file in (stem.with_suffix(".png"), stem.with_suffix(".npy")):
            if file.suffix == ".npy" and file.is_file():
                np.load(file, allow_pickle=False)
            elif file.is_file():
                with Image.open(file) as image:
                    np.array(image)
    return len(stems) / (time.perf_counter() - begin)


def prepare_speed(source: Path, destination: Path, autoencoder: Autoencoder, size: int) -> float:
    """Images per second of `dic-repa prepare` by its defaults on a folder of images, from first to last byte."""
    images, settings, start = open_source(source, skip_bad=True), PrepareSettings(size=size), time.perf_counter()
    begin(images, destination, autoencoder.spec, settings)
    write_shards(images, destination, autoencoder, settings)
    finish(images, destination, autoencoder.spec, settings)
    return len(images) / (time.perf_counter() - start)


def loader_speed(batches, count: int, workers: int = 0, prefetch: int = 0) -> float:
    """Samples per second of an iterator of batches, over `count` samples and four batches of each worker at least.

    The clock runs once as many batches as the workers prepare ahead are gone: those were made while they started.
    """
    for _ in range(1 + workers * prefetch):
        next(batches)
    begin, seen, taken = time.perf_counter(), 0, 0
    while seen < count or taken < 4 * workers:
        seen, taken = seen + len(next(batches)["label"]), taken + 1
    return seen / (time.perf_counter() - begin)
