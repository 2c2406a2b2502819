"""Sizes of encoded images, read from their headers before anything decodes them.

A few kilobytes of PNG or JPEG can claim gigapixels, and the graph allocates what they claim.
Specifications: PNG (ISO/IEC 15948) 11.2.1, JPEG (ITU-T T.81) B.1.1.4 and B.2.2, GIF89a 18 to 26,
BMP's BITMAPINFOHEADER, WebP (RFC 9649 2.5 to 2.7); these are the formats that tf.io.decode_image
takes, the last one in newer releases of TensorFlow.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterable, Iterator

from serving.server.errors import invalid_argument, resource_exhausted

# Start-of-frame markers; C4, C8 and CC in between are tables.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# Markers without a length after them.
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD9)))


def count_pixels(content: bytes) -> int:
    """Tells how many pixels an encoded image claims to have.

    Args:
      content: Any bytes.

    Returns:
      Width times height of a PNG, JPEG, GIF (of all its frames together), BMP or WebP; 0 for
      anything else, among it images that are too damaged to say.
    """
    try:
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height = struct.unpack_from(">II", content, 16)
        elif content.startswith(b"\xff\xd8"):
            return _count_jpeg(content)
        elif content.startswith(b"GIF8"):
            return _count_gif(content)
        elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            width, height = _webp_size(content)
        elif content.startswith(b"BM"):
            width, height = struct.unpack_from("<ii", content, 18)
        else:
            return 0
    except struct.error:
        return 0
    return abs(width * height)


def _count_jpeg(content: bytes) -> int:
    """The largest frame that is announced before the first scan."""
    position, pixels = 2, 0
    while True:
        # Markers may be preceded by any number of FF, and by garbage, which libjpeg skips.
        position = content.find(b"\xff", position)
        while 0 <= position < len(content) and content[position] == 0xFF:
            position += 1
        if not 0 < position < len(content):
            return pixels
        marker = content[position]
        position += 1
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            return pixels
        if marker == 0 or marker in _STANDALONE:
            continue
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", content, position + 3)
            pixels = max(pixels, width * height)
        (length,) = struct.unpack_from(">H", content, position)
        position += max(length, 2)


def _count_gif(content: bytes) -> int:
    """All frames: they are unpacked one and all, whatever size the first or the screen has."""
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    screen, frames = width * height, 0
    position = 13 + _table_bytes(flags)
    while (introducer := content[position : position + 1]) in (b",", b"!"):
        if introducer == b",":
            if position + 10 > len(content):
                break
            width, height, flags = struct.unpack_from("<HHB", content, position + 5)
            frames += width * height
            position += 11 + _table_bytes(flags)
        else:
            position += 2
        while position < len(content) and content[position]:  # Blocks of so many bytes
            position += 1 + content[position]
        position += 1
    return max(screen, frames)


def _table_bytes(flags: int) -> int:
    """Bytes of the color table that a GIF's flags announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _webp_size(content: bytes) -> tuple[int, int]:
    kind = content[12:16]
    if kind == b"VP8X":
        low, middle, high = struct.unpack_from("<HHH", content, 24)
        return 1 + low + ((middle & 0xFF) << 16), 1 + (middle >> 8) + (high << 8)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", content, 26)
    return width & 0x3FFF, height & 0x3FFF


class PixelBudget:
    """Bounds what images take while they are decoded: 15 bytes a pixel, as integers and floats.

    Several images of the largest size may be in work, whatever number of requests they came with.
    """

    _IMAGES = 4

    def __init__(self, image_pixels: int):
        """Sets up.

        Args:
          image_pixels: What one image may have.
        """
        self._image_pixels = image_pixels
        self._limit = self._IMAGES * image_pixels
        self._taken = 0
        self._lock = threading.Lock()

    def count(self, name: str, contents: Iterable[bytes]) -> int:
        """Adds up the pixels of an input's images; strings that are none have none.

        Raises:
          RequestError: INVALID_ARGUMENT, one of them has too many.
        """
        total = 0
        for index, content in enumerate(contents):
            pixels = count_pixels(content)
            if pixels > self._image_pixels:
                raise invalid_argument(
                    f"input {name!r}: image {index} has {pixels} pixels, more than the "
                    f"{self._image_pixels} that this server decodes (--max_image_pixels)"
                )
            total += pixels
        return total

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Counts pixels as being decoded, for the block.

        Raises:
          RequestError: RESOURCE_EXHAUSTED, too many are.
        """
        if not pixels:
            yield
            return
        with self._lock:
            if self._taken + pixels > self._limit:
                raise resource_exhausted(
                    f"images of {self._taken} pixels are being decoded, {pixels} more would exceed "
                    f"{self._limit}: send fewer or smaller images at a time"
                )
            self._taken += pixels
        try:
            yield
        finally:
            with self._lock:
                self._taken -= pixels
