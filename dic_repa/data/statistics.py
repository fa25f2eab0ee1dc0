"""The mean and standard deviation of each channel of a prepared data set's latents: measured once, kept beside them.

They are those of the latents z that training draws: E[z] = E[mean] and Var[z] = Var[mean] + E[std^2], over all images,
mirrored ones included, and all places. They are taken of the stored numbers in their order, so however many processes
have written these, and however often they were stopped, every digit is the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dic_repa.data.autoencoders import AutoencoderSpec, LatentStatistics
from dic_repa.errors import UserError
from dic_repa.files.atomic import write_whole
from dic_repa.files.hashing import fingerprint
from dic_repa.files.reading import read_json
from dic_repa.runtime.progress import progress_bar
from dic_repa.runtime.threads import ahead

if TYPE_CHECKING:
    from dic_repa.data.prepared import Prepared  # which reads them

STATISTICS_FILE = "latents.json"
PIECE = 1 << 20  # numbers that a thread takes at once: 8 MB in float64
DIGITS = 9  # those of float32; what another processor's order of summation may change comes later


@dataclass
class Sums:
    """What is known of some images: of each channel (C,) the mean, and z's variance around it times the images."""

    images: int
    mean: np.ndarray
    spread: np.ndarray

    def __add__(self, other: Sums) -> Sums:
        """Of both together (Chan, Golub and LeVeque 1983)."""
        images, between = self.images + other.images, other.mean - self.mean
        spread = self.spread + other.spread + between**2 * (self.images * other.images / images)
        return Sums(images, self.mean + between * (other.images / images), spread)

    @classmethod
    def of(cls, moments: np.ndarray, spec: AutoencoderSpec) -> Sums:
        """Of moments (N, C or 2C, h, w), as the autoencoder of `spec` gives them."""
        moments = moments.astype(np.float64)
        z = moments[:, : spec.channels]
        mean = z.mean(axis=(0, 2, 3))
        squares = np.square(z - mean[:, None, None]).sum(axis=(0, 2, 3))
        if spec.stochastic:
            squares += np.square(moments[:, spec.channels :]).sum(axis=(0, 2, 3))
        return cls(len(moments), mean, squares / np.prod(z.shape[2:]))

    def statistics(self, path: str | Path) -> LatentStatistics:
        """Those of all images, which are at `path`; a UserError if they are not finite."""
        std = np.sqrt(self.spread / self.images)
        found = LatentStatistics(*(tuple(float(f"{value:.{DIGITS}g}") for value in each) for each in (self.mean, std)))
        if not all(map(math.isfinite, found.mean + found.std)):  # of an earlier version, whose rows have no checksums
            raise UserError(f"{path} holds latents that are not finite; prepare it again, into another folder")
        return found


def measure_statistics(data: Prepared, threads: int = 8) -> LatentStatistics:
    """The statistics of all latents of `data`, of which there is at least one, in float64.

    Raises:
        UserError: latents have changed since they were prepared.
    """
    columns = ["moments", "moments_flipped"] if data.flip else ["moments"]
    rows = max(1, PIECE // (data.spec.moments * data.size**2))
    pieces = [
        (part, column, range(start, min(start + rows, len(part[column]))))
        for column in columns
        for part in data.parts[1]
        for start in range(0, len(part[column]), rows)
    ]
    total = None
    with (
        progress_bar(total=len(data), desc="measuring latents", unit="image", delay=1) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        for sums in ahead(pool, partial(_sums, data), pieces, 4 * threads):
            total = sums if total is None else total + sums
            bar.update(sums.images)
    assert total is not None
    return total.statistics(data.path)


def _sums(data: Prepared, piece: tuple[dict, str, range]) -> Sums:
    part, column, rows = piece
    for row in rows:
        data.check_row(part, row, {column: part[column][row]})
    return Sums.of(part[column][rows.start : rows.stop], data.spec)


def write_statistics(data: Prepared, statistics: LatentStatistics) -> None:
    """Keep them in the folder of `data`."""
    content = {"images": len(data), **asdict(statistics)}
    content["fingerprint"] = _fingerprint(data.path, data.files, data.spec, statistics)
    write_whole(data.path / STATISTICS_FILE, json.dumps(content, indent=2) + "\n")


def read_statistics(folder: Path, files: Sequence[str], spec: AutoencoderSpec) -> LatentStatistics:
    """The statistics of the data set in `folder`, of the shards `files` and the autoencoder of `spec`.

    Raises:
        UserError: there are none, they are damaged, or they are of other shards or another autoencoder.
    """
    file, again = folder / STATISTICS_FILE, "the same `dic-repa prepare` command"
    if not file.is_file():
        raise UserError(
            f"{folder} lacks {STATISTICS_FILE}, the latents' mean and deviation that latent.normalise=per-channel "
            f"takes: {again} adds it without encoding anew; or set latent.normalise=scaling-factor"
        )
    then = f"{again} measures them anew, and encodes nothing"
    content = read_json(file, then)
    try:
        mean, std = (tuple(map(float, content[key])) for key in ("mean", "std"))
        found = LatentStatistics(mean, std)
        if not all(map(math.isfinite, mean + std)) or min(std) < 0:
            raise ValueError
        expected = str(content["fingerprint"])
    except (ValueError, TypeError, KeyError, OverflowError):
        raise UserError(f"{file} is damaged; {then}") from None
    if {len(mean), len(std)} != {spec.channels}:
        raise UserError(f"{file} is of {len(mean)} channels, and {spec.name} has {spec.channels}; {then}")
    if expected != _fingerprint(folder, files, spec, found):
        raise UserError(f"{file} is damaged, or not of the latents beside it; {then}")
    return found


def _fingerprint(folder: Path, files: Sequence[str], spec: AutoencoderSpec, statistics: LatentStatistics) -> str:
    """A hash of the numbers and of what they were measured on: the autoencoder, and the shards' names and sizes."""
    of = [spec.fingerprint, spec.channels, spec.downsample, spec.stochastic]
    try:
        shards = [(name, (folder / name).stat().st_size) for name in files]
    except OSError as error:
        raise UserError(f"{error.filename} is missing; run the same `dic-repa prepare` again") from None
    return fingerprint(json.dumps([of, shards, statistics.mean, statistics.std]))
