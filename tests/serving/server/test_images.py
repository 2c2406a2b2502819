"""Pixels of encoded images, counted from their headers."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from serving.server.images import count_pixels


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "WEBP lossless", "GIF 3"])
def test_pixels_are_counted_in_each_format(kind: str):
    frames = [Image.new("RGB", (37, 21), (shade, 0, 0)) for shade in (0, 90, 180)]
    kind, _, option = kind.partition(" ")
    options: dict[str, Any] = {
        "": {},
        "lossless": {"lossless": True},
        "3": {"save_all": True, "append_images": frames[1:]},
    }[option]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, **options)
    content = buffer.getvalue()
    assert count_pixels(content) == 37 * 21 * (3 if option == "3" else 1)
    # Cut off anywhere, those of the frames whose headers are there.
    counts = [count_pixels(content[:end]) for end in range(len(content) + 1)]
    assert counts == sorted(counts)
    frames_seen = range(4) if option == "3" else range(2)
    assert set(counts) == {37 * 21 * seen for seen in frames_seen}
