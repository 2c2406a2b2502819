"""Images that clients send encoded: counted from their headers before anything decodes them.

A few kilobytes of PNG or JPEG can claim gigapixels, and the graph allocates what they claim.
Specifications: PNG (ISO/IEC 15948) 11.2.1, JPEG (ITU-T T.81) B.1.1.4 and B.2.2, GIF89a 18 to 26,
BMP's BITMAPINFOHEADER, WebP (RFC 9649 2.5 to 2.7); these are the formats that tf.io.decode_image
takes, the last one in newer releases of TensorFlow.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dataset.images import (
    END_OF_IMAGE,
    MAX_SCANS,
    START_OF_SCAN,
    Resize,
    UnreadableImage,
    count_scans,
    decode,
    jpeg_markers,
    resize,
)
from serving.encoding import png
from serving.server.errors import deadline_exceeded, invalid_argument, resource_exhausted

# Start-of-frame markers; C4, C8 and CC in between are tables.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Decoded at once, whatever else is being decoded: some milliseconds and a megabyte each.
_SMALL_PIXELS = 250_000


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
    pixels = 0
    for marker, position in jpeg_markers(content):
        if marker in (START_OF_SCAN, END_OF_IMAGE):
            break
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", content, position + 3)
            pixels = max(pixels, width * height)
    return pixels


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


class ImageReader:
    """Bounds what images take while they are decoded: 15 bytes a pixel, as integers and floats.

    Several images of the largest size may be in work or wait for it, whatever number of requests
    they came with.
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
        # Half of the cores stay free for the model.
        self._turn = threading.Semaphore(max(1, len(os.sched_getaffinity(0)) // 2))

    @contextlib.contextmanager
    def admit(self, name: str, contents: Sequence[bytes]) -> Iterator[None]:
        """Lets the images of an input be decoded by the graph, all at a time, for the block.

        Args:
          name: Of the input, for messages.
          contents: Strings; those that are no images have no pixels.

        Raises:
          RequestError: INVALID_ARGUMENT, they take more than any request may; RESOURCE_EXHAUSTED,
            with those of other requests.
        """
        total = 0
        for index, content in enumerate(contents):
            pixels, scans = count_pixels(content), count_scans(content)
            if pixels > self._image_pixels:
                raise invalid_argument(
                    f"input {name!r}: image {index} has {pixels} pixels, more than the "
                    f"{self._image_pixels} that this server decodes (--max_image_pixels)"
                )
            if scans > MAX_SCANS:
                raise invalid_argument(
                    f"input {name!r}: image {index} is a JPEG of {scans} scans, more than "
                    f"{MAX_SCANS}"
                )
            total += pixels
        if total > self._limit:
            raise invalid_argument(
                f"input {name!r}: the images have {total} pixels together, more than the "
                f"{self._limit} that this server decodes for a request ({self._IMAGES} times "
                "--max_image_pixels): send fewer in a request"
            )
        with self._take(total):
            yield

    def read(
        self,
        name: str,
        contents: Sequence[bytes],
        size: tuple[int, int],
        how: Resize,
        remaining: Callable[[], float],
    ) -> list[bytes]:
        """Decodes images, one at a time, and resizes them as training did.

        Args:
          name: Of the input, for messages.
          contents: Image files.
          size: Height and width of the images that the model takes.
          how: See `dataset.images.resize`.
          remaining: Seconds until nobody waits for the answer any more; asked before each image.

        Returns:
          PNGs of that size.

        Raises:
          RequestError: INVALID_ARGUMENT, one is no image or too large; RESOURCE_EXHAUSTED, too many
            are being decoded; DEADLINE_EXCEEDED or what `remaining` raises.
        """
        counts = [min(count_pixels(content), self._image_pixels) for content in contents]
        with self._take(max(counts, default=0)):
            decoded = (
                self._decode(f"{name!r}: image {index}", content, pixels, remaining())
                for index, (content, pixels) in enumerate(zip(contents, counts))
            )
            return [png(resize(image, size, how)) for image in decoded]

    def _decode(self, name: str, content: bytes, pixels: int, seconds: float) -> np.ndarray:
        is_small = pixels <= _SMALL_PIXELS
        timeout = min(max(seconds, 0.0), threading.TIMEOUT_MAX)
        if seconds <= 0 or not (is_small or self._turn.acquire(timeout=timeout)):
            raise deadline_exceeded("the deadline passed before all images were decoded")
        try:
            return decode(content, self._image_pixels)
        except UnreadableImage as error:
            raise invalid_argument(f"input {name} is {error.reason}") from None
        finally:
            if not is_small:
                self._turn.release()

    @contextlib.contextmanager
    def _take(self, pixels: int) -> Iterator[None]:
        if pixels <= _SMALL_PIXELS:
            yield
            return
        with self._lock:
            if self._taken + pixels > self._limit:
                raise resource_exhausted(
                    f"images of {self._taken} pixels are being decoded, {pixels} more would exceed "
                    f"{self._limit}: try again later, or send fewer or smaller images at a time"
                )
            self._taken += pixels
        try:
            yield
        finally:
            with self._lock:
                self._taken -= pixels
