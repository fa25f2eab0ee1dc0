"""The features of a set of images: their Gaussians, and the features themselves where a metric needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.evaluation.frechet import RunningStatistics
from dic_repa.evaluation.image_sets import ImageSet, as_uint8
from dic_repa.protocols import FeatureExtractor
from dic_repa.runtime.precision import tf32


@dataclass
class FeatureSet:
    """`gaussians` and `features` by layer, such as 'inception.pool'.

    count: images; size: their (H, W), None where it is not known; gaussians: mean (D,) and covariance (D, D) of all
    images, float64; features: (N, D) float32 of all images, or of some that are spread evenly over them.
    """

    count: int
    size: tuple[int, int] | None = None
    gaussians: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    constant: int = 0  # images of a single colour
    notes: tuple[str, ...] = ()  # what a reader of scores should know of the images
    fingerprint: str = ""  # of the images, or of the statistics where there are no images


@dataclass(frozen=True)
class Share:
    """How the processes share the work: `gather` turns each one's (B, D) into all of them, in the order of rank."""

    rank: int = 0
    processes: int = 1
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor


@tf32(False)
def extract(
    images: ImageSet | Iterable[Tensor],
    extractors: dict[str, FeatureExtractor],
    layers: Iterable[str],
    keep: int | None = None,
    statistics: bool = False,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    share: Share | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> FeatureSet:
    """The features of `images`: a set, or batches (B, 1 or 3, H, W), uint8 or float in [0, 1].

    `layers` are '<extractor>.<layer>'. `statistics` asks for the Gaussians of all images; features are kept of all
    images, or of at most `keep` of them, spread evenly (of batches of unknown number: the first). In several processes
    each reads its share of a set, and all have the whole result, the same whatever their number. A UserError for
    fewer than two images and for broken ones.
    """
    layers = list(layers)
    share = share or Share()
    kept: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    running = {layer: RunningStatistics() for layer in layers if statistics}
    wanted = _spread(len(images), keep) if isinstance(images, ImageSet) and keep else None
    count, constant = 0, 0
    size: tuple[int, int] | None = None
    for batch, total in _batches(images, batch_size, share):
        before, size = size, (batch.shape[-2], batch.shape[-1])
        if before not in (None, size):
            raise UserError(f"the images change their size from {_side(before)} to {_side(size)}")
        parts = _features(batch.to(device), extractors, layers)
        flat = (batch.flatten(2) == batch.flatten(2)[..., :1]).all(dim=2).all(dim=1)
        constant += int(share.gather(flat.to(device))[:total].sum())
        for layer, part in parts.items():
            part = share.gather(part)[:total]
            if not part.isfinite().all():
                raise UserError(f"the features {layer} hold NaN or infinity; look at the images and the weights")
            if statistics:
                running[layer].update(part)
            if wanted is not None:
                part = part[wanted[count : count + total].to(part.device)]
            elif keep:
                part = part[: max(0, keep - count)]
            kept[layer].append(part.cpu())
        count += total
        progress(total)
    if count < 2:
        which = f"{images.source}: " if isinstance(images, ImageSet) else ""
        raise UserError(f"{which}a set to measure takes at least two images, not {count}")
    gaussians = {}
    for layer, sums in running.items():
        mean, cov = sums.result()
        gaussians[layer] = mean.cpu(), cov.cpu()
    return FeatureSet(count, size, gaussians, {k: torch.cat(parts) for k, parts in kept.items()}, constant)


def _batches(images, batch_size: int, share: Share) -> Iterator[tuple[Tensor, int]]:
    """This process's batches, and how many images all processes' batches of that turn are."""
    if not isinstance(images, ImageSet):
        for batch in images:
            yield _three_channels(as_uint8(batch)), len(batch)
        return
    turns = range(0, len(images), batch_size * share.processes)
    mine = [_turn(start, len(images), batch_size, share) for start in turns]
    for start, batch in zip(turns, images.batches(mine)):
        yield _three_channels(batch), min(len(images) - start, batch_size * share.processes)


def _turn(start: int, count: int, batch_size: int, share: Share) -> list[int]:
    first = start + share.rank * batch_size
    own = list(range(first, min(first + batch_size, count)))
    if share.processes > 1:  # all gather tensors of one size; what is too much comes last and is cut off
        own += [count - 1] * (batch_size - len(own))
    return own


def _features(batch: Tensor, extractors: dict[str, FeatureExtractor], layers: Sequence[str]) -> dict[str, Tensor]:
    found = {}
    for name in dict.fromkeys(layer.partition(".")[0] for layer in layers):
        for key, value in extractors[name](batch).items():
            found[f"{name}.{key}"] = value
    return {layer: found[layer] for layer in layers}


def _spread(count: int, keep: int) -> Tensor:
    """Booleans (count,) that choose `keep` of them evenly; all where there are no more."""
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[(torch.arange(min(keep, count)) * count) // min(keep, count)] = True
    return chosen


def _three_channels(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _side(size) -> str:
    return f"{size[1]}x{size[0]}"
