"""Images as the inputs of a model's signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.images import decode
from serving.protos import example_pb2

IMAGES, BYTES, EXAMPLES = "serving_default", "serving_bytes", "serving_examples"
# The one input of each signature.
INPUTS = {IMAGES: "images", BYTES: "image_bytes", EXAMPLES: "examples"}
IMAGE_SIZE = (32, 32)  # rows, columns


def encode(contents: Sequence[bytes], signature: str) -> Any:
    """Makes a signature's input from encoded images.

    Args:
      contents: PNG or JPEG files.
      signature: One of `INPUTS`.

    Returns:
      uint8 [N, 32, 32, 3] or a list of bytes.

    Raises:
      ValueError: One has to be decoded here and is not an image.
    """
    if signature == BYTES:
        return list(contents)
    pixels = [decode(content, IMAGE_SIZE) for content in contents]
    if signature == IMAGES:
        return np.stack(pixels)
    return [example(image.tobytes()) for image in pixels]


def example(image: bytes) -> bytes:
    """Serializes a tf.Example with the feature `image`: 3,072 bytes, row-major RGB."""
    message = example_pb2.Example()
    message.features.feature["image"].bytes_list.value.append(image)
    return bytes(message.SerializeToString())
