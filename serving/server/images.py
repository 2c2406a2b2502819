"""Sizes of encoded images, read from their headers before anything decodes them.

A few kilobytes of PNG or JPEG can claim gigapixels, and the graph allocates what they claim.
Specifications: PNG (ISO/IEC 15948) 11.2.1, JPEG (ITU-T T.81) B.1.1.4 and B.2.2, GIF89a 18, BMP's
BITMAPINFOHEADER; these are the formats that tf.io.decode_image takes.
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
      Width times height of a PNG, JPEG, GIF or BMP; 0 for anything else, among it images that are
      too damaged to say.
    """
    try:
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height = struct.unpack_from(">II", content, 16)
        elif content.startswith(b"\xff\xd8"):
            return _count_jpeg(content)
        elif content.startswith(b"GIF8"):
            width, height = struct.unpack_from("<HH", content, 6)
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
