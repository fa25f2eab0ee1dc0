"""From the bytes of any image file to the RGB picture that a network sees."""

import io
import math
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dic_repa.errors import UserError, first_line
from dic_repa.files.pictures import unit_images
from dic_repa.limits import check_limit, limit

EXTENSIONS = frozenset(".png .jpg .jpeg .jpe .webp .bmp .gif .tif .tiff .ppm .pgm .jp2 .avif".split())
# The formats of these endings. Pillow knows others by their content, and for EPS it would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")


class BadImage(UserError):
    """A damaged image file, or one that is not an image; the message names it."""


def decode_image(data: bytes, name: str) -> Image.Image:
    """The first frame of an image file as 8-bit RGB, over white if it is transparent, turned upright (EXIF).

    Raises:
        BadImage: names a file that is truncated, no image, or of more pixels than the limit.
    """
    Image.init()
    if Image.MAX_IMAGE_PIXELS and (most := limit("image-pixels")) > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = None if math.isinf(most) else int(most)  # above twice that, Pillow opens none
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours follows
            image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
        check_pixels(*image.size, name)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:  # with the number of pixels
        lift = "if it is meant, raise it: `dic-repa --limit image-pixels=none ...`"
        raise BadImage(f"{name} is over the limit ({first_line(error)}); {lift}") from None
    except Exception as error:  # Pillow's plugins raise anything from SyntaxError to struct.error on damaged data
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error) or repr(error)
        raise BadImage(f"{name} is not a whole image ({reason}); restore it") from None


def decode_stored(data: bytes, name: str) -> Tensor:
    """A picture that `encode_file` has made, as (3, H, W), uint8: faster, as nothing of it has to be found out.

    Raises:
        BadImage: names one that is damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=[*IMAGE_FORMATS]) as picture:
            return to_levels(picture)
    except Exception as error:  # Pillow raises anything on damaged data
        raise BadImage(f"{name} is not a whole image ({first_line(error)}); restore it") from None


def check_pixels(width: int, height: int, what: str) -> None:
    """A BadImage if an image of this size has more pixels than the limit; `what` names it."""
    try:
        check_limit("image-pixels", width * height, f"the number of pixels of {what}")
    except UserError as error:
        raise BadImage(str(error)) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float64)
        # Pillow gives 16-bit greyscale as "I;16" or, in older releases, as "I".
        image = Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(np.clip(np.rint(np.asarray(image) * 255), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int, name: str = "an image") -> Image.Image:
    """ADM's crop (arXiv 2105.05233): halved by a box filter while the short side is at least twice `size`, resized by a
    bicubic filter to a short side of `size`, and cut to the centre. A smaller image is enlarged.

    Raises:
        BadImage: it is so long that it would be too large at that short side; `name` is for the message.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = round(image.width * scale), round(image.height * scale)
    check_pixels(*sides, f"{name}, {image.width}x{image.height}, at a short side of {size},")
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# WebP's fastest lossless setting is as small as a PNG, is written several times faster and read about twice as fast.
# PNG above level 1 saves few percent and takes several times longer.
IMAGE_FORMATS = {
    "webp": {"lossless": True, "method": 0, "quality": 0},
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95, "subsampling": 0},
}


def encode_file(image: Image.Image, format: str) -> bytes:
    """The image as a file: 'webp' or 'png', without loss, or 'jpeg', quality 95 without colour subsampling."""
    file = io.BytesIO()
    image.save(file, format, **IMAGE_FORMATS[format])
    return file.getvalue()


def to_levels(image: Image.Image) -> Tensor:
    """An RGB or greyscale image as (C, H, W), uint8."""
    array = np.array(image)  # a copy, which torch may own
    return torch.from_numpy(array).view(*array.shape[:2], -1).permute(2, 0, 1).contiguous()


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB or greyscale image as (C, H, W), float32 in [0, 1]."""
    return unit_images(to_levels(image))
