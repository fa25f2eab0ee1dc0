"""The reference's features: from stored statistics where there are some, else extracted, and then cached.

The key of a cached file covers the images, how they are cropped, their number, the extractor, its weights and its
resizing, so that a stale one is never read.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dic_repa.errors import UserError, first_line, is_main_process
from dic_repa.evaluation.extractors import describe_extractor
from dic_repa.evaluation.features import FeatureSet
from dic_repa.evaluation.image_sets import ImageSet, open_images
from dic_repa.evaluation.metrics import Metric
from dic_repa.files.atomic import write_aside
from dic_repa.files.cache import cache_folder
from dic_repa.files.hashing import fingerprint
from dic_repa.files.npz import NpzFile
from dic_repa.files.outputs import MARK
from dic_repa.protocols import FeatureExtractor
from dic_repa.runtime.progress import detail

KEPT = 10_000  # reference images behind precision, recall and KID, as in ADM's reference files
FORMAT = "1"
UNKNOWN_COUNT = 2**62  # of stored statistics, which do not say how many images they are of
# What an .npz of statistics calls the Gaussians; the names are ADM's, and for mu and sigma also TTUR's.
STORED = {"inception.pool": ("mu", "sigma"), "inception.spatial": ("mu_s", "sigma_s")}


class Reference:
    """Gives the features of real images that the metrics `needed` compare with.

    `run` is `extract` with its device; `agree` says whether something is so in all processes; the rest is as in
    `Measure`.
    """

    def __init__(
        self,
        needed: Sequence[Metric],
        extractors: dict[str, FeatureExtractor],
        run: Callable[..., FeatureSet],
        resize: int | None = None,
        cache: bool = True,
        agree: Callable[[bool], bool] = bool,
    ):
        self.needed, self.run, self.resize, self.cache, self.agree = list(needed), run, resize, cache, agree
        self._extractors = extractors

    @property
    def extractors(self) -> dict[str, FeatureExtractor]:
        """Those that are needed."""
        return {name: self._extractors[name] for name in dict.fromkeys(m.layer.partition(".")[0] for m in self.needed)}

    def load(self, source) -> FeatureSet:
        """The Gaussians and features of `source`, see `Measure`; a UserError says what it lacks.

        An `.npz` with stored statistics gives these to Fréchet distances, as in ADM's script, and its images, if it has
        some, to the rest.
        """
        if isinstance(source, FeatureSet):
            return self._complete(source, "the reference")
        ending = Path(source).suffix if isinstance(source, (str, Path)) else ""
        if ending == ".safetensors":
            found = self.read(Path(source))
            self._check_resize(found, source)
            return self._complete(found, source)
        stored = FeatureSet(0)
        if ending == ".npz":
            stored = _stored(NpzFile(source))
            left = [m for m in self.needed if m.needs == "features" or m.layer not in stored.gaussians]
            if len(left) < len(self.needed):
                self._check_resize(stored, source)
            if stored.gaussians and "arr_0" not in NpzFile(source).names:
                return self._complete(stored, source)
            self.needed = left
        if not self.needed:
            return stored
        found = self._extracted(open_images(source, self.resize))
        # The covariance of a reference that stores its statistics is that of more images than it has.
        found.gaussians |= stored.gaussians
        found.count = max(found.count, stored.count)
        return found

    def _check_resize(self, found: FeatureSet, source) -> None:
        """A UserError for statistics of images of another size, which cannot be resized any more."""
        if self.resize and found.size not in (None, (self.resize, self.resize)):
            height, width = found.size
            raise UserError(
                f"{source} has statistics of images of {width}x{height}, which cannot be resized to {self.resize}; "
                "resize to their size, or give the images (a folder, or an .npz of arr_0 alone)"
            )

    def _complete(self, found: FeatureSet, source) -> FeatureSet:
        for metric in self.needed:
            kept, what = (
                (found.features, "statistics but no images")
                if metric.needs == "features"
                else (found.gaussians, f"no statistics of {metric.layer}")
            )
            if metric.layer not in kept:
                raise UserError(f"{source} has {what}, which {metric.title} needs; give the images")
        return found

    def _extracted(self, images: ImageSet) -> FeatureSet:
        # All layers that some metric compares with, so that another choice of metrics finds them in the cache too.
        layers = [f"{name}.{k}" for name, found in self.extractors.items() for k in found.layers if k != "logits"]
        key = [FORMAT, images.fingerprint, len(images), images.resize, KEPT, layers, _describe(self.extractors)]
        folder = cache_folder("statistics", "DIC_REPA_STATISTICS")
        file, cached = folder / f"{fingerprint(json.dumps(key), size=16)}.safetensors", None
        if self.cache and file.is_file():
            with contextlib.suppress(UserError):  # damaged: made anew
                cached = self.read(file)
        # Another machine may lack the file, or another command have written it just now; all extract, or none.
        if self.agree(cached is not None) and cached is not None:
            detail(f"statistics of the reference: {file}")
            cached.notes, cached.fingerprint = images.notes, images.fingerprint
            return cached
        found = self.run(images, self.extractors, layers, KEPT, True)
        if found.constant == found.count:
            raise UserError(
                f"{images.source}: all {found.count} images are of a single colour each; they are no reference"
            )
        found.notes, found.fingerprint = images.notes, images.fingerprint
        if self.cache and is_main_process():
            try:
                save_statistics(found, file, self.extractors)
            except (UserError, OSError) as error:  # nothing is lost but time, the next time
                print(f"warning: the reference's statistics are not cached: {error}", file=sys.stderr)
        return found

    def read(self, path: Path) -> FeatureSet:
        """The statistics of a file; a UserError where it has none, or those of other extractors or weights."""
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {}).get("statistics", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is no whole file of statistics ({error})") from None
        if "count" not in record:
            raise UserError(f"{path} is no file of statistics; make one with --save-statistics")
        for name, mine in _describe(self.extractors).items():
            theirs = record["extractors"].get(name)
            if theirs != mine:
                what = "lacks" if theirs is None else "was made with other weights or resizing of"
                raise UserError(f"{path} {what} the extractor {name}; make it again from the images")
        found = FeatureSet(record["count"], tuple(record["size"]) if record["size"] else None)
        found.constant, found.fingerprint = record.get("constant", 0), record.get("fingerprint", "")
        for name, tensor in tensors.items():
            kind, _, layer = name.partition("/")
            if kind == "features":
                found.features[layer] = tensor
            elif kind == "mean":
                found.gaussians[layer] = (tensor, tensors[f"cov/{layer}"])
        return found


def _stored(file: NpzFile) -> FeatureSet:
    found = FeatureSet(UNKNOWN_COUNT)
    for layer, (mean, cov) in STORED.items():
        if mean in file.names and cov in file.names:
            parts = torch.from_numpy(file.array(mean)).double(), torch.from_numpy(file.array(cov)).double()
            if parts[0].ndim != 1 or parts[1].shape != (len(parts[0]),) * 2:
                raise UserError(f"{file.path}: {mean} and {cov} must be (D,) and (D, D)")
            if not all(part.isfinite().all() for part in parts):
                raise UserError(f"{file.path}: {mean} or {cov} holds NaN or infinity")
            found.gaussians[layer] = parts
    if found.gaussians and "arr_0" in file.names and len(shape := file.shape("arr_0")) == 4:
        found.size = shape[1], shape[2]  # ADM stores the statistics of images like those beside them
    found.fingerprint = file.checksum()
    return found if found.gaussians else FeatureSet(0)


def _describe(extractors: dict[str, FeatureExtractor]) -> dict[str, dict]:
    return {name: describe_extractor(extractor) for name, extractor in extractors.items()}


def save_statistics(found: FeatureSet, path: str | Path, extractors: dict[str, FeatureExtractor]) -> None:
    """Write what a reference is compared by into a safetensors file, new or in place of one of ours.

    The weights and resizing of `extractors` are kept too: a file is read only where these are the same.

    Raises:
        UserError, OSError: where it cannot be written.
    """
    tensors = {f"features/{layer}": part.contiguous() for layer, part in found.features.items()}
    for layer, (mean, cov) in found.gaussians.items():
        tensors |= {f"mean/{layer}": mean.contiguous(), f"cov/{layer}": cov.contiguous()}
    record = {name: getattr(found, name) for name in ("count", "size", "constant", "fingerprint")}
    record |= {"extractors": _describe(extractors), "made_by": MARK}
    try:
        with write_aside(path) as aside:
            save_file(tensors, aside, {"statistics": json.dumps(record)})
    except SafetensorError as error:  # such as a full disk, which is no OSError there
        raise UserError(f"{path} cannot be written ({first_line(error)})") from None
