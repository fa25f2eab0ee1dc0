"""The reference's features: from stored statistics if there are some, else extracted, and then cached.

The key of a cached file covers the images, how they are cropped, their number, the extractor, its weights and its
resizing, so that a stale one is never read.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dic_repa.errors import UserError, first_line, is_main_process
from dic_repa.evaluation.extractors import describe_extractors
from dic_repa.evaluation.features import FeatureSet
from dic_repa.evaluation.image_sets import ImageSet, open_images
from dic_repa.evaluation.metrics import Metric
from dic_repa.files.atomic import write_aside
from dic_repa.files.cache import cache_folder
from dic_repa.files.hashing import fingerprint
from dic_repa.files.lock import locked_output
from dic_repa.files.npz import NpzFile
from dic_repa.files.outputs import MARK
from dic_repa.files.reading import check_regular, parse_json
from dic_repa.files.weights import check_seal, seal
from dic_repa.protocols import FeatureExtractor
from dic_repa.runtime.progress import detail, warn

KEPT = 10_000  # reference images behind precision, recall and KID, as in ADM's reference files
FORMAT = "1"
UNKNOWN_COUNT = 2**62  # of stored statistics, which do not say how many images they are of
# What an .npz of statistics calls the Gaussians; the names are ADM's, and for mu and sigma also TTUR's.
STORED = {"inception.pool": ("mu", "sigma"), "inception.spatial": ("mu_s", "sigma_s")}


def load_reference(
    source,
    needed: Sequence[Metric],
    extractors: dict[str, FeatureExtractor],
    run: Callable[..., FeatureSet],
    resize: int | None = None,
    cache: bool = True,
    agree: Callable[[bool], bool] = bool,
) -> FeatureSet:
    """What the metrics `needed` compare with: the Gaussians and features of the real images `source`, see `Measure`.

    The stored statistics of an `.npz` serve Fréchet distances, as in ADM's script, and its images, if it has some, the
    rest. `run` is `extract` with its device; `agree` says whether something is so in all processes.

    Raises:
        UserError: `source` lacks something.
    """
    path = Path(source) if isinstance(source, (str, Path)) else None
    stored, has_images = FeatureSet(0), True
    if isinstance(source, FeatureSet):
        stored, has_images = source, False
    elif path and path.suffix == ".safetensors":
        stored, has_images = _read(path, _networks(needed, extractors)), False
    elif path and path.suffix == ".npz":
        file = NpzFile(path)
        stored = _stored(file)
        has_images = not stored.gaussians or "arr_0" in file.names
    left = [m for m in needed if m.layer not in (stored.features if m.needs == "features" else stored.gaussians)]
    if len(left) < len(needed) and resize and stored.size not in (None, (resize, resize)):
        height, width = stored.size
        raise UserError(
            f"{source} has statistics of images of {width}x{height}, which cannot be resized to {resize}; "
            "resize to their size, or give the images (a folder, or an .npz of arr_0 alone)"
        )
    if not left:
        return stored
    if not has_images:
        what = "statistics but no images" if left[0].needs == "features" else f"no statistics of {left[0].layer}"
        raise UserError(f"{path or 'the reference'} has {what}, which {left[0].title} needs; give the images")
    found = _extracted(open_images(source, resize), _networks(left, extractors), run, cache, agree)
    # The covariance of a reference that stores its statistics is that of more images than it has.
    found.gaussians |= stored.gaussians
    found.count = max(found.count, stored.count)
    return found


def _networks(needed: Sequence[Metric], extractors: dict[str, FeatureExtractor]) -> dict[str, FeatureExtractor]:
    return {name: extractors[name] for name in dict.fromkeys(metric.layer.partition(".")[0] for metric in needed)}


def _extracted(images: ImageSet, extractors: dict[str, FeatureExtractor], run, cache: bool, agree) -> FeatureSet:
    # All layers that some metric compares, so that other metrics find them in the cache too.
    layers = [f"{name}.{layer}" for name, found in extractors.items() for layer in found.layers if layer != "logits"]
    key = [FORMAT, images.fingerprint, len(images), images.resize, KEPT, layers, describe_extractors(extractors)]
    folder = cache_folder("statistics", "DIC_REPA_STATISTICS")
    file, found = folder / f"{fingerprint(json.dumps(key), size=16)}.safetensors", None
    if cache and file.is_file():
        with contextlib.suppress(UserError):  # damaged: made anew
            found = _read(file, extractors)
    # Another machine may lack the file, or another command may just have written it: all processes extract, or none.
    all_have_it = agree(found is not None)
    if found is None or not all_have_it:
        found = run(images, extractors, layers, KEPT, True)
        if found.constant == found.count:
            every = f"all {found.count} images are of a single colour each"
            raise UserError(f"{images.source}: {every}; they are no reference")
    found.notes, found.fingerprint = images.notes, images.fingerprint
    if all_have_it:
        detail(f"statistics of the reference: {file}")
    elif cache and is_main_process():
        try:
            with locked_output(file):
                save_statistics(found, file, extractors)
        except (UserError, OSError) as error:  # the next time takes longer, no more
            warn(f"the reference's statistics are not cached: {error}")
    return found


def _read(path: Path, extractors: dict[str, FeatureExtractor]) -> FeatureSet:
    """The statistics of a file; a UserError if it has none, or those of other extractors or weights."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            record = parse_json(metadata.get("statistics", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole file of statistics ({first_line(error)})") from None
    check_seal(tensors, metadata, path)
    if not isinstance(record, dict) or "count" not in record:
        raise UserError(f"{path} is not a file of statistics; make one with --save-statistics")
    for name, mine in describe_extractors(extractors).items():
        theirs = record["extractors"].get(name)
        if theirs != mine:
            what = "lacks" if theirs is None else "was made with other weights or resizing of"
            raise UserError(f"{path} {what} the extractor {name}; make it again from the images")
    size = tuple(record["size"]) if record["size"] else None
    found = FeatureSet(record["count"], size, constant=record.get("constant", 0))
    found.fingerprint = record.get("fingerprint", "")
    for name, tensor in tensors.items():
        kind, _, layer = name.partition("/")
        if kind == "features":
            found.features[layer] = tensor
        elif kind == "mean":
            found.gaussians[layer] = (tensor, tensors[f"cov/{layer}"])
    return found


def _stored(file: NpzFile) -> FeatureSet:
    """The Gaussians that an `.npz` stores; an empty set if there are none."""
    found = FeatureSet(0, fingerprint=file.checksum())
    for layer, (mean, cov) in STORED.items():
        if mean in file.names and cov in file.names:
            parts = torch.from_numpy(file.array(mean)).double(), torch.from_numpy(file.array(cov)).double()
            if parts[0].ndim != 1 or not len(parts[0]) or parts[1].shape != (len(parts[0]),) * 2:
                raise UserError(f"{file.path}: {mean} and {cov} must be (D,) and (D, D)")
            if not all(part.isfinite().all() for part in parts):
                raise UserError(f"{file.path}: {mean} or {cov} holds NaN or infinity")
            found.gaussians[layer], found.count = parts, UNKNOWN_COUNT
    if found.gaussians and "arr_0" in file.names and len(shape := file.shape("arr_0")) == 4:
        found.size = shape[1], shape[2]  # ADM stores the statistics of images like those beside them
    return found


def save_statistics(found: FeatureSet, path: str | Path, extractors: dict[str, FeatureExtractor]) -> None:
    """Write a reference's statistics into a safetensors file, new or in place of one of ours.

    It is read only with extractors of the same weights and resizing.

    Raises:
        UserError, OSError: it cannot be written.
    """
    tensors = {f"features/{layer}": part.contiguous() for layer, part in found.features.items()}
    for layer, (mean, cov) in found.gaussians.items():
        tensors |= {f"mean/{layer}": mean.contiguous(), f"cov/{layer}": cov.contiguous()}
    record = {name: getattr(found, name) for name in ("count", "size", "constant", "fingerprint")}
    record |= {"extractors": describe_extractors(extractors), "made_by": MARK}
    try:
        with write_aside(path) as aside:
            save_file(tensors, aside, {"statistics": json.dumps(record), **seal(tensors)})
    except SafetensorError as error:  # such as a full disk, which is no OSError there
        raise UserError(f"{path} cannot be written ({first_line(error)})") from None
