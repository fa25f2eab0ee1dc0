"""`dic-repa bench data`: how fast data is prepared and read, against the same images in loose files, one at a time.

The loose files are as REPA's preprocessing leaves them: an uncompressed PNG and an .npy of moments for each image.
"""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from dic_repa.data.autoencoders import load_autoencoder
from dic_repa.data.latents import LatentDataset
from dic_repa.data.prepare import Preparation
from dic_repa.data.sources import open_source
from dic_repa.errors import UserError
from dic_repa.files.pictures import to_pil, unit_images
from dic_repa.protocols import Autoencoder, Samples
from dic_repa.recipe import Recipe
from dic_repa.recipe.build import build_dataset, import_plugins
from dic_repa.training import train
from dic_repa.training.inputs import PREFETCH, Batches


def bench_data(recipe: Recipe, samples: int = 2000, encoded: int = 64, steps: int = 20) -> dict:
    """Read `samples` of the recipe's data, encode a few of them, then train for some steps, half of which are timed.

    The recipe is changed. Returns `images_per_second` of each way to read, `to_loose_files` (the ratio to reading loose
    files one at a time), `training_images_per_second`, `waiting_share` (of a training step, for data) and `workers`.
    """
    import_plugins(recipe)
    data, accelerator = build_dataset(recipe.data), Accelerator()
    half = -(-steps // 2)  # the first half warms up, and is not reported
    with tempfile.TemporaryDirectory() as folder:
        speeds = _reading_and_preparing(data, Path(folder), samples, encoded, accelerator.device)
        with contextlib.closing(Batches(data, recipe, accelerator, start=0)) as batches:
            speeds["loader"] = _loader_speed(batches, samples, recipe.data.workers)
        recipe.train.steps, recipe.train.log_every = 2 * half, half
        recipe.train.sample_every, recipe.train.checkpoint_every = 0, 2 * half
        run = train(recipe, Path(folder) / "run")
        last = json.loads(run.metrics_file.read_text().splitlines()[-1])
    return {
        "images_per_second": speeds,
        "to_loose_files": {name: speed / speeds["loose files"] for name, speed in speeds.items()},
        "training_images_per_second": last["images_per_second"],
        "waiting_share": last["data_wait"],
        "workers": recipe.data.workers,
    }


def _reading_and_preparing(
    data: Samples, folder: Path, samples: int, encoded: int, device: torch.device
) -> dict[str, float]:
    stems = _write_loose_files(data, folder / "loose", samples)
    start = time.perf_counter()
    for stem in stems:  # in a plain loop, at best: they are in the page cache
        if (file := stem.with_suffix(".png")).is_file():
            with Image.open(file) as image:
                np.array(image)
        if (file := stem.with_suffix(".npy")).is_file():
            np.load(file, allow_pickle=False)
    speeds = {"loose files": len(stems) / (time.perf_counter() - start)}
    size = data[0]["image"].shape[-1] if "image" in data[0] else 0
    if size < 8:  # too small to be prepared
        return speeds
    none = load_autoencoder("none")
    speeds["prepare, no autoencoder"] = _prepare_speed(folder / "loose", folder / "pixels", none, size)
    if isinstance(data, LatentDataset) and data.spec.name != "none":
        try:
            autoencoder = data.autoencoder.to(device)
        except UserError as error:  # training needs only the moments
            print(f"prepare with {data.spec.name} is not measured: {error}", file=sys.stderr)
            return speeds
        _write_loose_files(data, folder / "few", encoded)
        speeds[f"prepare, {data.spec.name}"] = _prepare_speed(folder / "few", folder / "latents", autoencoder, size)
    return speeds


def _write_loose_files(data: Samples, folder: Path, count: int) -> list[Path]:
    """Write the first `count` samples as 00000/img00000000.png and .npy; their names without the ending."""
    stems = []
    for k in range(min(count, len(data))):
        sample, stem = data[k], folder / f"{k // 1000:05d}" / f"img{k:08d}"
        stem.parent.mkdir(exist_ok=True, parents=True)
        if "image" in sample:
            to_pil(unit_images(sample["image"])).save(stem.with_suffix(".png"), compress_level=0)
        if (latents := sample.get("moments", sample.get("x"))) is not None:
            np.save(stem.with_suffix(".npy"), latents.float().numpy())
        stems.append(stem)
    return stems


def _prepare_speed(source: Path, destination: Path, autoencoder: Autoencoder, size: int) -> float:
    """Images per second of `dic-repa prepare` by its defaults on a folder of images, from first to last byte."""
    images, start = open_source(source, skip_bad=True), time.perf_counter()
    preparation = Preparation(images, destination, autoencoder, size=size)
    preparation.begin()
    preparation.write_shards()
    preparation.finish()
    return len(images) / (time.perf_counter() - start)


def _loader_speed(batches: Iterator[dict[str, Tensor]], count: int, workers: int) -> float:
    """Samples per second, over at least `count` samples and four batches of each worker.

    The batches that the workers prepare ahead, while they start, come first and are not timed.
    """
    for _ in range(1 + workers * PREFETCH):
        next(batches)
    start, seen, taken = time.perf_counter(), 0, 0
    while seen < count or taken < 4 * workers:
        seen, taken = seen + len(next(iter(next(batches).values()))), taken + 1
    return seen / (time.perf_counter() - start)
