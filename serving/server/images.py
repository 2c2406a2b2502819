"""Sizes of encoded images, read from their headers before anything decodes them.

A few kilobytes of PNG or JPEG can claim gigapixels, and the graph allocates what they claim.
Specifications: PNG (ISO/IEC 15948) 11.2.1, JPEG (ITU-T T.81) B.1.1.4 and B.2.2, GIF89a 18, BMP's
BITMAPINFOHEADER; these are the formats that tf.io.decode_image takes.
"""

from __future__ import annotations

import struct

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
