"""The graph of serving_bytes reads files to the pixels that dataset.images reads."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from dataset import images
from trainer.images import decode_image


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (7, 5, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def graph(size: tuple[int, int], how: images.Resize = "crop") -> Callable[[bytes], np.ndarray]:
    @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
    def decode(content: tf.Tensor) -> tf.Tensor:
        return decode_image(content, size, how)

    return lambda content: decode(tf.constant(content)).numpy()


@pytest.fixture(scope="module")
def upright() -> Callable[[bytes], np.ndarray]:
    return graph((40, 30))


@pytest.fixture(scope="module")
def lying() -> Callable[[bytes], np.ndarray]:
    return graph((30, 40))


TRANSPARENT = picture(40, 30).copy()
TRANSPARENT.putalpha(Image.linear_gradient("L").resize((30, 40)))
EXACT = {
    "png": encode(picture(40, 30)),
    "palette": encode(picture(40, 30).quantize(64)),
    "small palette": encode(picture(40, 30).quantize(13)),
    "two colors": encode(picture(40, 30).quantize(2)),
    "black and white": encode(picture(40, 30).convert("1")),
    "small transparent palette": encode(picture(40, 30).quantize(13), transparency=4),
    "grey": encode(picture(40, 30).convert("L")),
    "16 bits": encode(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(40, 30) * 50)),
    "transparent": encode(TRANSPARENT),
    "grey and transparent": encode(TRANSPARENT.convert("LA")),
    "jpeg": encode(picture(40, 30), "JPEG"),
    "progressive": encode(picture(40, 30), "JPEG", progressive=True),
    "grey jpeg": encode(picture(40, 30).convert("L"), "JPEG"),
    "gif": encode(picture(40, 30), "GIF", save_all=True, append_images=[picture(40, 30, 1)]),
    "bmp": encode(picture(40, 30), "BMP"),
}


@pytest.mark.parametrize("kind", EXACT)
def test_pixels_are_the_same(upright: Callable, kind: str):
    np.testing.assert_array_equal(upright(EXACT[kind]), images.decode(EXACT[kind]))


def test_cmyk_is_nearly_the_same(upright: Callable):
    content = encode(picture(40, 30).convert("CMYK"), "JPEG")
    assert np.abs(upright(content).astype(int) - images.decode(content)).max() <= 2


def exif(orientation: int, order: str = "<", before: int = 0, offset: int = 8) -> bytes:
    """An EXIF block with other tags around the orientation."""
    other = b"".join(struct.pack(order + "HHI4x", 0x100 + n, 4, 1) for n in range(before))
    tag = struct.pack(order + "HHIH2x", 0x112, 3, 1, orientation)
    mark = {"<": b"II", ">": b"MM"}[order]
    head = mark + struct.pack(order + "HI", 42, offset) + bytes(offset - 8)
    return b"Exif\0\0" + head + struct.pack(order + "H", before + 1) + other + tag + bytes(4)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize(("order", "before", "offset"), [("<", 0, 8), (">", 0, 8), (">", 9, 80)])
def test_photographs_are_turned_upright(
    upright: Callable, lying: Callable, orientation: int, order: str, before: int, offset: int
):
    stored = picture(30, 40)
    block = exif(orientation, order, before, offset)
    content = encode(stored, "JPEG", exif=block, icc_profile=b"icc" * 9, comment=b"first")
    expected = images.decode(content)
    is_turned = orientation in (5, 6, 7, 8)
    assert expected.shape == ((40, 30, 3) if is_turned else (30, 40, 3))
    decode = upright if is_turned else lying
    np.testing.assert_array_equal(decode(content), expected)


def test_metadata_before_it_are_passed_over(upright: Callable):
    content = encode(picture(30, 40), "JPEG", exif=exif(6))
    segments = b"\xff\xe3\0\x08other\0" + b"\xff\xe2\xff\xff" + bytes(65533) + b"\xff\xfe\0\x04ab"
    content = content[:2] + segments + content[2:]
    np.testing.assert_array_equal(upright(content), images.decode(content))


def test_damaged_metadata_are_upright(lying: Callable):
    whole = exif(6, before=3)
    expected = images.decode(encode(picture(30, 40), "JPEG"))
    cut = [whole[:end] for end in range(6, len(whole) - 8)]
    far = whole[:10] + b"\xff\xff\xff\xff" + whole[14:]
    many = whole[:14] + b"\xff\xff" + b"\1" * (len(whole) - 16)
    for block in (*cut, far, many, b"Exif\0\0" + b"\xff" * 200, b"http://ns.adobe.com/xap/1.0/\0"):
        content = encode(picture(30, 40), "JPEG", exif=block)
        np.testing.assert_array_equal(lying(content), expected)


def test_hardly_more_than_a_header_is_an_error_of_its_own(upright: Callable):
    for content in (b"", b"\xff\xd8", b"\xff\xd8\xff\xe1", b"\x89PNG", b"text", b"\xff" * 100):
        with pytest.raises(tf.errors.InvalidArgumentError):
            upright(content)


SHAPES = [(1, 1), (48, 32), (32, 48), (20, 48), (100, 75), (480, 640), (1, 900), (900, 7)]


@pytest.mark.parametrize("how", images.RESIZES)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_resizing_differs_by_one_grey_level_at_most(size: tuple[int, int], how: images.Resize):
    decode = graph(size, how)
    for shape in (*SHAPES, size):
        noise = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
        resized = images.resize(noise, size, how)
        difference = np.abs(decode(encode(Image.fromarray(noise))).astype(int) - resized)
        assert difference.max() <= (0 if shape == size else 1)
        assert difference.mean() < 0.35
