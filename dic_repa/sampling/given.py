"""Images and masks that a user gives in Python, checked and as tensors."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dic_repa.data.images import decode_image, to_tensor
from dic_repa.errors import UserError
from dic_repa.files.pictures import unit_images
from dic_repa.files.reading import read_file

Given: TypeAlias = Image.Image | Tensor | str | Path  # one image; a tensor is (C, H, W), or (N, C, H, W) for several


def read_images(images: Given | Iterable[Given], channels: int, size: tuple[int, int]) -> Tensor:
    """Images as (N, channels, H, W), float32 in [0, 1].

    Args:
        images: PIL images, paths of image files, or tensors, uint8 or float in [0, 1]: one or several.
        channels: 1 or 3; a PIL image or a file without colours is taken for either.
        size: (H, W) that all must have.

    Raises:
        UserError: there is none, one cannot be read, or one is of another size or other channels.
    """
    several = images if _is_several(images) else [images]
    found = [_read(image, channels, size, f"image {k}") for k, image in enumerate(several)]  # type: ignore[arg-type]
    if not found:
        raise UserError("there are no images: give at least one")
    return torch.stack(found)


def _is_several(images: object) -> bool:
    if isinstance(images, Tensor):
        return images.ndim > 3
    return isinstance(images, Iterable) and not isinstance(images, Image.Image | str)


def _read(image: Given, channels: int, size: tuple[int, int], name: str) -> Tensor:
    if isinstance(image, str | Path):
        name = str(image)
        if not Path(image).is_file():
            raise UserError(f"there is no image file {image}")
        image = decode_image(read_file(image), name)
    if isinstance(image, Image.Image):
        image = to_tensor(image if image.mode in ("RGB", "L") else image.convert("RGB"))
        if channels == 1 and (image == image[:1]).all():
            image = image[:1]
        elif channels == 3:
            image = image.expand(3, -1, -1)
    if not isinstance(image, Tensor) or image.ndim != 3:
        shape = f" of shape {tuple(image.shape)}" if isinstance(image, Tensor) else ""
        raise UserError(
            f"{name} is a {type(image).__name__}{shape}: give PIL images, paths, or a tensor (N, {channels}, H, W)"
        )
    image = unit_images(image)
    if image.shape[0] != channels:
        hint = "; make it grey by .convert('L')" if channels == 1 else ""
        raise UserError(f"{name} has {image.shape[0]} channels, the model's images have {channels}{hint}")
    if image.shape[1:] != size:
        height, width = image.shape[1:]
        raise UserError(
            f"{name} is {width}x{height}, the model's images are {size[1]}x{size[0]}: crop or resize it first, for "
            "example by dic_repa.data.images.center_crop"
        )
    if not image.is_floating_point() or not (image >= 0).all() or not (image <= 1).all():  # not of NaN either
        raise UserError(f"{name} holds values out of [0, 1]: give uint8 from 0 to 255, or floats from 0 to 1")
    return image.float()


def read_mask(mask: Image.Image | Tensor | str | Path, count: int, size: tuple[int, int]) -> Tensor:
    """A mask as booleans (count, 1, H, W): true where it is white, true, or at least 1/2.

    Args:
        mask: a PIL image, the path of one, or a tensor (H, W), (1, H, W) or (count, 1, H, W).

    Raises:
        UserError: it is of another size, or true nowhere.
    """
    if isinstance(mask, str | Path):
        mask = decode_image(read_file(mask), str(mask))
    if isinstance(mask, Image.Image):
        mask = to_tensor(mask.convert("L"))
    if (
        not isinstance(mask, Tensor)
        or mask.shape[-2:] != size
        or mask.numel() not in (size[0] * size[1] * n for n in (1, count))
    ):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(f"the mask is {shape}, the images are {size[0]} rows of {size[1]}: give it in their size")
    chosen = (unit_images(mask) >= 0.5).reshape(-1, 1, *size).expand(count, -1, -1, -1)
    if not chosen.any():
        raise UserError("the mask is white nowhere: white, or true, is what is painted anew")
    return chosen


def is_list(classes: Any) -> bool:
    """Whether these are the classes of several images, not one for all."""
    return hasattr(classes, "__len__") and not isinstance(classes, str)


def chosen_classes(classes: Any, count: int) -> list:
    """The class of each of `count` images, from one for all or one for each; a UserError for another number of them."""
    if not is_list(classes):
        return [classes] * count
    found = classes.tolist() if isinstance(classes, Tensor | np.ndarray) else list(classes)
    if len(found) != count:
        raise UserError(f"{len(found)} classes for {count} images: give one for each, or one for all")
    return found
