"""How fast data comes, against reading the same samples from loose files one at a time."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset


def loose_files_speed(data: Dataset, count: int) -> float:
    """Samples per second of a plain loop over loose files, a PNG and an .npy for each sample, as in REPA's layout.

    `count` samples are written to a temporary folder first; the files are then in the page cache, as in the best case.
    """
    with tempfile.TemporaryDirectory() as folder:
        count, names = min(count, len(data)), []
        for k in range(count):
            sample, stem = data[k], Path(folder) / f"{k // 1000:05d}" / f"img{k:08d}"
            stem.parent.mkdir(exist_ok=True)
            if "image" in sample:
                pixels = (sample["image"] * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
                Image.fromarray(pixels).save(stem.with_suffix(".png"))
            latents = sample.get("moments", sample.get("x"))
            if latents is not None:
                np.save(stem.with_suffix(".npy"), latents.float().numpy())
            names.append(stem)
        begin = time.perf_counter()
        for stem in names:
            for file in (stem.with_suffix(".png"), stem.with_suffix(".npy")):
                if file.suffix == ".npy" and file.is_file():
                    np.load(file, allow_pickle=False)
                elif file.is_file():
                    with Image.open(file) as image:
                        np.array(image)
        return count / (time.perf_counter() - begin)


def loader_speed(batches, count: int) -> float:
    """Samples per second of an iterator of batches, over about `count` samples; the first batch starts the workers."""
    next(batches)
    begin, seen = time.perf_counter(), 0
    while seen < count:
        seen += len(next(batches)["label"])
    return seen / (time.perf_counter() - begin)
