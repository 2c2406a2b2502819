"""Image files in the forms that people bring, and files that are none."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset import images
from dataset.images import UnreadableImage, decode, jpeg_markers, resize, size

HEIGHT, WIDTH = 96, 64


def picture() -> np.ndarray:
    """Sky above, grass below, a mast left of the middle: no turn or flip of it is the same."""
    rows = np.linspace(0, 1, HEIGHT)[:, None, None]
    pixels = (1 - rows) * np.array([90, 150, 230]) + rows * np.array([40, 140, 30])
    pixels = np.repeat(pixels, WIDTH, axis=1)
    pixels[10:80, 20:26] = [200, 30, 30]
    return pixels.round().astype(np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int, kind: str = "JPEG", **options: Any) -> bytes:
    """The picture as a camera stores it that was held so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture()
    if orientation in (3, 4, 7, 8):
        stored = stored[::-1]
    if orientation in (2, 3, 6, 7):
        stored = stored[:, ::-1]
    if orientation >= 5:
        stored = stored.swapaxes(0, 1)
    return encode(np.ascontiguousarray(stored), kind, exif=exif, **options)


def grey(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("L"))


def difference(content: bytes, expected: np.ndarray) -> float:
    """Mean of the differences in grey levels."""
    decoded = decode(content)
    assert decoded.dtype == np.uint8 and decoded.shape == expected.shape
    assert decoded.flags.c_contiguous
    assert size(content) == expected.shape[:2]
    return float(np.abs(decoded.astype(int) - expected).mean())


IMAGE = Image.fromarray(picture())
FRAMES = [Image.new("RGB", IMAGE.size, "red")]
# Each of them is the picture, within so many grey levels on average.
FORMS = {
    "png": (encode(IMAGE), 0),
    "interlaced png": (encode(IMAGE, interlace=1), 0),
    "bmp": (encode(IMAGE, "BMP"), 0),
    "lossless webp": (encode(IMAGE, "WEBP", lossless=True), 0),
    "animated webp": (
        encode(IMAGE, "WEBP", lossless=True, save_all=True, append_images=FRAMES),
        0,
    ),
    "opaque alpha": (encode(IMAGE.convert("RGBA")), 0),
    "jpeg": (encode(IMAGE, "JPEG"), 4),
    "progressive": (encode(IMAGE, "JPEG", progressive=True), 4),
    "cmyk": (encode(IMAGE.convert("CMYK"), "JPEG"), 4),
    "mpo": (encode(IMAGE, "MPO", save_all=True, append_images=FRAMES), 4),
    "webp": (encode(IMAGE, "WEBP"), 4),
    "gif": (encode(IMAGE, "GIF"), 8),
    "animated gif": (encode(IMAGE, "GIF", save_all=True, append_images=FRAMES), 8),
    "palette": (encode(IMAGE.quantize(128)), 4),
    "no end marker": (encode(IMAGE, "JPEG")[:-2], 4),
    "extraneous bytes": (encode(IMAGE, "JPEG") + bytes(range(256)) * 9, 4),
    "progressive without end marker": (encode(IMAGE, "JPEG", progressive=True)[:-2], 4),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_picture(form: str):
    content, tolerance = FORMS[form]
    assert difference(content, picture()) <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int):
    assert difference(turned(orientation), picture()) < 4
    assert difference(turned(orientation)[:-2], picture()) < 4
    assert difference(turned(orientation, "PNG"), picture()) == 0
    assert difference(turned(orientation, "WEBP", lossless=True), picture()) == 0


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM" * 9])
def test_damaged_metadata_are_not_the_picture(exif: bytes):
    assert difference(encode(IMAGE, "JPEG", exif=exif), picture()) < 4


def test_unknown_orientations_are_upright():
    exif = Image.Exif()
    for value in (0, 9, 65535):
        exif[0x0112] = value
        assert difference(encode(IMAGE, exif=exif), picture()) == 0


def test_grey_and_16_bits():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    expected = np.repeat(levels.astype(np.uint8)[..., None], 3, axis=2)
    assert difference(encode(levels.astype(np.uint8)), expected) == 0
    assert difference(encode(levels * 256 + 255), expected) == 0
    bits = Image.fromarray((levels % 2 * 255).astype(np.uint8)).convert("1")
    assert set(decode(encode(bits)).ravel().tolist()) == {0, 255}
    # PIL does not write 16 bits of colour.
    row = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0xFFFF, 0, 0x00FF)
    assert decode(png(2, 1, zlib.compress(row), bits=16)).tolist() == [
        [[0x12, 0x56, 0x9A], [0xFF, 0, 0]]
    ]


def test_transparency_is_composited_on_white():
    alpha = np.full((HEIGHT, WIDTH, 1), 128, np.uint8)
    expected = np.round((picture() * 128.0 + 255 * 127.0) / 255)
    rgba = np.concatenate([picture(), alpha], axis=2)
    assert difference(encode(rgba), expected) < 1
    assert difference(encode(rgba, "WEBP", lossless=True), expected) < 1
    grey_alpha = Image.fromarray(np.dstack([picture()[..., 0], alpha[..., 0]]), "LA")
    assert difference(encode(grey_alpha), np.repeat(expected[..., :1], 3, axis=2)) < 1
    # A palette's entry, and a colour, can be the transparent one.
    flat = Image.new("P", (4, 4), 3)
    flat.putpalette([7] * 768)
    assert difference(encode(flat, transparency=3), np.full((4, 4, 3), 255)) == 0
    assert difference(encode(flat, "GIF", transparency=3), np.full((4, 4, 3), 255)) == 0
    assert difference(encode(flat, transparency=4), np.full((4, 4, 3), 7)) == 0
    blue = Image.new("RGB", (4, 4), "blue")
    assert difference(encode(blue, transparency=(0, 0, 255)), np.full((4, 4, 3), 255)) == 0


def png(width: int, height: int, data: bytes, bits: int = 8) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


READ = "PNG, JPEG, GIF, BMP, WebP"
CASES = {
    "empty": (b"", "empty"),
    "text": (b"not an image\n", "text"),
    "text in utf-8": ("BMüller, Käse".encode()[:12], "text"),
    "web page": (b"<!DOCTYPE html><html>", "text"),
    "svg": (b'<?xml version="1.0"?><svg/>', f"SVG, which is not read ({READ} are)"),
    "noise": (b"\xff\xfe\0\x01", f"none of {READ}"),
    "tiff": (encode(IMAGE, "TIFF"), f"TIFF, which is not read ({READ} are)"),
    "avif": (b"\0\0\0\x1cftypavif" + bytes(40), f"AVIF, which is not read ({READ} are)"),
    "jpeg 2000": (b"\0\0\0\x0cjP  \r\n" + bytes(9), f"JPEG 2000, which is not read ({READ} are)"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", f"PDF, which is not read ({READ} are)"),
    "half a png": (encode(IMAGE)[:200], "a truncated PNG"),
    "half a jpeg": (encode(IMAGE, "JPEG")[:1000], "a truncated JPEG"),
    "half a gif": (encode(IMAGE, "GIF")[:1500], "a truncated GIF"),
    "half a bmp": (encode(IMAGE, "BMP")[:1000], "a truncated BMP"),
    "half a webp": (encode(IMAGE, "WEBP")[:150], "a damaged WebP"),
    "signature of png": (b"\x89PNG\r\n\x1a\n cut short", "a damaged or truncated PNG"),
    "signature of jpeg": (b"\xff\xd8\xff", "a damaged or truncated JPEG"),
    "flipped bits": (
        encode(IMAGE)[:60] + bytes(20) + encode(IMAGE)[80:],
        "a damaged PNG",
    ),
    "png bomb": (
        png(30_000, 30_000, zlib.compress(bytes(1000))),
        "too large: 900000000 pixels, more than 128000000",
    ),
    "no pixels": (png(0, 4, b""), "a damaged or truncated PNG"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_picture_is_named(case: str):
    content, reason = CASES[case]
    with pytest.raises(UnreadableImage) as caught:
        decode(content)
    assert caught.value.reason == reason


def test_heic_is_named_where_it_is_not_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._pil_formats.cache_clear()
    for brand in (b"heic", b"heix", b"mif1"):
        with pytest.raises(UnreadableImage, match="HEIC, which is not read"):
            decode(b"\0\0\0\x18ftyp" + brand + bytes(40))
    monkeypatch.undo()
    images._pil_formats.cache_clear()


def test_a_bound_of_pixels():
    for content in (encode(IMAGE), encode(IMAGE, "JPEG"), encode(IMAGE, "GIF")):
        assert decode(content, HEIGHT * WIDTH).shape == (HEIGHT, WIDTH, 3)
        for function in (decode, size):
            with pytest.raises(UnreadableImage, match="too large: 6144 pixels, more than 6143"):
                function(content, HEIGHT * WIDTH - 1)


def empty_scans(content: bytes, count: int) -> bytes:
    """Adds scans that refine nothing to a progressive JPEG."""
    scan = bytes.fromhex("ffda 0008 01 01 00 01 3f 00") + b"\x7f" * 3
    return content[:-2] + scan * count + content[-2:]


def test_scans_are_bounded():
    content = encode(IMAGE, "JPEG", progressive=True)
    scans = [marker for marker, _ in jpeg_markers(content)].count(0xDA)
    assert scans == 10
    assert difference(empty_scans(content, images.MAX_SCANS - 10), picture()) < 8
    with pytest.raises(UnreadableImage, match="a JPEG of 65 scans, more than 64"):
        decode(empty_scans(content, images.MAX_SCANS - 9))
    # What only looks like scans is none: in the metadata, and behind the end.
    looks = b"\xff\xda\0\x08" * 100
    assert difference(encode(IMAGE, "JPEG", comment=looks) + looks, picture()) < 4


def test_large_run_length_encoded_bmps_are_refused():
    def bmp(width: int, height: int) -> bytes:
        palette = bytes(range(4)) * 256
        rows = (struct.pack("BB", 255, 1) * (width // 255) + b"\0\0") * height + b"\0\1"
        header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
        begin = 14 + len(header) + len(palette)
        return (
            b"BM" + struct.pack("<IHHI", begin + len(rows), 0, 0, begin) + header + palette + rows
        )

    assert decode(bmp(510, 8)).shape == (8, 510, 3)
    with pytest.raises(UnreadableImage, match="a run-length encoded BMP of 1020000 pixels"):
        decode(bmp(510, 2000))


def cut_files() -> Iterator[tuple[str, bytes]]:
    noise = np.random.default_rng(3).integers(0, 256, (12, 12, 3), np.uint8)
    image = Image.fromarray(noise).resize((96, 80), Image.Resampling.BICUBIC)
    yield "baseline", encode(image, "JPEG")
    yield "progressive", encode(image, "JPEG", progressive=True)
    yield "restarts", encode(image, "JPEG", restart_marker_blocks=3)


@pytest.mark.parametrize(("kind", "content"), cut_files(), ids=[kind for kind, _ in cut_files()])
def test_a_cut_is_noticed_wherever_it_is(kind: str, content: bytes):
    whole = decode(content)
    accepted = []
    for end in range(len(content)):
        try:
            decoded = decode(content[:end])
        except UnreadableImage:
            continue
        accepted.append(end)
        if kind != "progressive":  # Which may be cut between scans, and is less sharp then
            # The last blocks may have ended by chance.
            assert np.any(decoded != whole, axis=2).mean() < 0.05
    assert accepted[-2:] == [len(content) - 2, len(content) - 1]
    assert len(accepted) <= (50 if kind == "progressive" else 8)


def test_nothing_else_is_raised_for_damaged_files():
    generator = np.random.default_rng(7)
    contents = [content for content, _ in FORMS.values()]
    for number in range(1500):
        content = bytearray(contents[number % len(contents)])
        for position in generator.integers(0, len(content), 1 + number % 7):
            content[position] = generator.integers(256)
        for function in (decode, size):
            try:
                function(bytes(content[: generator.integers(1, 2 * len(content))]), 1_000_000)
            except UnreadableImage as error:
                assert error.reason


@pytest.mark.parametrize("how", images.RESIZES)
def test_a_picture_of_the_size_stays_as_it_is(how: images.Resize):
    np.testing.assert_array_equal(resize(picture(), (HEIGHT, WIDTH), how), picture())


def test_cropping_keeps_the_middle_and_the_aspect_ratio():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = np.arange(20)[:, None, None] * 10
    np.testing.assert_array_equal(resize(wide, (20, 20), "crop"), wide[:, 20:40])
    tall = wide.swapaxes(0, 1)
    np.testing.assert_array_equal(resize(tall, (20, 20)), tall[20:40])
    # Twice as large, and half as high as wide.
    flat = np.full((40, 40, 3), 9, np.uint8)
    flat[:10], flat[30:] = 200, 200
    assert resize(flat, (10, 20), "crop").max() <= 200
    np.testing.assert_array_equal(resize(flat, (10, 20), "crop")[1:-1], np.full((8, 20, 3), 9))


def test_stretching_keeps_everything_and_padding_adds_black():
    wide = np.full((20, 60, 3), 255, np.uint8)
    wide[:, :30] = 100
    stretched = resize(wide, (30, 30), "stretch")
    assert set(stretched[:, :13].ravel()) == {100} and set(stretched[:, 17:].ravel()) == {255}
    padded = resize(wide, (30, 30), "pad")
    assert padded.shape == (30, 30, 3)
    assert not padded[:10].any() and not padded[20:].any()
    assert set(padded[10:20, :13].ravel()) == {100} and set(padded[10:20, 17:].ravel()) == {255}


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (31, 33), (333, 127)])
@pytest.mark.parametrize("how", images.RESIZES)
def test_any_size_can_be_resized(shape: tuple[int, int], how: images.Resize):
    resized = resize(np.full((*shape, 3), 77, np.uint8), (32, 48), how)
    assert resized.shape == (32, 48, 3) and resized.dtype == np.uint8
    assert set(np.unique(resized)) <= {0, 77} and resized.max() == 77
    assert how == "pad" or resized.min() == 77
