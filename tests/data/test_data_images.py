"""Image files of every kind become the RGB picture that a viewer shows; ADM's crop; what is not an image is named."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from pictures import as_file, picture
from PIL import Image
from torchvision.transforms import functional as TF

from dic_repa.data.images import BadImage, center_crop, decode_image, encode_file, to_tensor


def decoded(image: Image.Image, format: str = "PNG", **options) -> np.ndarray:
    result = decode_image(as_file(image, format, **options), "x")
    assert result.mode == "RGB"
    return np.asarray(result)


def test_greyscale_is_three_equal_channels():
    grey = picture(0).convert("L")
    np.testing.assert_array_equal(decoded(grey), np.asarray(grey)[..., None].repeat(3, axis=2))


def test_16_bit_greyscale_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 256 * 4).reshape(4, 256).astype(np.uint16)
    expected = np.rint(values / 65535 * 255)
    np.testing.assert_array_equal(decoded(Image.fromarray(values))[..., 0], expected)
    assert decoded(Image.fromarray(values), "TIFF")[..., 1].tolist() == expected.tolist()


def test_palette():
    image = picture(1).quantize(16)
    np.testing.assert_array_equal(decoded(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode):
    image = picture(2).convert(mode)
    alpha = np.tile(np.linspace(0, 255, image.width).round().astype(np.uint8), (image.height, 1))
    image.putalpha(Image.fromarray(alpha))
    colour = np.asarray(image.convert("RGBA")).astype(float)
    share = colour[..., 3:] / 255
    expected = colour[..., :3] * share + 255 * (1 - share)
    np.testing.assert_allclose(decoded(image), expected, atol=1)


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((3, 3), 1)
    result = decoded(image, transparency=0)
    assert result[0, 0].tolist() == [255, 255, 255]
    assert result[3, 3].tolist() == [200, 100, 50]


def test_cmyk_jpeg():
    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # all cyan
    red, green, blue = decoded(cmyk, "JPEG", quality=100)[8, 8]
    assert red < 10
    assert green > 200
    assert blue > 200


def test_exif_rotation():
    image = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: show it turned by 90 degrees clockwise
    np.testing.assert_array_equal(decoded(image, exif=exif), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_truncated_file_is_named(format):
    whole = as_file(picture(4, (200, 200)), format)
    with pytest.raises(BadImage, match=r"cat/7\.png is not a whole image"):
        decode_image(whole[: len(whole) // 2], "cat/7.png")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"<html></html>" * 100])
def test_what_is_no_image_is_named(content):
    with pytest.raises(BadImage, match="notes"):
        decode_image(content, "notes")


def test_crop_is_resize_and_centre():
    image = picture(5, (90, 60))  # below twice the size: one bicubic step, here to 60 x 40
    expected = TF.center_crop(TF.resize(image, 40, TF.InterpolationMode.BICUBIC), [40, 40])
    np.testing.assert_array_equal(np.asarray(center_crop(image, 40)), np.asarray(expected))


def test_crop_of_a_large_image_halves_first():
    image = picture(6, (400, 320))
    block = to_tensor(image).unfold(1, 2, 2).unfold(2, 2, 2).mean(dim=(-1, -2))
    halved = Image.fromarray((block * 255).round().byte().permute(1, 2, 0).numpy())
    expected = TF.center_crop(TF.resize(halved, 96, TF.InterpolationMode.BICUBIC), [96, 96])
    difference = to_tensor(center_crop(image, 96)) - to_tensor(expected)
    assert difference.abs().max() <= 2.01 / 255  # each of the two steps may round either way


def test_small_image_is_enlarged():
    assert center_crop(picture(7, (10, 7)), 32).size == (32, 32)


@pytest.mark.parametrize("format", ["webp", "png"])
def test_lossless_formats(format):
    image = picture(8, (64, 64))
    stored = Image.open(io.BytesIO(encode_file(image, format)))
    assert stored.format == format.upper()
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(image))


def test_jpeg_is_near():
    image = picture(8, (64, 64))
    near = Image.open(io.BytesIO(encode_file(image, "jpeg")))
    assert near.format == "JPEG"
    assert (to_tensor(near) - to_tensor(image)).abs().mean() < 0.01


def test_tensor_layout():
    image = Image.new("RGB", (3, 2), (255, 51, 0))
    torch.testing.assert_close(to_tensor(image)[:, 1, 2], torch.tensor([1.0, 0.2, 0.0]))
    assert to_tensor(image).shape == (3, 2, 3)
