"""Are samples copies of training pictures? `find_copies`: the nearest ones, and how near other real images come.

Distances are Euclidean, between features of an extractor and between pixels. How near is too near is told by real
images that were not trained on: see `Copies.near`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dic_repa.errors import UserError
from dic_repa.evaluation.extractors import extractors
from dic_repa.evaluation.image_sets import ImageSet
from dic_repa.files.atomic import write_whole
from dic_repa.files.outputs import MARK
from dic_repa.files.pictures import draw_grid, save_picture
from dic_repa.protocols import FeatureExtractor
from dic_repa.runtime.precision import gpu_arithmetic

BATCH = 64
CALIBRATION = 1000  # training pictures at most that stand in for a bound
SHOWN = 3  # training pictures beside a sample, for each kind of distance


class Pixels(nn.Module):
    """The pixels of uint8 images, averaged to at most 32 x 32. A distance is the RMS difference of values in [0, 1]."""

    layers = ("levels",)
    resizing, fingerprint, notes = "area to at most 32", "", ()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        height, width = (min(32, side) for side in images.shape[-2:])
        levels = F.adaptive_avg_pool2d(images.float() / 255, (height, width)).flatten(1)
        return {"levels": levels / levels.shape[1] ** 0.5}


@dataclass
class Copies:
    """By one kind of distance: the nearest training pictures of samples (N) and of other real images (M).

    distances (N, K): rising; indices, mirrored (N, K): of the training pictures, and whether it is their mirrored copy.
    real (M,): the distances of the real images to their nearest.
    """

    distances: Tensor
    indices: Tensor
    mirrored: Tensor
    real: Tensor

    def near(self, share: float) -> Tensor:
        """Whether each sample is nearer to its nearest training picture than all but `share` of the real images are to
        theirs: booleans (N,)."""
        as_near = torch.searchsorted(self.real.sort().values, self.distances[:, 0].contiguous(), right=True)
        return as_near <= share * len(self.real)


@dataclass
class Found:
    """`copies` by kind of distance: the extractor's name and 'pixels'.

    exact (N,): whether a sample is a training picture to the pixel; calibrated_by: which real images were taken.
    """

    copies: dict[str, Copies]
    exact: Tensor
    calibrated_by: str

    def scores(self, share: float) -> dict[str, Any]:
        """For a record: the numbers and shares of near copies, with exact ones, and medians of the distances."""
        scores: dict[str, Any] = {"exact_copies": int(self.exact.sum())}
        for name, found in self.copies.items():
            near = found.near(share) | self.exact
            scores[name] = {
                "near_copies": int(near.sum()),
                "share": near.double().mean().item(),
                "median_distance": found.distances[:, 0].median().item(),
                "median_distance_of_real": found.real.median().item(),
                "samples": near.nonzero()[:, 0].tolist(),
            }
        return scores


@gpu_arithmetic(tf32=False)
@torch.no_grad()
def find_copies(
    samples: ImageSet,
    reference: ImageSet,
    bound: ImageSet | None = None,
    extractor: str = "lite2",
    extractor_options: dict[str, Any] | None = None,
    flip: bool = True,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] = lambda count: None,
) -> Found:
    """Each sample's nearest pictures of `reference`, what was trained on, by features and by pixels.

    Args:
        bound: real images that were not trained on. Without it, at most 1,000 training pictures take their place, each
            compared with the others.
        extractor: whose features are compared, in its first layer; `extractor_options` build it.
        flip: compare with mirrored training pictures too.
        progress: called with the number of images of each batch.

    Raises:
        UserError: sets of different sizes, or fewer than two training pictures.
    """
    _check_sizes(reference, *filter(None, (samples, bound)))
    networks: dict[str, Any] = {extractor: extractors.create(extractor, **(extractor_options or {}))}
    networks = {name: part.to(device) for name, part in (networks | {"pixels": Pixels()}).items()}
    real, own = bound, torch.full((len(bound or ()),), -1)
    if real is None:
        real = reference.spread(CALIBRATION)
        own = torch.tensor([i * len(reference) // len(real) for i in range(len(real))])
    contents: list[bytes] = []
    points: dict[str, list[Tensor]] = {name: [] for name in networks}
    for batch, features in _features(samples, networks, device, progress):
        contents += _contents(batch)
        for name, part in features.items():
            points[name].append(part)
    for _, features in _features(real, networks, device, progress):
        for name, part in features.items():
            points[name].append(part)
    own = torch.cat([torch.full((len(samples),), -1), own])
    best = {name: _Best(torch.cat(parts), own) for name, parts in points.items()}
    start, seen = 0, set[bytes]()
    for batch, features in _features(reference, networks, device, progress):
        mirrored = _run(batch.flip(-1), networks, device) if flip else {}
        for name, nearest in best.items():
            nearest.update(start, features[name], mirrored.get(name))
        seen |= {*contents}.intersection(_contents(batch) + (_contents(batch.flip(-1)) if flip else []))
        start += len(batch)
    exact = torch.tensor([content in seen for content in contents])
    names = f"{len(real)} images of {real.source}" + ("" if bound else ", each against the others")
    return Found({name: nearest.result(len(samples)) for name, nearest in best.items()}, exact, names)


def _check_sizes(reference: ImageSet, *others: ImageSet) -> None:
    for images in others:
        if images.size() != reference.size():
            (height, width), (rows, columns) = images.size(), reference.size()
            sizes = f"{images.source} are {width}x{height}, those of {reference.source} {columns}x{rows}"
            raise UserError(f"the images of {sizes}; crop all to one size with --resize")
    if len(reference) < 2:
        raise UserError(f"{reference.source} has one picture; the nearest of several are looked for")


def _contents(batch: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in batch]


def _features(
    images: ImageSet, networks: dict[str, Any], device, progress: Callable[[int], object]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Batches of the images, uint8 (B, 3, H, W), with their features by extractor, (B, D) float64 on the CPU."""
    for batch in images.batches([range(i, min(i + BATCH, len(images))) for i in range(0, len(images), BATCH)]):
        yield batch, _run(batch, networks, device)
        progress(len(batch))


def _run(batch: Tensor, networks: dict[str, FeatureExtractor], device) -> dict[str, Tensor]:
    moved = batch.to(device)
    return {name: network(moved)[network.layers[0]].cpu().double() for name, network in networks.items()}


class _Best:
    """The nearest pictures so far of `points` (P, D), float64; `own` (P,) is the picture that a point is, or -1."""

    def __init__(self, points: Tensor, own: Tensor):
        self.points, self.own = points, own
        self.distances = torch.zeros(len(points), 0, dtype=torch.float64)
        self.indices = torch.zeros(len(points), 0, dtype=torch.int64)
        self.mirrored = torch.zeros(len(points), 0, dtype=torch.bool)

    def update(self, start: int, features: Tensor, mirrored: Tensor | None) -> None:
        """Take the pictures `start`, `start + 1`, ..., by their features (B, D) and those of their mirrored copies."""
        indices = torch.arange(start, start + len(features)).expand(len(self.points), -1)
        distances = torch.cdist(self.points, features)
        is_mirrored = torch.zeros_like(distances, dtype=torch.bool)
        if mirrored is not None:
            others = torch.cdist(self.points, mirrored)
            is_mirrored = others < distances
            distances = distances.minimum(others)
        distances = distances.masked_fill(indices == self.own[:, None], torch.inf)
        together = torch.cat([self.distances, distances], dim=1)
        found = together.topk(min(SHOWN, together.shape[1]), largest=False)
        self.distances = found.values
        self.indices = torch.cat([self.indices, indices], dim=1).gather(1, found.indices)
        self.mirrored = torch.cat([self.mirrored, is_mirrored], dim=1).gather(1, found.indices)

    def result(self, samples: int) -> Copies:
        """For the first so many points, which are samples; the others are real."""
        distances = torch.where(self.distances < 1e-6, 0, self.distances)  # what rounding leaves of none
        indices, mirrored = self.indices[:samples], self.mirrored[:samples]
        return Copies(distances[:samples], indices, mirrored, distances[samples:, 0])


def draw_nearest(samples: ImageSet, reference: ImageSet, found: Found, rows: list[int], share: float):
    """A PIL picture with a row for each of the samples `rows`: it, and its nearest by each kind of distance."""
    images, captions = [], []
    for row in rows:
        shown = [next(samples.batches([[row]]))[0]]
        words = [str(row)]
        for name, copies in found.copies.items():
            for index, mirrored in zip(copies.indices[row].tolist(), copies.mirrored[row].tolist()):
                picture = next(reference.batches([[index]]))[0]
                shown.append(picture.flip(-1) if mirrored else picture)
            words += [name] if copies.near(share)[row] else []
        words = [str(row), "exact"] if found.exact[row] else words
        captions.append(" ".join(words))
        images += shown
    stacked = torch.stack(images).float().div(255)
    columns = len(images) // len(rows)
    each = (columns - 1) // len(found.copies)
    headings = ["sample", *(f"{name} {i + 1}" for name in found.copies for i in range(each))]
    labels = torch.arange(len(rows)).repeat_interleave(columns)
    return draw_grid(stacked, labels, captions, columns, headings)


def save_copies(
    path: Path, samples: ImageSet, reference: ImageSet, found: Found, rows: list[int], share: float, **more: Any
) -> Path:
    """Write the picture `path`, and beside it the record, a .json; the record's path."""
    save_picture(draw_nearest(samples, reference, found, rows, share), path)
    shown = [
        {"sample": row}
        | {
            name: {"nearest": copies.indices[row].tolist(), "distances": copies.distances[row].tolist()}
            for name, copies in found.copies.items()
        }
        for row in rows
    ]
    sets = {"samples": samples, "reference": reference}
    described = {k: {"path": s.source, "count": len(s), "fingerprint": s.fingerprint} for k, s in sets.items()}
    record = {"made_by": MARK, **described, "calibrated_by": found.calibrated_by, "share_of_real": share, **more}
    if samples.made_by:
        record["sampling"] = {key: value for key, value in samples.made_by.items() if key != "labels"}
    file = path.with_suffix(".json")
    write_whole(file, json.dumps(record | {"copies": found.scores(share), "shown": shown}, indent=1) + "\n")
    return file
