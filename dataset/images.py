"""Image files to pixels: what ingest, the clients and the embedded server have in common.

Formats are told by the contents, whatever a file's name claims: PNG, JPEG, GIF, BMP and WebP, of
animations and MPO files the first frame, and HEIC where pillow-heif is installed.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import warnings
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WebP")
# Of files in a folder that are taken for images, to be read or to be named as unreadable.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp"),
    *(".heic", ".heif", ".avif", ".tif", ".tiff"),
)
MAX_PIXELS = 128_000_000  # Some 1.5 GB while one is decoded
MAX_SCANS = 64  # libjpeg's own progressive images have ten; each costs time for all the pixels
_MAX_RUN_LENGTH_PIXELS = 1_000_000  # PIL decodes such BMP files in Python

Resize = Literal["crop", "stretch", "pad"]
RESIZES: tuple[Resize, ...] = get_args(Resize)
RESIZE: Resize = "crop"

# Pixels are counted here, by whatever bound the caller has.
Image.MAX_IMAGE_PIXELS = None
# About metadata that are damaged; the pixels are none the worse.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")

_ORIENTATION = 0x0112  # EXIF's tag
# Where a file has which bytes, and what it is then.
_SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8", "JPEG"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WebP"),
    (0, b"BM", "BMP"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftyp", "MP4"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%PDF-", "PDF"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"PK\3\4", "ZIP"),
)
# A marker in a JPEG, but for those that are part of a scan's data: FF 00 and the restart markers.
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
_STANDALONE = frozenset((0x01, 0xD8, END_OF_IMAGE))
# What would be taken for image data where some are missing, before a restart and after any.
_NOISE = np.random.default_rng(0).integers(0, 0xFF, (17, 64), np.uint8)  # Without FF
_FILLER = _NOISE[0].tobytes() + b"".join(
    b"\xff%c" % (0xD0 + n % 8) + noise.tobytes() for n, noise in enumerate(_NOISE[1:])
)


class UnreadableImage(ValueError):
    """Bytes of which no picture can be made.

    Attributes:
      reason: What they are instead, to be put after "is": `empty`, `a truncated JPEG`.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode(content: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image file to the picture that a viewer shows.

    It is turned upright by its EXIF orientation; 16 bits a channel are divided by 256; palettes,
    grey and CMYK become RGB; what is transparent is composited on white.

    Args:
      content: The file's bytes.
      max_pixels: More than these are not decoded.

    Returns:
      uint8 [H, W, 3], RGB.

    Raises:
      UnreadableImage: It is none, or would take too much memory or time.
    """
    image = _open(content, max_pixels)
    try:
        return _upright(_to_rgb(image), _orientation(image))
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise whatever damaged files lead them to
        reason = _reason(content, error)
        if image.format != "JPEG" or END_OF_IMAGE in (m for m, _ in jpeg_markers(content)):
            raise UnreadableImage(reason) from error
        return _decode_without_end(content.rstrip(b"\xff"), reason)


def size(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Reads the size of the picture that `decode` returns, without decoding it.

    Returns:
      (H, W).

    Raises:
      UnreadableImage: See `decode`; damage beyond the header is not noticed.
    """
    image = _open(content, max_pixels)
    width, height = image.size
    return (width, height) if _orientation(image) >= 5 else (height, width)


def resize(image: np.ndarray, size: tuple[int, int], how: Resize = RESIZE) -> np.ndarray:
    """Resizes a picture with an antialiased bilinear filter; one of that size stays as it is.

    Args:
      image: uint8 [H, W, 3].
      size: Height and width of the result.
      how: `crop` keeps the aspect ratio and the middle of the picture, `stretch` all of the
        picture, `pad` both, with black on two sides.

    Returns:
      uint8 [*size, 3].
    """
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    inner, box = _geometry((height, width), size, how)
    resized = np.asarray(Image.fromarray(image).resize(inner[::-1], Image.Resampling.BILINEAR, box))
    if inner == size:
        return resized
    padded = np.zeros((*size, 3), np.uint8)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    padded[top : top + inner[0], left : left + inner[1]] = resized
    return padded


def _geometry(
    old: tuple[int, int], new: tuple[int, int], how: Resize
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """Size of the resized part, and left, top, right, bottom of what it is made from."""
    (height, width), (rows, columns) = old, new
    whole = (0.0, 0.0, float(width), float(height))
    if how == "stretch":
        return new, whole
    if how == "pad":
        scale = min(rows / height, columns / width)
        return (max(1, round(height * scale)), max(1, round(width * scale))), whole
    scale = max(rows / height, columns / width)
    left, top = (width - columns / scale) / 2, (height - rows / scale) / 2
    # Rounding must not lead beyond the edges.
    left, top = max(left, 0.0), max(top, 0.0)
    return new, (left, top, width - left, height - top)


def jpeg_markers(content: bytes) -> Iterator[tuple[int, int]]:
    """Walks through a JPEG (ITU-T T.81, B.1.1) up to the end of the image.

    Yields:
      Each marker but restarts, and where what follows it begins.
    """
    position = 2
    while match := _MARKER.search(content, position):
        marker, position = match[1][0], match.end()
        yield marker, position
        if marker == END_OF_IMAGE:
            return
        if marker not in _STANDALONE:
            if position + 2 > len(content):
                return
            position += max(2, struct.unpack_from(">H", content, position)[0])


def count_scans(content: bytes) -> int:
    """Counts the scans of a JPEG, each of which takes time for all the pixels; of others: 0."""
    if not content.startswith(b"\xff\xd8"):
        return 0
    # Most often there are few that only look like one, too, and nothing has to be walked through.
    count = content.count(b"\xff%c" % START_OF_SCAN)
    if count <= MAX_SCANS:
        return count
    return sum(marker == START_OF_SCAN for marker, _ in jpeg_markers(content))


def _open(content: bytes, max_pixels: int) -> Image.Image:
    """Reads the header and checks what decoding would take."""
    try:
        image = Image.open(io.BytesIO(content), formats=_pil_formats())
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImage(_reason(content, error)) from error
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise UnreadableImage(f"too large: {pixels} pixels, more than {max_pixels}")
    if not pixels:
        raise UnreadableImage("without pixels")
    if image.format in ("JPEG", "MPO"):
        scans = count_scans(content)
        if scans > MAX_SCANS:
            raise UnreadableImage(f"a JPEG of {scans} scans, more than {MAX_SCANS}")
    is_run_length = image.format == "BMP" and image.info.get("compression") in (1, 2)
    if is_run_length and pixels > _MAX_RUN_LENGTH_PIXELS:
        raise UnreadableImage(
            f"a run-length encoded BMP of {pixels} pixels, more than {_MAX_RUN_LENGTH_PIXELS}"
        )
    return image


@functools.cache
def _pil_formats() -> tuple[str, ...]:
    formats = tuple(name.upper() for name in FORMATS)
    try:
        import pillow_heif
    except ImportError:
        return formats
    pillow_heif.register_heif_opener()
    return (*formats, "HEIF")


def _to_rgb(image: Image.Image) -> np.ndarray:
    image.load()
    if image.mode.startswith("I"):  # 16 bits of grey
        grey = (np.asarray(image).astype(np.int32) // 256).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """EXIF's: 1 upright, from 5 on lying on a side."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Whatever damaged metadata lead PIL to: they are not the picture
        return 1
    return value if value in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _decode_without_end(content: bytes, reason: str) -> np.ndarray:
    """Decodes a JPEG that lacks its end marker, if that is all that it lacks.

    Where nothing else is missing, further data are skipped, whatever they are; else they would be
    taken for the missing part of the picture.
    """
    end = b"\xff%c" % END_OF_IMAGE
    try:
        decoded = [
            (_to_rgb(image), _orientation(image))
            for filler in (b"", _FILLER)
            for image in [Image.open(io.BytesIO(content + filler + end), formats=("JPEG",))]
        ]
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImage(reason) from error
    (pixels, orientation), (filled, _) = decoded
    if not np.array_equal(pixels, filled):
        raise UnreadableImage(reason)
    return _upright(pixels, orientation)


def _reason(content: bytes, error: Exception) -> str:
    """Tells what bytes are that PIL cannot read."""
    if not content:
        return "empty"
    name = next((n for at, magic, n in _SIGNATURES if content.startswith(magic, at)), None)
    if name in (None, "BMP") and _is_text(content[:4096]):
        name = "SVG" if b"<svg" in content[:4096] else "text"
    if name == "text":
        return name
    if name is None:
        return f"none of {', '.join(FORMATS)}"
    if name not in FORMATS and not (name == "HEIC" and "HEIF" in _pil_formats()):
        return f"{name}, which is not read ({', '.join(FORMATS)} are)"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"a damaged or truncated {name}"
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return f"a truncated {name}"
    return f"a damaged {name}"


def _is_text(content: bytes) -> bool:
    # The end may be in the middle of a character.
    text = content.decode("utf-8", "replace").rstrip("\ufffd")
    return "\ufffd" not in text and all(c.isprintable() or c.isspace() for c in text) and bool(text)
