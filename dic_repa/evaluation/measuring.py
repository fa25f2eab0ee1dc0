"""From images to scores: `measure` for one set, `Measure` for many against the same reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.evaluation.extractors import extractors
from dic_repa.evaluation.features import FeatureSet, extract
from dic_repa.evaluation.image_sets import ImageSet, open_images
from dic_repa.evaluation.manifolds import expected_coverage
from dic_repa.evaluation.metrics import (
    DENSE_NEIGHBOURS,
    KID_SUBSET_SIZE,
    MIND_SAMPLES,
    Coverage,
    MetricSet,
    MongeDistance,
    metrics,
    plain_names,
)
from dic_repa.evaluation.ratios import find_ratios
from dic_repa.evaluation.reference import load_reference
from dic_repa.runtime.precision import gpu_arithmetic

FULL_COUNT = 50_000  # samples behind a published FID
OF_REFERENCE = ("gaussian", "features")  # what a metric may need of it


def measure(
    images: ImageSet | Iterable[Tensor],
    reference=None,
    metrics: Sequence[str] = ("fid",),
    device: str | torch.device = "cpu",
    **options,
) -> dict[str, float]:
    """The `metrics` of `images` against `reference`, by name; the arguments are those of `Measure`.

    images: batches (B, 1 or 3, H, W), uint8 or float in [0, 1], or an `ImageSet` from `open_images`.
    """
    return Measure(metrics, reference, device, **options)(images).values


@dataclass
class Measured:
    """`values` (None if there was nothing to score) and `intervals` by metric, of `count` samples of `size`.

    `warnings` are about the samples; `details` are what metrics add to a record; `real` is what the bound scores.
    """

    values: dict[str, float]
    count: int
    size: tuple[int, int]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    real: Measured | None = None


def check_metrics(names: Sequence[str], reference) -> list[str]:
    """The metrics among `names` that are measured against `reference`: all but sets, which have their own.

    Without a `reference`, the metrics that such a set gives are left out too.

    Raises:
        UserError: for an unknown name, and a missing reference.
    """
    parts = {name: metrics.create(name) for name in names}
    sets = [part for part in parts.values() if isinstance(part, MetricSet)]
    given = {score for part in sets for score in part.names} if reference is None else set()
    found = [name for name, part in parts.items() if part not in sets and name not in given]
    needy = [name for name in found if parts[name].needs in OF_REFERENCE]
    if needy and reference is None:
        compare = "compares" if len(needy) == 1 else "compare"
        hint = "give a reference (--reference, or evaluate.reference in a recipe)"
        raise UserError(f"{', '.join(needy)} {compare} with real images: {hint}")
    return found


class Measure:
    """Scores sets of samples against one reference, whose features are computed once.

    Args:
        names: from `metrics.names()`: fid, sfid, is, kid, prec, recall, fid-infinity, fd-dinov2, fdr6, ...
        reference: what `open_images` takes, an `.npz` of statistics (ADM's mu, sigma, mu_s, sigma_s), a file of
            `save_statistics`, or a FeatureSet; None for metrics that need none.
        bound: what `open_images` takes: real images that are scored as the samples are, and as many of them, if there
            are so many. What samples can reach.
        device: where the networks run and the distances are computed.
        extractor_options: by extractor, what it is built with: {"inception": {"weights": FILE}}.
        batch_size: images at once in a network.
        resize: crop the images of paths to this size, as ADM does; stored statistics must be of that size.
        cache: keep the reference's statistics in the user's cache folder.
        processes: what shares the work on an `ImageSet` of samples and on the reference.

    Raises:
        UserError: for unknown metrics, missing weights, and a reference that lacks what a metric needs.
    """

    def __init__(
        self,
        names: Sequence[str] = ("fid",),
        reference=None,
        device: str | torch.device = "cpu",
        *,
        bound=None,
        extractor_options: dict[str, dict] | None = None,
        batch_size: int = 64,
        resize: int | None = None,
        cache: bool = True,
        processes: Accelerator | None = None,
        progress: Callable[[int], object] = lambda count: None,
    ):
        self.metrics = {name: metrics.create(name) for name in check_metrics(plain_names(names), reference)}
        self.ratios = find_ratios(names, bound)
        self.device, self.batch_size, self.resize = device, batch_size, resize
        self.layers = list(dict.fromkeys(metric.layer for metric in self.metrics.values()))
        options = extractor_options or {}
        networks = dict.fromkeys(layer.partition(".")[0] for layer in self.layers)
        self.extractors = {name: extractors.find(name)(**options.get(name, {})).to(device) for name in networks}
        self.extract = functools.partial(extract, device=device, batch_size=batch_size, processes=processes)
        self.reference: FeatureSet | None = None
        if needed := [metric for metric in self.metrics.values() if metric.needs in OF_REFERENCE]:
            run = functools.partial(self.extract, progress=progress)
            gather = processes.gather if processes else lambda part: part
            agree = lambda so: bool(gather(torch.tensor([so], device=device)).all())  # noqa: E731
            self.reference = load_reference(reference, needed, self.extractors, run, resize, cache, agree)
        self.bound = None if bound is None else open_images(bound, resize)
        self._reals: dict[tuple[int, int], Measured] = {}
        if self.bound:
            self.check_size(self.bound.size(), f"the images of the bound {self.bound.source}")
            self._check_labels(_labels(self.bound))
            asking = [name for name, part in self.ratios.items() if not part.published]
            if asking and self.reference and self.bound.fingerprint == self.reference.fingerprint:
                raise UserError(f"{', '.join(asking)}: the bound is the reference itself; name held-out images")

    def __call__(
        self,
        images: ImageSet | Iterable[Tensor],
        bootstrap: int = 0,
        progress: Callable[[int], object] = lambda count: None,
        labels: Tensor | None = None,
    ) -> Measured:
        """The scores of `images`; `labels` (N,) are the classes that they should show, as a folder of samples knows.

        `bootstrap` resamplings give each a 95 % confidence interval: 1.96 standard deviations on either side, not
        quantiles, since resampling repeats samples, which by itself makes a Fréchet distance larger.

        Raises:
            UserError: for images that are broken, of another size than the reference's, or of a single colour each.
        """
        measured = self._score(images, bootstrap, progress, labels)
        if self.bound:
            count = min(measured.count, len(self.bound))
            if (count, bootstrap) not in self._reals:
                self._reals[count, bootstrap] = self._score(self.bound.spread(count), bootstrap)
            measured.real = self._reals[count, bootstrap]
            if count < measured.count and any(metric.needs == "gaussian" for metric in self.metrics.values()):
                fewer = f"the bound has {count} images, fewer than the {measured.count} samples"
                measured.warnings.append(f"{fewer}, which makes its Fréchet distances larger than theirs")
        for scored in filter(None, (measured, measured.real)):
            real = (measured.real or measured).values
            scored.values |= {name: part.ratio(scored.values, real) for name, part in self.ratios.items()}
        return measured

    @gpu_arithmetic(tf32=False)
    def _score(
        self,
        images: ImageSet | Iterable[Tensor],
        bootstrap: int = 0,
        progress: Callable[[int], object] = lambda count: None,
        labels: Tensor | None = None,
    ) -> Measured:
        labels = _labels(images) if labels is None else labels
        self._check_labels(labels)
        if isinstance(images, ImageSet):
            self.check_size(images.size())  # before all of them are looked at
        else:
            images = self._of_size(images)
        found = self.extract(images, self.extractors, self.layers, progress=progress)
        measured = Measured({}, found.count, found.size or (0, 0), warnings=self._warnings(found))
        on_mps = torch.device(self.device).type == "mps"  # Apple's GPUs have no float64
        for name, score in self.metrics.items():
            features = found.features[score.layer].to("cpu" if on_mps else self.device)
            against = labels if score.needs == "labels" else self.reference
            measured.values[name] = value = score(features, against)
            if labels is not None and score.needs == "labels":
                measured.details |= score.details(features, labels)
            if bootstrap and value is not None:
                margin = 1.96 * score.deviation(features, against, bootstrap)
                measured.intervals[name] = (value - margin, value + margin)
        return measured

    def _check_labels(self, labels: Tensor | None) -> None:
        if labels is None and (needy := [name for name, metric in self.metrics.items() if metric.needs == "labels"]):
            raise UserError(f"{', '.join(needy)}: the images do not tell which class each should show; measure a run")

    def check_size(self, size: tuple[int, int], what: str = "the samples") -> None:
        """A UserError if samples of `size`, (H, W), cannot be compared with the reference."""
        if self.reference and self.reference.size not in (None, tuple(size)):
            own, other = (f"{width}x{height}" for height, width in (size, self.reference.size))
            raise UserError(
                f"{what} are {own}, the reference {other}; take a reference of the samples' size (`dic-repa "
                "prepare` crops), or crop both by --resize of `dic-repa evaluate`"
            )

    def _of_size(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            self.check_size((batch.shape[-2], batch.shape[-1]))
            yield batch

    def _warnings(self, samples: FeatureSet) -> list[str]:
        count, reference, warnings = samples.count, self.reference, []
        if samples.constant == count:
            raise UserError(f"all {count} images are of a single colour each; look at what made them")
        if samples.constant:
            warnings.append(f"{samples.constant} of {count} images are of a single colour each")
        gaussian = [name for name, metric in self.metrics.items() if metric.needs == "gaussian"]
        biased = [name for name in gaussian if "infinity" not in name]
        if biased and count < FULL_COUNT:
            offer = next((f"{name}-infinity" for name in gaussian if f"{name}-infinity" in metrics), "")
            offered = f"; the metric {offer} extrapolates" if offer and offer not in gaussian else ""
            few = f"{count} samples are fewer than {FULL_COUNT}"
            warnings.append(f"{few}, which biases upward: {', '.join(biased)}{offered}")
        if reference is None:
            return warnings
        if gaussian and reference.count < min(count, FULL_COUNT):
            warnings.append(f"the reference has {reference.count} images, fewer than the samples: a bias of its own")
        warnings += reference.notes
        if reference.constant:
            warnings.append(f"{reference.constant} images of the reference are of a single colour each")
        if self.resize and reference.size is None:
            warnings.append(
                f"the samples were resized to {self.resize}; the reference's statistics are as they were stored, and "
                "do not tell the size of their images"
            )
        compared = min([count, *map(len, reference.features.values())])
        if "kid" in self.metrics and compared < KID_SUBSET_SIZE:
            warnings.append(f"kid is over subsets of {compared} images, where others take {KID_SUBSET_SIZE}")
        sliced = [name for name, metric in self.metrics.items() if isinstance(metric, MongeDistance)]
        if sliced and compared < MIND_SAMPLES:
            few = f"{compared} samples and real images, where others take {MIND_SAMPLES}"
            warnings.append(f"{', '.join(sliced)}: of {few}; the fewer, the larger")
        for name, metric in self.metrics.items():
            if isinstance(metric, Coverage) and count < (real := len(reference.features[metric.layer])):
                share = expected_coverage(real, count, DENSE_NEIGHBOURS)
                warnings.append(f"{name}: {count} samples as good as real would cover {share:.3g} of {real} images")
        dims = {layer: len(reference.gaussians[layer][0]) for layer in (self.metrics[name].layer for name in gaussian)}
        for which, number in (("samples", count), ("reference images", reference.count)):
            if short := ", ".join(f"{layer} ({dim})" for layer, dim in dims.items() if number <= dim):
                warnings.append(
                    f"{number} {which} are not more than the dimensions of {short}: the covariance is singular"
                )
        return warnings


def _labels(images: ImageSet | Iterable[Tensor]) -> Tensor | None:
    known = isinstance(images, ImageSet) and len(images.labels) == len(images)
    return torch.tensor(images.labels) if isinstance(images, ImageSet) and known else None
