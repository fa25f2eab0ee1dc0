"""The metrics of a set of samples, by name: FID, sFID, IS, KID, precision, recall and their like.

A metric takes one layer of features of the samples, (N, D), and what it compares them with: the reference's
`FeatureSet`, or the labels. One of your own is a subclass of `Metric`, filed with `metrics.register(name)` or named as
`package.module:Class`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dic_repa.errors import UserError
from dic_repa.evaluation.features import FeatureSet, FrechetDistance, statistics
from dic_repa.evaluation.manifolds import balls_around, balls_that_hold, within_manifold
from dic_repa.registry import Registry, first_sentence

metrics = Registry(
    "metric", modules=["dic_repa.evaluation.digits", "dic_repa.evaluation.ratios"], key="evaluate.metric"
)
IS_SPLIT = 5000  # ADM's
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # torch-fidelity's
INFINITY_POINTS, INFINITY_SMALLEST = 15, 5000  # of Chong and Forsyth
DENSE_NEIGHBOURS = 5  # of density and coverage
MIND_SAMPLES, MIND_DIRECTIONS, MIND_SEED = 5000, 1000, 2020


@dataclass(frozen=True)
class Metric:
    """One number about samples. `layer` is '<extractor>.<layer>'; `title` heads the table's column."""

    layer: str
    title: str
    better: ClassVar[str] = "lower"
    needs: ClassVar[str] = "gaussian"  # of the reference: gaussian or features; or labels; or nothing
    most: ClassVar[float | None] = None  # what it cannot exceed: 1 for a share

    def __call__(self, features: Tensor, reference: Any) -> Any:
        """The score of the samples' features (N, D), a number, or None if there is nothing to score.

        `reference` is what the metric `needs`: a `FeatureSet`; the labels (N,); or None.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What a report says of it; `hint` is for the reader of its numbers."""
        no_fid = "; no FID" if self.layer.startswith(("encoder.", "lite2.")) else ""
        hint = f"{self.better} is better{no_fid}"
        return {"title": self.title, "better": self.better, "most": self.most, "hint": hint}

    def details(self, features: Tensor, labels: Tensor) -> dict[str, Any]:
        """What a record keeps beside the score, for a metric that needs labels."""
        return {}

    def deviation(self, features: Tensor, reference: Any, times: int) -> float:
        """The standard deviation of the score over `times` resamplings of the samples, with replacement."""
        generator = torch.Generator().manual_seed(0)
        count, values = len(features), []
        for _ in range(times):
            rows = torch.randint(count, (count,), generator=generator).to(features.device)
            values.append(self(features[rows], reference))
        return torch.tensor(values, dtype=torch.float64).std().item()


@functools.lru_cache(maxsize=2)  # resampling asks for the same one again and again, and its root takes long
def _distance_to(mean: Tensor, cov: Tensor, device: torch.device) -> FrechetDistance:
    return FrechetDistance(mean.to(device), cov.to(device))


class Frechet(Metric):
    """The Fréchet distance to the reference's Gaussian: FID on Inception's pool, sFID on its spatial features."""

    def __call__(self, features: Tensor, reference: FeatureSet) -> float:
        distance = _distance_to(*reference.gaussians[self.layer], features.device)
        return distance(*statistics(features))


class FrechetAtInfinity(Metric):
    """The Fréchet distance of infinitely many samples (Chong and Forsyth, arXiv 1911.07023).

    A straight line through the distances of subsets of N samples, over 1/N, read off at 1/N = 0: the bias of FID is
    linear in 1/N. 15 sizes from 5,000 samples on (from half of them if there are fewer than 10,000).
    """

    def __call__(self, features: Tensor, reference: FeatureSet) -> float:
        count = len(features)
        smallest = min(INFINITY_SMALLEST, count // 2)
        if smallest < 2:
            raise UserError(f"an extrapolation to infinitely many samples takes at least 4, not {count}")
        distance = _distance_to(*reference.gaussians[self.layer], features.device)
        sizes = torch.linspace(smallest, count, INFINITY_POINTS).long().unique().tolist()
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randperm(count, generator=generator)[:size].to(features.device) for size in sizes]
        x = torch.tensor([1 / size for size in sizes], dtype=torch.float64)
        y = torch.tensor([distance(*statistics(features[part])) for part in rows], dtype=torch.float64)
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        return (y.mean() - slope * x.mean()).item()


class InceptionScore(Metric):
    """exp of the mean of KL(p(y|x) || p(y)), over parts of 5,000 samples in order, averaged: ADM's definition."""

    better = "higher"
    needs = ""

    def __call__(self, features: Tensor, reference: FeatureSet | None = None) -> float:
        log_p = features.double().log_softmax(dim=1)
        parts = []
        for log_part in log_p.split(IS_SPLIT):
            p = log_part.exp()
            parts.append((p * (log_part - p.mean(dim=0).log())).sum(dim=1).mean().exp())
        return torch.stack(parts).mean().item()


class InceptionScoreOfTorchFidelity(InceptionScore):
    """The same over 10 parts of the shuffled samples, whatever their number: torch-fidelity's definition."""

    def __call__(self, features: Tensor, reference: FeatureSet | None = None) -> float:
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

        if len(features) < 10:
            raise UserError(f"torch-fidelity's Inception Score takes at least 10 samples, not {len(features)}")
        return isc_features_to_metric(features.cpu())[KEY_METRIC_ISC_MEAN]


class KernelDistance(Metric):
    """KID by torch-fidelity: the squared MMD with a cubic kernel, the mean over 100 subsets of 1,000 images."""

    needs = "features"

    def __call__(self, features: Tensor, reference: FeatureSet) -> float:
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

        real = reference.features[self.layer]
        size = min(KID_SUBSET_SIZE, len(features), len(real))
        found = kid_features_to_metric(
            features.cpu(), real.cpu(), kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False
        )
        return found[KEY_METRIC_KID_MEAN]


class Precision(Metric):
    """The share of samples within the reference's manifold, see `within_manifold`."""

    better = "higher"
    needs = "features"
    most: ClassVar[float | None] = 1.0

    def __call__(self, features: Tensor, reference: FeatureSet) -> float:
        return self._inside(features, reference).double().mean().item()

    def deviation(self, features: Tensor, reference: FeatureSet, times: int) -> float:
        # Known for a share. Resampling would repeat points, and the nearest neighbour of a repeated one is itself.
        inside = self._inside(features, reference).double()
        return math.sqrt(inside.var(unbiased=False).item() / len(inside))

    def _inside(self, features: Tensor, reference: FeatureSet) -> Tensor:
        return within_manifold(features, reference.features[self.layer].to(features.device))


class Recall(Precision):
    """The share of the reference within the samples' manifold."""

    def _inside(self, features: Tensor, reference: FeatureSet) -> Tensor:
        return within_manifold(reference.features[self.layer].to(features.device), features)


class Density(Precision):
    """How many balls of the reference hold a sample, over the 5 that would (Naeem et al., arXiv 2002.09797).

    The number of pairs of a sample y and a real image x with |y - x| below r(x), over k M, for M samples; r(x) is the
    distance of x to its k-th nearest real neighbour, k = 5. Above 1 where samples crowd.
    """

    most = None

    def _inside(self, features: Tensor, reference: FeatureSet) -> Tensor:
        real = reference.features[self.layer].to(features.device)
        return balls_around(features, real, DENSE_NEIGHBOURS) / DENSE_NEIGHBOURS


class Coverage(Precision):
    """The share of the reference's balls, to the 5th nearest neighbour, that hold a sample (arXiv 2002.09797)."""

    def _inside(self, features: Tensor, reference: FeatureSet) -> Tensor:
        return balls_that_hold(features, reference.features[self.layer].to(features.device), DENSE_NEIGHBOURS)


class MongeDistance(Metric):
    """MIND (Berthet et al., arXiv 2605.06797): a sliced Wasserstein distance, whatever the distributions' form.

    3 D times the mean, over 1,000 random directions, of W_2^2 of both sets on that line, which pairs their numbers in
    order. Of 5,000 samples and 5,000 real images, the paper's MIND-5k, or of as many as there are of both; the fewer,
    the larger. Directions and choice are torch-fidelity's and RAEv2's: seed 2020, on the CPU.
    """

    needs = "features"

    def __call__(self, features: Tensor, reference: FeatureSet) -> float:
        sets, dim = [features, reference.features[self.layer].to(features.device)], features.shape[1]
        count, generator = min(MIND_SAMPLES, *map(len, sets)), torch.Generator().manual_seed(MIND_SEED)
        for i, part in enumerate(sets):
            if len(part) > count:
                sets[i] = part[torch.randperm(len(part), generator=generator)[:count].to(part.device)]
        lines = torch.randn(MIND_DIRECTIONS, dim, generator=generator).to(features.device)
        lines = lines / lines.norm(dim=1, keepdim=True)
        a, b = ((part.float() @ lines.mT).sort(dim=0).values for part in sets)
        return 3 * dim * (a - b).double().square().mean().item()


@dataclass(frozen=True)
class MetricSet:
    """Metrics by one name, against a reference of their own: a recipe's judge.

    names: of the metrics, in the order of a table; main: the one that a search goes by.
    """

    names: tuple[str, ...]
    main: str

    def reference(self) -> FeatureSet | None:
        """What the metrics compare with; None if they need nothing."""
        return None

    def check(self, images: Tensor, labels: Tensor) -> None:
        """A UserError for images (B, C, H, W) and labels (B,) that these metrics cannot look at."""

    def bounds(self, count: int) -> dict[str, Any]:
        """The scores of as many real images: what samples can reach."""
        return {}


def find_metric(name: str) -> Metric | None:
    """The metric that a score of that name is of; None for other names, and for a set's."""
    known, part = name in metrics or f"{name.partition(':')[0]}:" in metrics, None
    if known and not name.endswith(":"):
        with contextlib.suppress(UserError):  # of a feature space that is not known here, as in another's record
            part = metrics.create(name)
    return part if isinstance(part, Metric) else None


def plain_names(names: Iterable[str]) -> list[str]:
    """The metrics that these names stand for: those of a set, or of a ratio, in its place."""
    return [part for name in names for part in getattr(metrics.create(name), "names", (name,))]


def title(score: str) -> str:
    """What a score is called where it is shown: a metric by its title ('FD-digits'), another by its name."""
    metric = find_metric(score)
    return metric.title if metric else score


def register_metric(name: str, kind: type[Metric], layer: str, title: str) -> None:
    """File one kind of metric on one layer of features."""
    description = f"{title} on {layer}: {first_sentence(kind.__doc__ or '')}"
    metrics.register(name, description=description)(functools.partial(kind, layer, title))


register_metric("fid", Frechet, "inception.pool", "FID")
register_metric("sfid", Frechet, "inception.spatial", "sFID")
register_metric("is", InceptionScore, "inception.logits", "IS")
register_metric("is-torch-fidelity", InceptionScoreOfTorchFidelity, "inception.logits", "IS (10 parts)")
register_metric("kid", KernelDistance, "inception.pool", "KID")
register_metric("prec", Precision, "inception.pool", "precision")
register_metric("recall", Recall, "inception.pool", "recall")
register_metric("density", Density, "inception.pool", "density")
register_metric("coverage", Coverage, "inception.pool", "coverage")
register_metric("fid-infinity", FrechetAtInfinity, "inception.pool", "FID-infinity")
register_metric("mind", MongeDistance, "inception.pool", "MIND")
for _name, _layer, _title in (
    ("dinov2", "dinov2.cls", "DINOv2"),
    ("digits", "digits.features", "digits"),
    ("lite2", "lite2.pooled", "lite2"),
    ("encoder", "encoder.pooled", "encoder"),
):
    register_metric(f"fd-{_name}", Frechet, _layer, f"FD-{_title}")
    register_metric(f"fd-{_name}-infinity", FrechetAtInfinity, _layer, f"FD-{_title}-infinity")
    register_metric(f"mind-{_name}", MongeDistance, _layer, f"MIND-{_title}")
    register_metric(f"prec-{_name}", Precision, _layer, f"precision ({_title})")
    register_metric(f"recall-{_name}", Recall, _layer, f"recall ({_title})")
    register_metric(f"density-{_name}", Density, _layer, f"density ({_title})")
    register_metric(f"coverage-{_name}", Coverage, _layer, f"coverage ({_title})")
