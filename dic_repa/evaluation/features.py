"""The features of a set of images, their Gaussians, and the Fréchet distance of two of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.evaluation.image_sets import ImageSet, as_uint8
from dic_repa.protocols import FeatureExtractor
from dic_repa.runtime.precision import gpu_arithmetic


@dataclass
class FeatureSet:
    """`gaussians` and `features` by layer, such as 'inception.pool'."""

    count: int
    size: tuple[int, int] | None = None  # (H, W) of the images, if known
    gaussians: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # mean (D,), covariance (D, D), float64
    features: dict[str, Tensor] = field(default_factory=dict)  # (N, D) float32, of all images or an even choice
    constant: int = 0  # images of a single colour
    notes: tuple[str, ...] = ()  # what a reader of scores should know of the images
    fingerprint: str = ""  # of the images, or of the statistics if there are no images


@gpu_arithmetic(tf32=False)
@torch.no_grad()
def extract(
    images: ImageSet | Iterable[Tensor],
    extractors: dict[str, FeatureExtractor],
    layers: Iterable[str],
    keep: int | None = None,
    statistics: bool = False,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    processes: Accelerator | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> FeatureSet:
    """The features of `images`: a set, or batches (B, 1 or 3, H, W), uint8 or float in [0, 1].

    In several processes each reads its share of a set, and all get the whole result, the same whatever their number.

    Args:
        layers: '<extractor>.<layer>' each.
        keep: at most how many features are kept of a set, spread evenly; by default all.
        statistics: also the Gaussians of all images.

    Raises:
        UserError: for fewer than two images and for broken ones.
    """
    layers = list(layers)
    kept: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    running = {layer: RunningStatistics() for layer in layers if statistics}
    wanted = None
    if isinstance(images, ImageSet) and keep:
        chosen = min(keep, len(images))
        wanted = torch.zeros(len(images), dtype=torch.bool)
        wanted[torch.arange(chosen) * len(images) // chosen] = True
    count, constant = 0, 0
    size: tuple[int, int] | None = None
    gather = processes.gather if processes else lambda part: part
    rank, turn = (processes.process_index, batch_size * processes.num_processes) if processes else (0, batch_size)
    for batch, total in _batches(images, batch_size, rank, turn):
        height, width = batch.shape[-2:]
        if size not in (None, (height, width)):
            raise UserError(f"the images change their size from {size[1]}x{size[0]} to {width}x{height}")
        size = height, width
        moved = batch.to(device)
        parts = {f"{name}.{key}": part for name, network in extractors.items() for key, part in network(moved).items()}
        flat = (moved.flatten(2) == moved.flatten(2)[..., :1]).all(dim=2).all(dim=1)
        constant += int(gather(flat)[:total].sum())
        for layer in layers:
            part = gather(parts[layer])[:total]
            if not part.isfinite().all():
                raise UserError(f"the features {layer} hold NaN or infinity; look at the images and the weights")
            if statistics:
                running[layer].update(part)
            if wanted is not None:
                part = part[wanted[count : count + total].to(part.device)]
            kept[layer].append(part.cpu())
        count += total
        progress(total)
    if count < 2:
        which = f"{images.source}: " if isinstance(images, ImageSet) else ""
        raise UserError(f"{which}a set to measure takes at least two images, not {count}")
    results = {layer: sums.result() for layer, sums in running.items()}
    gaussians = {layer: (mean.cpu(), cov.cpu()) for layer, (mean, cov) in results.items()}
    return FeatureSet(count, size, gaussians, {k: torch.cat(parts) for k, parts in kept.items()}, constant)


def _batches(images, batch_size: int, rank: int, turn: int) -> Iterator[tuple[Tensor, int]]:
    """This process's batches, and how many images all processes' batches of that turn are."""
    if not isinstance(images, ImageSet):
        for batch in images:
            yield as_uint8(batch).expand(-1, 3, -1, -1), len(batch)
        return
    starts = range(0, len(images), turn)
    firsts = [start + rank * batch_size for start in starts]
    mine: list[Sequence[int]] = [range(first, min(first + batch_size, len(images))) for first in firsts]
    if turn > batch_size:  # all processes gather tensors of one size; what is too much comes last and is cut off
        last = len(images) - 1
        mine = [[*indices, *[last] * (batch_size - len(indices))] for indices in mine]
    for start, batch in zip(starts, images.batches(mine)):
        yield batch, min(len(images) - start, turn)


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and the unbiased covariance (D, D), in float64, of features (N, D); see `RunningStatistics`."""
    running = RunningStatistics()
    running.update(features)
    return running.result()


class RunningStatistics:
    """The mean and covariance of features that come in batches, in float64.

    Batches are merged by Chan's formula: squares are summed about each batch's own mean, so that nothing cancels out
    when the mean is large against the spread.
    """

    def __init__(self):
        self.count = 0
        self.mean = self.squares = torch.zeros(())  # squares: the sum over samples of (x - mean)(x - mean)^T

    def update(self, features: Tensor) -> None:
        """Add a batch (N, D); a UserError if it holds NaN or infinity."""
        for part in features.split(8192):  # a bounded copy in float64
            rows = (part.cpu() if part.device.type == "mps" else part).double()  # Apple's GPUs have no float64
            if not rows.isfinite().all():
                raise UserError("the features hold NaN or infinity; look at the images that they come from")
            count, mean = len(rows), rows.mean(dim=0)
            centred = rows - mean
            squares = centred.mT @ centred
            total, shift = self.count + count, mean - self.mean
            self.squares = self.squares + (squares + torch.outer(shift, shift) * (self.count * count / total))
            self.mean = self.mean + shift * (count / total)
            self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """The mean (D,) and the unbiased covariance (D, D); a UserError for fewer than two samples."""
        if self.count < 2:
            raise UserError(f"a covariance takes features (N, D) of at least two samples, not {self.count}")
        return self.mean, self.squares / (self.count - 1)


class FrechetDistance:
    """The distance to one Gaussian, `FrechetDistance(mean, cov)(other_mean, other_cov)`: its root is taken once.

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), for means (D,) and covariances A and B (D, D), in float64.
    The last trace is that of (A^(1/2) B A^(1/2))^(1/2): it has the same eigenvalues but is symmetric, so that it exists
    for singular covariances too. A UserError if the shapes do not fit.
    """

    def __init__(self, mean: Tensor, cov: Tensor):
        self.mean, self.cov = mean.double(), cov.double()
        values, vectors = torch.linalg.eigh(self.cov)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT

    def __call__(self, mean: Tensor, cov: Tensor) -> float:
        mean, cov = mean.double(), cov.double()
        shapes = [tuple(part.shape) for part in (self.mean, self.cov, mean, cov)]
        if shapes != [(len(mean),), (len(mean),) * 2] * 2:
            raise UserError(f"means and covariances must be (D,), (D, D), (D,), (D, D) of one D, not {shapes}")
        product = self.root @ cov @ self.root
        # Rounding makes zero eigenvalues a little negative, and leaves the product a little asymmetric.
        trace_of_root = torch.linalg.eigvalsh((product + product.mT) / 2).clamp(min=0).sqrt().sum()
        distance = (mean - self.mean).square().sum() + self.cov.trace() + cov.trace() - 2 * trace_of_root
        return max(distance.item(), 0.0)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The Fréchet distance of two Gaussians, see `FrechetDistance`."""
    return FrechetDistance(mean_a, cov_a)(mean_b, cov_b)
