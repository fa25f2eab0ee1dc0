"""The feature cache: an encoder's tokens of a whole data set, computed once and then read instead of the encoder.

A cache is one .npy file (images, tokens, width) in float16, memory-mapped. Its name has a hash of the encoder and the
images, and a few of its tokens are compared with the encoder's before use, so an outdated cache is never read.

The CRC-32 of each image's tokens follows the array in the file, and is compared when a process first reads them: to
check hundreds of gigabytes at once would take minutes.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dic_repa.errors import UserError
from dic_repa.files.cache import cache_folder
from dic_repa.files.hashing import add_parts
from dic_repa.files.lock import holder, lock_beside, locked_output
from dic_repa.files.outputs import ASIDE
from dic_repa.files.pictures import unit_images
from dic_repa.protocols import Samples
from dic_repa.runtime.progress import progress_bar

BATCH = 64
HASHED_IMAGES, PROBED_IMAGES = 32, 4
TOLERANCE = 1e-2  # of the tokens' root mean square: float16 has 5e-4, and another device may give slightly others


class FeatureCache:
    """The tokens of a data set's images by index, (N, D) in float16 each."""

    def __init__(self, file: Path):
        self.file = file

    @functools.cached_property
    def array(self) -> np.ndarray:
        return np.load(self.file, mmap_mode="r", allow_pickle=False)

    @functools.cached_property
    def sums(self) -> np.ndarray | None:
        """The CRC-32 of each image's tokens; None in a cache of an earlier version. A ValueError if they are cut."""
        end = self.array.offset + self.array.nbytes  # type: ignore[attr-defined]  # a memory map has it
        length = self.file.stat().st_size - end
        if length not in (0, 4 * len(self.array)):
            raise ValueError(f"{self.file} has {length} bytes after its array")
        return np.fromfile(self.file, "<u4", offset=end) if length else None

    @functools.cached_property
    def _unread(self) -> np.ndarray:
        return np.ones(len(self.array), dtype=bool)

    def __getitem__(self, index: int) -> Tensor:
        tokens = np.array(self.array[index])
        if self.sums is not None and self._unread[index]:
            if zlib.crc32(tokens.data) != self.sums[index]:
                raise UserError(
                    f"the feature cache {self.file} is damaged: the tokens of image {index} have changed since they "
                    "were written; remove it, and the next run makes it anew"
                )
            self._unread[index] = False
        return torch.from_numpy(tokens)

    def damaged(self) -> list[int]:
        """The images whose tokens have changed since they were written; none in a cache of an earlier version."""
        sums = self.sums
        if sums is None:
            return []
        rows = progress_bar(self.array, desc=f"reading {self.file.name}", unit="image")
        return [index for index, row in enumerate(rows) if zlib.crc32(np.ascontiguousarray(row).data) != sums[index]]

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}  # each loader process maps it by itself: a pickled memory map would be a copy


class WithTokens(Dataset):
    """A data set whose samples hold cached tokens too, each cache's under its name."""

    def __init__(self, data: Samples, caches: dict[str, FeatureCache]):
        self.data, self.caches = data, caches
        self.permutation = getattr(data, "permutation", None)  # its own order of an epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.data[index] | {name: cache[index] for name, cache in self.caches.items()}


@torch.no_grad()
def feature_cache(
    name: str, options: dict[str, Any], encoder, data: Samples, device: torch.device | str = "cpu", workers: int = 0
) -> FeatureCache:
    """The cache of the tokens of the images of `data`, filled if there is none yet.

    `encoder` was built with `name` and `options`, and is on `device`; `workers` are processes that read images. A
    UserError if an image changes from one reading to the next, the disk is too small, or tokens exceed float16.
    """
    slug = re.sub(r"[^A-Za-z0-9.+-]+", "-", name)
    file = cache_folder("features", "DIC_REPA_CACHE") / f"{slug}-{cache_key(name, options, encoder, data)}.npy"
    probes = {
        i: encoder(unit_images(data[i]["image"][None].to(device)))[0].float() for i in spread(len(data), PROBED_IMAGES)
    }
    tokens, width = next(iter(probes.values())).shape

    def is_there() -> bool:
        return file.is_file() and _agrees(FeatureCache(file), probes, len(data))

    try:
        if not is_there():
            with locked_output(file, wait=True):  # another run may need the same one
                if not is_there():
                    _fill(file, (len(data), tokens, width), encoder, data, device, workers)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"the feature cache cannot be made in {file.parent} ({why}); set DIC_REPA_CACHE") from None
    return FeatureCache(file)


def cache_key(name: str, options: dict[str, Any], encoder, data: Samples) -> str:
    """The hash of what the tokens depend on: the encoder's name, options, code, weights and statistics, and images."""
    digest = encoder_hash(name, options, encoder, len(data), str(getattr(data, "fingerprint", "")))
    for index in spread(len(data), HASHED_IMAGES):
        image = data[index]["image"]
        if not torch.equal(image, data[index]["image"]):
            raise UserError(
                "the data gives another image each time that one is read (a random flip or crop), so its tokens cannot "
                "be cached; set cache: false in the alignment, or make the data's images fixed"
            )
        add_parts(digest, f"{index} {image.dtype} {tuple(image.shape)}", image)
    return digest.hexdigest()[:24]


def encoder_hash(name: str, options: dict[str, Any], encoder, *more):
    """A hash object of an encoder's name, options, code, weights and statistics, and of `more`, as JSON."""
    digest = hashlib.sha256()
    # A weights file counts by its content, not by its place.
    named = {key: value for key, value in options.items() if key != "weights"}
    digest.update(json.dumps([name, named, *more], default=str).encode())
    for kind in type(encoder).__mro__:
        if kind.__module__.partition(".")[0] == "torch":
            continue
        with contextlib.suppress(OSError, TypeError):  # of a class made at a prompt; the cache's probes still tell
            if source := inspect.getsourcefile(kind):
                digest.update(Path(source).read_bytes())
    if isinstance(encoder, nn.Module):
        for key, tensor in [*encoder.named_parameters(), *encoder.named_buffers()]:  # buffers that are not saved too
            add_parts(digest, f"{key} {tensor.dtype} {tuple(tensor.shape)}", tensor)
    return digest


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, first and last among them, evenly spread."""
    return sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)})


def _agrees(cache: FeatureCache, probes: dict[int, Tensor], count: int) -> bool:
    try:
        array, _ = cache.array, cache.sums
    except (EOFError, OSError, ValueError):
        return False
    for index, expected in probes.items():
        if array.dtype != np.float16 or array.shape != (count, *expected.shape):
            return False
        try:
            stored = cache[index].float().to(expected.device)
        except UserError:
            return False
        error = (stored - expected).square().mean().sqrt()
        if not error <= TOLERANCE * expected.square().mean().sqrt():
            return False
    return True


def _fill(file: Path, shape: tuple[int, int, int], encoder, data: Samples, device, workers: int) -> None:
    """Write the cache aside, and rename it once it is whole; the caller holds its lock."""
    needed, aside = 2 * int(np.prod(shape)), file.with_name(f"{ASIDE}{file.name}")
    _remove_leftovers(file.parent)
    if (free := shutil.disk_usage(file.parent).free) < needed:
        raise UserError(
            f"the feature cache takes {needed / 1e9:.1f} GB, but {file.parent} has {free / 1e9:.1f} GB left; "
            "set DIC_REPA_CACHE to a folder with more room, or cache: false"
        )
    try:
        # Written, not mapped: a full disk is then an error, and does not end the process.
        with aside.open("wb") as out, torch.random.fork_rng(devices=[]):  # a loader draws a seed from torch's generator
            np.lib.format.write_array_header_1_0(out, {"descr": "<f2", "fortran_order": False, "shape": shape})
            loader: DataLoader = DataLoader(WithTokens(data, {}), batch_size=BATCH, num_workers=workers)
            sums: list[int] = []
            for batch in progress_bar(loader, desc=f"caching {file.name}", unit="batch"):
                tokens = encoder(unit_images(batch["image"].to(device))).to(torch.float16)
                if not tokens.isfinite().all():
                    raise UserError("the encoder's tokens exceed what float16 holds (65504); set cache: false")
                rows = tokens.cpu().contiguous().numpy()
                sums += map(zlib.crc32, rows)
                out.write(rows.tobytes())
            out.write(np.array(sums, "<u4").tobytes())
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, file)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _remove_leftovers(folder: Path) -> None:
    """Remove what was left by processes that were killed; a cache that is being written has a lock beside it."""
    for left in folder.glob(f"{ASIDE}*.npy"):
        if holder(lock_beside(left)) is None:
            left.unlink(missing_ok=True)
            lock_beside(left).unlink(missing_ok=True)
