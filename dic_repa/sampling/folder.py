"""A folder of many samples: several processes fill it, and after a kill the same command continues.

    000000.png, 000001.png, ...    samples.json    what they are: checkpoint, settings, the label of each

Images are sampled in blocks of `batch_size` consecutive indices. A block that lacks an image is sampled as a whole, so
every image is always computed in the same batch and is the same to the bit, whatever the number of processes and kills.
(Another batch size may round differently; with an adaptive solver, whose steps depend on the whole batch, images then
change within its tolerances.)
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from dic_repa.conditions import VectorCondition
from dic_repa.errors import UserError, print_rank_errors, when_interrupted
from dic_repa.files.atomic import write_whole
from dic_repa.files.hashing import fingerprint
from dic_repa.files.lock import locked
from dic_repa.files.npz import NpzFile, write_npz
from dic_repa.files.outputs import (
    Marker,
    begin_folder,
    check_folder,
    foreign,
    remove_leftovers,
    remove_listed,
    write_marker,
)
from dic_repa.files.pictures import draw_grid, load_levels, load_png, save_picture, save_png, shown_in_grid
from dic_repa.files.reading import read_json
from dic_repa.files.weights import weights_fingerprint
from dic_repa.recipe import SampleSection
from dic_repa.recipe.keys import flatten
from dic_repa.runtime.processes import entered_by_main, on_main_process
from dic_repa.runtime.progress import progress_bar, say
from dic_repa.samplers import solver_info
from dic_repa.samplers.noise import STEP_NOISE
from dic_repa.sampling import SAMPLES_FILE, SAMPLES_NPZ
from dic_repa.sampling.load import Checkpoint
from dic_repa.sampling.sampler import Sampler
from dic_repa.sampling.weights import weak_weights

WRITERS = 4  # threads that compress PNG files while the next batch is sampled
_NAMES = (SAMPLES_FILE, SAMPLES_NPZ, "grid.png", "trajectory.png")
_CHANGEABLE = {
    "checkpoint",  # its place alone; its weights are compared
    "sample.guidance.weak",
    "sample.num",
    "sample.batch_size",
    "sample.decode_batch",
    "sample.autoencoder",  # checked by its weights
    "evaluations_per_image",
    "labels",
}


def completed(record: dict) -> Any:
    """A record of samples with the keys that an earlier version did not have, which stand for their defaults."""
    sample = record.get("sample")
    if isinstance(sample, dict) and "num" in sample:
        with contextlib.suppress(ValueError):  # damaged, which is told later
            return record | {"sample": SampleSection.model_validate(sample).model_dump(mode="json")}
    return record


class SampleFolder:
    """A folder of samples, and what it shall hold.

    Args:
        spec: What determines the images. A folder with samples of another spec is refused; more images of the same spec
            are added to those that are there.
        hint: What to do about a folder that is refused.
    """

    def __init__(self, path: str | Path, spec: dict, hint: str = "pass --overwrite, or another folder with --out"):
        self.path, self.spec, self.hint = Path(path), spec, hint
        self.num, self.block = spec["sample"]["num"], spec["sample"]["batch_size"]

    def check(self, overwrite: bool = False) -> None:
        """Raise a UserError for anything else in the folder, or for other samples unless `overwrite`."""
        if check_folder(self.path, "samples") is None:
            return
        coming = Marker("samples", {*_NAMES, "metrics.json"}, self.num)
        if taken := [name for name in foreign(self.path) if name in coming]:
            raise UserError(
                f"{self.path / taken[0]} is in the way, and not one of these samples; move it, or name another folder"
            )
        if overwrite or not (self.path / SAMPLES_FILE).exists():
            return
        hint = self.hint
        before = completed(read_json(self.path / SAMPLES_FILE, hint, dict))
        fixed = set(_CHANGEABLE)
        if solver_info(self.spec["sample"]["solver"]).kind == "adaptive":
            fixed -= {"sample.num", "sample.batch_size"}
        old, new = flatten(before), flatten(completed(self.spec))
        changed = [key for key in {**old, **new} if key not in fixed and old.get(key) != new.get(key)]
        if changed == ["step_noise"]:
            raise UserError(f"an earlier version made {self.path}, from other noise for the solver's steps; {hint}")
        if changed:
            raise UserError(f"{self.path} exists with other samples ({', '.join(changed)} differ); {hint}")
        if not isinstance(old.get("sample.num"), int):
            raise UserError(f"{self.path / SAMPLES_FILE} is damaged (it has no sample.num); {hint}")
        if old["sample.num"] > self.num:
            raise UserError(f"{self.path} has {old['sample.num']} samples, more than {self.num}; {hint}")
        if before.get("evaluations_per_image"):
            self.spec["evaluations_per_image"] = before["evaluations_per_image"]

    def begin(self, overwrite: bool = False) -> None:
        """Write the spec. Removes what a kill left and, with `overwrite`, other samples, but no other files."""
        self.check(overwrite)
        marker = check_folder(self.path, "samples")
        if marker is None or overwrite:
            if marker:
                remove_listed(self.path)
            begin_folder(self.path, "samples", _NAMES, self.num)
        else:
            remove_leftovers(self.path)
            write_marker(self.path, Marker("samples", marker.names, max(marker.pictures, self.num)))
        self.write_spec()

    def write_spec(self) -> None:
        write_whole(self.path / SAMPLES_FILE, json.dumps(self.spec) + "\n")

    def file(self, index: int) -> Path:
        return self.path / f"{index:06d}.png"

    def numbered(self) -> list[Path]:
        """The images that are there."""
        there = {entry.name for entry in os.scandir(self.path)}
        return [self.file(i) for i in range(self.num) if self.file(i).name in there]

    def missing(self) -> list[range]:
        """The blocks of indices that lack an image."""
        there = set(self.numbered())
        blocks = [range(k, min(k + self.block, self.num)) for k in range(0, self.num, self.block)]
        return [block for block in blocks if any(self.file(i) not in there for i in block)]

    def arrays(self) -> Iterator[np.ndarray]:
        """All images in order, in batches of uint8 (B, H, W, 3), read by several threads."""
        with ThreadPoolExecutor(WRITERS) as pool:
            for start in range(0, self.num, 256):
                indices = range(start, min(start + 256, self.num))
                yield np.stack(list(pool.map(lambda i: load_levels(self.file(i)), indices)))

    def has_npz(self) -> bool:
        """Whether samples.npz holds all images; it is written last, and the PNG files may be gone."""
        file = self.path / SAMPLES_NPZ
        return file.is_file() and len(NpzFile(file).mapped("arr_0")) == self.num

    def write_npz(self) -> None:
        """ADM's `.npz` of the images, with their labels."""
        first = load_levels(self.file(0))
        write_npz(self.path / SAMPLES_NPZ, self.arrays(), (self.num, *first.shape), np.array(self.spec["labels"]))

    def save_grid(self, names: Sequence[str], columns: int = 10) -> Path:
        """Write grid.png, a picture of the first images of each class."""
        labels = torch.tensor(self.spec["labels"])
        shown = shown_in_grid(labels, columns)
        images = torch.stack([load_png(self.file(i)) for i in shown])
        save_picture(draw_grid(images, labels[shown], names, columns), self.path / "grid.png")
        return self.path / "grid.png"


def sample_spec(checkpoint: Checkpoint, settings: SampleSection, labels: Tensor, classes: str | None = None) -> dict:
    """What determines the images of a folder, as JSON has it."""
    condition = checkpoint.condition
    noisy = settings.eta or not solver_info(settings.solver).deterministic
    return {
        "checkpoint": str(checkpoint.source),
        "weights": weights_fingerprint(checkpoint.weights_file),
        **weak_weights(settings, checkpoint.source),
        **({"conditions": fingerprint(condition.examples)} if isinstance(condition, VectorCondition) else {}),
        **({"step_noise": STEP_NOISE} if noisy else {}),
        "sample": settings.model_dump(mode="json"),
        "evaluations_per_image": None,
        "classes": classes,
        "labels": labels.tolist(),
    }


def sample_into(
    folder: SampleFolder, sampler: Sampler, labels: Tensor, accelerator: Accelerator, overwrite: bool = False
) -> None:
    """Fill `folder` in all processes of `accelerator`, with a progress bar; done when all of them are.

    Raises:
        UserError: The folder holds other samples (unless `overwrite`), or anything else, or another command fills it.
    """
    folder.check(overwrite)  # by all processes, so that all of them end
    accelerator.wait_for_everyone()
    with entered_by_main(accelerator, lambda: locked(folder.path)):
        _fill_by_all(folder, sampler, labels, accelerator, overwrite)


def _fill_by_all(
    folder: SampleFolder, sampler: Sampler, labels: Tensor, accelerator: Accelerator, overwrite: bool
) -> None:
    on_main_process(accelerator, lambda: folder.begin(overwrite))
    missing, processes = folder.missing(), accelerator.num_processes
    accelerator.wait_for_everyone()  # before one of them writes what another would count
    total, quiet = sum(map(len, missing)), not accelerator.is_main_process
    if not total:
        return
    if total < folder.num and not quiet:
        say(f"{folder.path} has {folder.num - total} of {folder.num} images already; sampling the other {total}")

    def kept() -> str:
        same = "the same command, without --overwrite or --again," if overwrite else "the same command"
        done = f"{len(folder.numbered())} of {folder.num} images are in {folder.path}"
        return f"interrupted; {done}, and {same} goes on with the others"

    bar = progress_bar(total=total, unit="image", desc="sampling", disable=quiet)
    with when_interrupted(kept), bar, print_rank_errors():
        # The other processes are about as far as this one.
        advance = lambda count: bar.update(min(count * processes, total - bar.n))  # noqa: E731
        fill(folder, sampler, labels, accelerator.process_index, processes, missing, advance)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and sampler.evaluations:
        folder.spec["evaluations_per_image"] = sampler.evaluations
        folder.write_spec()


def fill(
    folder: SampleFolder,
    sampler: Sampler,
    labels: Tensor,
    rank: int = 0,
    processes: int = 1,
    missing: Sequence[range] | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Sample this process's share of the blocks that are `missing`, and write them.

    Several processes must be given the same `missing`, listed before the first of them writes.

    Raises:
        UserError: An image came out as NaN.
    """
    blocks = list(folder.missing() if missing is None else missing)[rank::processes]
    indices = [i for block in blocks for i in block]
    written: list[Future[None]] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        position = 0
        for batch in sampler(labels[indices], indices):
            mine = indices[position : position + len(batch)]
            broken = (~batch.isfinite()).flatten(1).any(dim=1)
            if broken.any():
                first = mine[int(broken.nonzero()[0])]
                raise UserError(
                    f"sample {first} and {int(broken.sum()) - 1} others of its batch are NaN or infinite; look at the "
                    "checkpoint, or sample with other settings"
                )
            for done in written:
                done.result()  # raises what went wrong, such as a full disk
            written = [pool.submit(save_png, image, folder.file(i)) for image, i in zip(batch, mine)]
            position += len(batch)
            progress(len(batch))
        for done in written:
            done.result()


def save_trajectory(sampler: Sampler, path: Path) -> None:
    """Write nine states of the first images, from noise at the left to the image, a row each."""
    images, times = sampler.trajectory(10)
    rows = torch.arange(len(images)).repeat_interleave(len(times))
    headings = [f"t={time:.2f}" for time in times]
    save_picture(draw_grid(images.flatten(0, 1), rows, [""] * len(images), len(times), headings=headings), path)
