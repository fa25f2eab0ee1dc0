"""Sets in WebDataset's format, on a disk or at an address, with samples by index as every other data set has them.

So order and resuming are exact: an epoch is a permutation that depends on (seed, epoch) alone. Where only some shards
can be at hand, it is one in which the samples of any moment are from few shards.
"""

import bisect
import io
import math
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dic_repa.data.autoencoders import LatentStatistics, load_spec
from dic_repa.data.images import center_crop, decode_image, decode_stored, to_levels
from dic_repa.data.latents import LatentDataset
from dic_repa.data.prepared import check_settings, prepared_spec
from dic_repa.data.registry import register_dataset
from dic_repa.data.shard_lists import find_shards
from dic_repa.data.shard_store import ShardStore
from dic_repa.data.tar_shards import ABSENT, FLIPPED, IMAGE, LABEL, MOMENTS
from dic_repa.errors import UserError, is_main_process
from dic_repa.files.npz import read_array
from dic_repa.limits import check_limit
from dic_repa.runtime.progress import warn
from dic_repa.trust import check_code

KEEP = 64
WINDOW = 16  # shards, of a web server


@register_dataset("webdataset")
class WebDataset(LatentDataset):
    """Samples of tar shards in WebDataset's format: dicts of `image` (3, H, W), uint8, and `moments`, as far as there
    are pictures and .npy, and `label`.

    With `flip`, the second half of the samples mirrors the first. Pictures of another size are cropped.

    Args:
        path: a folder of .tar files, one .tar, a pattern such as shards/{000..127}.tar, an index in JSON; or the
            http(s) address of one of these (a folder needs an index.json).
        size: height and width of the denoiser's data; None takes what `dic-repa prepare` made.
        autoencoder: what made the .npy, or encodes the pictures; 'none' for pixels.
        num_classes: by default what `dic-repa prepare` says, or one more than the highest class number.
        flip: use mirrored pictures too; their moments must be there. By default if `dic-repa prepare` stored them.
        shuffle_shards: samples are mixed among so many shards at a time; 0, the default for a disk: among all.
        keep_shards: so many shards of a web server are kept on the disk.
    """

    def __init__(
        self,
        path: str | Path,
        size: int | None = None,
        split: str = "train",
        autoencoder: str | None = None,
        num_classes: int | None = None,
        flip: bool | None = None,
        shuffle_shards: int | None = None,
        keep_shards: int = KEEP,
    ):
        self.path = str(path)
        self.store = ShardStore(self.path, keep_shards)
        self.window = (WINDOW if self.store.shards.remote else 0) if shuffle_shards is None else shuffle_shards
        self._check_window(keep_shards)
        self.starts = (np.cumsum(self.store.counts) - self.store.counts).tolist()
        self.pictures = int(self.store.counts.sum())
        self.known_header: tuple[bytes, int, np.dtype] | None = None  # of an .npy, its length, and its kind of number
        has = self.store.table(0)[0]
        if settings := self.store.shards.prepared:
            check_settings(settings, self.path, "prepare it again")
            self.spec = prepared_spec(settings, autoencoder, self.path)
            if num_classes is not None:
                raise UserError(f"the classes of {path} are in its index; leave out data.options.num_classes")
            self.class_names, self.size = tuple(settings["class_names"]), settings["size"] // self.spec.downsample
            self.check_size(size or self.size, self.size, self.path)
        else:
            self.spec = load_spec(autoencoder or "none")
            self.class_names = self._classes(num_classes) if has[LABEL] != ABSENT else ()
            if size is None:
                raise UserError(f"{path} does not say its size; set data.size")
            self.size = size
        self._check_labels()
        self.latent = self.spec.name != "none" and has[MOMENTS] != ABSENT
        if not self.latent and has[IMAGE] == ABSENT:
            raise UserError(f"{path} holds .npy and no pictures; name what made the .npy as data.autoencoder")
        if not self.latent and has[MOMENTS] != ABSENT and is_main_process():
            warn(f"{path}: the .npy are passed over, since data.autoencoder names nothing that made them")
        self.flip = bool(settings and settings["flip"]) if flip is None else flip
        if self.flip and self.latent and has[FLIPPED] == ABSENT:
            raise UserError(f"{path} holds no .flipped.npy, which data.options.flip asks for; set it to false")
        if self.store.labels is not None and self.class_names:
            self.labels = self.store.labels  # the class of each picture

    @classmethod
    def autoencoder_of(cls, path: str) -> str:
        prepared = find_shards(path).prepared
        if not prepared:
            return cls.default_autoencoder
        check_settings(prepared, path, "prepare it again")
        check_code({"autoencoder": prepared["autoencoder"]["name"]}, path)
        return prepared["autoencoder"]["name"]

    @property
    def statistics(self) -> LatentStatistics:
        if not (found := (self.store.shards.prepared or {}).get("statistics")):
            return super().statistics
        try:
            mean, std = (tuple(map(float, found[key])) for key in ("mean", "std"))
            if len(mean) != self.channels or not all(map(math.isfinite, mean + std)) or min(std) < 0:
                raise ValueError("impossible numbers")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"the statistics in the index of {self.path} are damaged ({error}); restore it") from None
        return LatentStatistics(mean, std)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the images for a feature cache."""
        return f"{self.store.fingerprint()} {self.size} {self.flip}"

    def __len__(self) -> int:
        return self.pictures * (2 if self.flip else 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        flipped, picture = divmod(index, self.pictures)
        shard, row = self._place(picture)
        places = self.store.table(shard)[row].tolist()
        label = max(0, places[LABEL])
        if label >= max(1, self.num_classes):
            raise UserError(self._beyond(shard, row, label))
        sample = {"label": torch.tensor(label)}
        if self.with_images or not self.latent:
            image = self._image(shard, row, *places[IMAGE : IMAGE + 2])
            sample["image"] = image.flip(-1) if flipped else image
        if self.latent:
            column = FLIPPED if flipped else MOMENTS
            sample["moments"] = self._moments(shard, row, *places[column : column + 2])
        return sample

    def permutation(self, generator: torch.Generator) -> np.ndarray:
        """The order of an epoch, (len(self),): with `shuffle_shards`, at any moment from so many shards and one more.

        The shards have a random order; each sample's place is that of its shard, plus a random part of the window. The
        end is joined to the beginning, so that no part of an epoch is less mixed.
        """
        shards = len(self.store.counts)
        if not 0 < self.window < shards:
            return torch.randperm(len(self), generator=generator).numpy()
        begins = torch.randperm(shards, generator=generator).repeat_interleave(torch.from_numpy(self.store.counts))
        begins = begins.repeat(2) if self.flip else begins
        places = begins + self.window * torch.rand(len(self), generator=generator, dtype=torch.float64)
        return torch.argsort(places % shards, stable=True).numpy()

    def _place(self, picture: int) -> tuple[int, int]:
        """The shard that a picture is in, and its row there."""
        shard = bisect.bisect_right(self.starts, picture) - 1
        return shard, picture - self.starts[shard]

    def _image(self, shard: int, row: int, start: int, size: int) -> Tensor:
        content, side = self.store.read(shard, start, size), self.size * self.spec.downsample
        name = f"the picture of sample {row} in {self.store.shards.place(shard)}"
        if not self.store.shards.prepared:
            picture = decode_image(content, name)
            return to_levels(picture if picture.size == (side, side) else center_crop(picture, side, name))
        image = decode_stored(content, name)
        if image.shape != (3, side, side):
            raise UserError(f"{name} is {tuple(image.shape)}, not {(3, side, side)}; prepare the shard again")
        return image

    def _moments(self, shard: int, row: int, start: int, size: int) -> Tensor:
        content, shape = self.store.read(shard, start, size), (self.spec.moments, self.size, self.size)
        if self.known_header:  # all have the same, and to read it takes longer than the rest
            header, length, kind = self.known_header
            if size == length and content.startswith(header):
                return torch.from_numpy(np.frombuffer(content, kind, offset=len(header)).reshape(shape).copy())
        name = f"the .npy of sample {row} in {self.store.shards.place(shard)}"
        try:
            array = read_array(io.BytesIO(content), size, name)
        except ValueError as error:
            raise UserError(f"{name} is not a whole array of numbers ({error}); make the shard again") from None
        if array.size != np.prod(shape) or array.shape[-3:] != shape:
            raise UserError(
                f"{name} has the shape {list(array.shape)}, and {self.spec.name} with data.size {self.size} gives "
                f"{list(shape)}; correct data.size or data.autoencoder"
            )
        if array.flags.c_contiguous:
            self.known_header = (content[: size - array.nbytes], size, array.dtype)
        return torch.from_numpy(array.reshape(shape))

    def _classes(self, num_classes: int | None) -> tuple[str, ...]:
        highest = self.store.highest
        if num_classes is None and highest is None:
            raise UserError(f"the index of {self.path} names no classes; set data.options.num_classes")
        count = num_classes if num_classes is not None else int(highest or 0) + 1
        check_limit("classes", count, "data.options.num_classes" if num_classes else f"the classes of {self.path}")
        return tuple(map(str, range(count)))

    def _check_labels(self) -> None:
        labels = self.store.labels
        if labels is not None and self.store.highest is not None and self.store.highest >= max(1, self.num_classes):
            picture = int(labels.argmax())
            raise UserError(self._beyond(*self._place(picture), int(labels[picture])))

    def _beyond(self, shard: int, row: int, label: int) -> str:
        what = f"sample {row} in {self.store.shards.place(shard)} is of class {label}"
        return f"{what}, and there are {self.num_classes}, numbered from 0; set data.options.num_classes, or correct it"

    def _check_window(self, keep: int) -> None:
        if self.window < 0:
            raise UserError(f"data.options.shuffle_shards is {self.window}; it is a number of shards, or 0 for all")
        shards = len(self.store.counts)
        needed = min(shards, self.window or shards)
        if self.store.shards.remote and keep < needed:
            raise UserError(
                f"data.options.keep_shards is {keep}, and samples are mixed among {needed} shards, which would be "
                f"loaded again and again; set it to {2 * needed}, or mix among fewer (data.options.shuffle_shards)"
            )
