"""Fréchet distances of several feature spaces as one number: FDr, and the metrics of the spaces that it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dic_repa.errors import UserError, unknown_name
from dic_repa.evaluation.metrics import Frechet, Metric, MongeDistance, find_metric, metrics, register_metric
from dic_repa.evaluation.spaces import SPACES

for _name, _space in SPACES.items():
    register_metric(f"fd-{_name}", Frechet, f"{_name}.features", f"FD-{_space.title}")
    register_metric(f"mind-{_name}", MongeDistance, f"{_name}.features", f"MIND-{_space.title}")


@dataclass(frozen=True)
class MeanRatio(Metric):
    """FDr^k (Yang et al., arXiv 2604.28190): how much farther samples are than held-out images, a mean over k spaces.

    FDr^k = 1/k sum_i FD_i(samples, reference) / FD_i(held out, reference): at 1 they are as near to the reference as
    the held-out images, which are the bound, or of which `published` tells the scores. It has no interval of its own.

    Args:
        names: the metrics, one for each space. They are scored and shown too.
        published: what held-out images score in each; empty: what the bound scores here.
    """

    names: tuple[str, ...] = ()
    published: tuple[float, ...] = ()

    def ratio(self, scores: Mapping[str, float], real: Mapping[str, float]) -> float:
        """The mean ratio of the scores of samples, by name, to those of the `real` images."""
        real = dict(zip(self.names, self.published)) or real
        if zero := [name for name in self.names if not real[name]]:
            same = f"the bound scores 0 in {', '.join(zero)}, as the reference itself does"
            raise UserError(f"{self.title}: {same}; name held-out images")
        return sum(scores[name] / real[name] for name in self.names) / len(self.names)


SIX = ("fid", *(f"fd-{name}" for name in SPACES))
IMAGENET = (1.68, *(space.validation for space in SPACES.values()))  # that of FID is to ADM's reference
metrics.register("fdr6", description="FDr6: the mean ratio to held-out images' distances, in six feature spaces")(
    partial(MeanRatio, " + ".join(SIX), "FDr6", SIX)
)
metrics.register("fdr6-imagenet", description="FDr6 by the published distances of ImageNet's validation images")(
    partial(MeanRatio, " + ".join(SIX), "FDr6 (ImageNet)", SIX, IMAGENET)
)


@metrics.register("fdr:")
def ratio_of(spaces: str) -> MeanRatio:
    """FDr of any feature spaces, joined by +: fdr:inception+dinov2, fdr:lite2+encoder."""
    names = ["fid" if space == "inception" else f"fd-{space}" for space in spaces.split("+")]
    known = [name for name in metrics if isinstance(find_metric(name), Frechet) and name != "sfid"]
    for name in names:
        if name not in known:
            raise unknown_name("feature space", name.removeprefix("fd-"), [n.removeprefix("fd-") for n in known])
    return MeanRatio(" + ".join(names), f"FDr ({spaces})", tuple(names))


def find_ratios(names: Sequence[str], bound: object) -> dict[str, MeanRatio]:
    """The ratios among the metrics `names`; a UserError where one needs a bound and there is none."""
    found = {name: part for name in names if isinstance(part := metrics.create(name), MeanRatio)}
    for name, part in found.items():
        if bound is None and not part.published:
            raise UserError(
                f"{name} divides by what held-out real images score: name some by --bound (in a recipe: evaluate.bound)"
            )
    return found
