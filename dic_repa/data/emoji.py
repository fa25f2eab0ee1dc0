"""The embedded emoji: 3,374 colour pictures of 32 px in nine groups, so that real images need no download.

They are the 3D emoji of Microsoft's Fluent set; `python -m dic_repa.data.make_emoji` makes a file of them in any size.
Such a file is a zip: `index.json` has the size and the names of each group; `pictures.webp` has all pictures in rows,
sorted by name. A name is the emoji's code points, such as `1f44b-1f3fb`, a waving hand in a light skin tone.
"""

import hashlib
import re
import zipfile
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dic_repa.data.autoencoders import load_spec
from dic_repa.data.copies import Copies
from dic_repa.data.images import decode_image
from dic_repa.data.latents import LatentDataset
from dic_repa.data.registry import register_dataset
from dic_repa.errors import UserError, first_line, unknown_name
from dic_repa.files.hashing import fingerprint
from dic_repa.files.reading import parse_json
from dic_repa.files.zips import zip_members

GROUPS = (
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects",
    "People & Body", "Smileys & Emotion", "Symbols", "Travel & Places",
)  # fmt: skip
SPLITS = ("train", "held-out")
INDEX, SHEET = "index.json", "pictures.webp"
EMBEDDED_SIZE, EMBEDDED = 32, "assets/emoji_32.zip"
SCRIPT = "`python -m dic_repa.data.make_emoji`"

# What in a name only tells a picture from its variants: the way to show it, the joiner, woman and man, to the right,
# skin tones, hair.
_VARIES = frozenset("fe0f 200d 2640 2642 27a1 1f3fb 1f3fc 1f3fd 1f3fe 1f3ff 1f9b0 1f9b1 1f9b2 1f9b3".split())
_PERSON, _CHILD, _FAMILY = "1f9d1", "1f9d2", "1f46a"
# In each line, variants that have names of their own.
_ALIKE = {
    other: line.split()[0]
    for line in (
        "1f9d1 1f468 1f469 1f471 1f9d4",  # a person, man, woman, with blond hair, with a beard
        "1f9d2 1f466 1f467",  # a child, boy, girl
        "1f9d3 1f474 1f475",  # an older person, man, woman
        "1fac5 1f934 1f478",  # a person with a crown, prince, princess
        "1f385 1f936 1f9d1-1f384",  # Santa and Mrs. Claus
        "1f483 1f57a",  # people who dance
        "1f930 1fac3 1fac4",  # pregnant people
        "1f46b 1f46c 1f46d 1f9d1-1f91d-1f9d1",  # two who hold hands
        "1f491 1f9d1-2764-1f9d1",  # two with a heart
        "1f48f 1f9d1-2764-1f48b-1f9d1",  # two who kiss
        "1f91d 1faf1-1faf2",  # a handshake
        "1f431 1f63a",  # the same picture of a cat, to the pixel
        "26c4 2603",  # a snowman, and snow
    )
    for other in line.split()[1:]
}
# Mirrored, these would be wrong: clocks; letters, digits and signs of money; notes; maps.
_NEVER_MIRRORED = {f"{code:x}" for code in range(0x1F550, 0x1F568)}.union(
    "1f570 231a 23f0 23f1 23f2 1f004 1f947 1f948 1f949 1f3b0 1f3b1 1f9e7 1f4af 1f4a4 1f634 1f911 1f92c 1f4b0".split(),
    "1f4b4 1f4b5 1f4b6 1f4b7 1f4b8 1f4b9 1f4c8 1f4c9 1f4e7 1f3b5 1f3b6 1f3bc 1f3ea 1f3e6 1f30d 1f30e 1f30f".split(),
    "1f5fa 1f5fe".split(),
)


def picture_key(name: str) -> str:
    """The name that all variants of a picture share: of skin tone, hair, man or woman, direction."""
    first, *rest = name.split("-")
    parts = [_ALIKE.get(part, part) for part in (first, *(part for part in rest if part not in _VARIES))]
    if len(parts) > 1 and {*parts} <= {_PERSON, _CHILD}:
        return _FAMILY
    return _ALIKE.get("-".join(parts), "-".join(parts))


def is_held_out(name: str) -> bool:
    """Whether the picture is not trained on: an eighth of the keys, so that all variants are on one side."""
    return int(hashlib.sha256(picture_key(name).encode()).hexdigest(), 16) % 8 == 0


def may_mirror(name: str, group: str) -> bool:
    """Whether the mirrored picture could be one of the group as well: no flag, sign, letter, clock or map."""
    return group not in ("Flags", "Symbols") and name.split("-")[0] not in _NEVER_MIRRORED


def columns_of(count: int) -> int:
    """The pictures in a row of the sheet, which is about as wide as high."""
    return int(np.ceil(np.sqrt(count)))


def read_pictures(path: Path) -> tuple[dict[str, str], Tensor]:
    """The group of each picture by its name, and the pictures (N, 3, size, size), uint8, in the same order.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    try:
        zip_members(path, "is damaged or no file of emoji")
        with zipfile.ZipFile(path) as archive:
            index, sheet = parse_json(archive.read(INDEX)), archive.read(SHEET)
        size, groups = int(index["size"]), {name: group for group in GROUPS for name in index["groups"].get(group, ())}
        if not all(re.fullmatch("[0-9a-f-]+", name) for name in groups):
            raise ValueError("its names are no code points")
        picture = np.asarray(decode_image(sheet, f"{SHEET} in {path}"))
        columns = columns_of(len(groups))
        rows = picture.reshape(-1, size, columns, size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
        if not size * len(groups) or -(-len(groups) // columns) * columns != len(rows):
            raise ValueError(f"{len(groups)} names do not fit its {picture.shape[1]}x{picture.shape[0]} pixels")
        return {name: groups[name] for name in sorted(groups)}, torch.from_numpy(rows[: len(groups)].copy())
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; make it with {SCRIPT}") from None
    except Exception as error:  # zip, JSON and arrays raise anything from BadZipFile to AttributeError
        raise UserError(f"{path} is damaged or no file of emoji ({first_line(error)}); make it with {SCRIPT}") from None


@register_dataset("emoji")
class Emoji(LatentDataset):
    """Samples of `image` (3, H, W), uint8, and `label`, int64: one of nine groups. The pixels are the data, or what an
    autoencoder makes of them in the training step.

    The samples are in an order that has nothing to do with what they show. With `flip` or `shift` there are more of
    them (`Copies`).

    Args:
        split: 'train', or 'held-out': the pictures of an eighth of the keys, on no side of which is a variant of one on
            the other.
        size: height and width of the denoiser's data; the pictures are larger by the autoencoder's reduction.
        path: a file that `python -m dic_repa.data.make_emoji` made; without it the embedded pictures of 32 px.
        flip: also mirrored, but for flags, symbols, clocks, letters and maps.
        shift: also moved by up to so many pixels to each side, down and across.
        unlabelled: without classes; every label is 0, the null class.
        autoencoder: 'none' for pixels, a registered one, a hub id or a local folder.
    """

    class_names: tuple[str, ...] = GROUPS
    splits = SPLITS

    def __init__(
        self,
        split: str = "train",
        size: int = EMBEDDED_SIZE,
        path: str | Path | None = None,
        flip: bool = False,
        shift: int = 0,
        unlabelled: bool = False,
        autoencoder: str = "none",
    ):
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        self.size, self.spec = size, load_spec(autoencoder)
        reduction = self.spec.downsample
        if not path and size * reduction != EMBEDDED_SIZE:
            raise UserError(
                f"data.size is {size}, but the emoji of the package have {EMBEDDED_SIZE} px; set "
                f"data.size={EMBEDDED_SIZE // reduction}, or make a file with {SCRIPT} and name it as data.path"
            )
        if path:
            groups, images = read_pictures(Path(path))
        else:
            with resources.as_file(resources.files("dic_repa.data").joinpath(EMBEDDED)) as file:
                groups, images = read_pictures(file)
        pixels = images.shape[-1]
        if pixels % reduction:
            raise UserError(f"{path} has pictures of {pixels} px, which {autoencoder} cannot halve to whole latents")
        self.check_size(size, pixels // reduction, str(path))
        places = {name: place for place, name in enumerate(groups)}
        self.names = [name for name in groups if is_held_out(name) == (split == "held-out")]
        if not self.names:
            raise UserError(f"{path} has no emoji of the split '{split}'; make it again from all emoji with {SCRIPT}")
        self.names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        self.images = images[[places[name] for name in self.names]]
        self.labels = [0 if unlabelled else GROUPS.index(groups[name]) for name in self.names]
        if unlabelled:
            self.class_names = ()
        mirrored = [place for place, name in enumerate(self.names) if flip and may_mirror(name, groups[name])]
        self.copies = Copies(len(self.names), mirrored, shift, pixels)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the images for a feature cache."""
        return fingerprint(str(self.copies), self.images)

    def __len__(self) -> int:
        return len(self.copies)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = self.copies.picture(index)
        return {"image": self.copies.apply(self.images[place], index), "label": torch.tensor(self.labels[place])}
