"""What the model itself answers to some images, left with its export.

Whoever serves the export can find out whether it still gives the same answers: the pipeline's
ServingValidator does, before the model is pushed.
"""

from __future__ import annotations

import base64
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# In the export's assets.extra; components/serving_validator reads it.
KNOWN_ANSWERS_FILE = "known_answers.json"
_IMAGES = 32


def compute(
    network: keras.Model, images: np.ndarray, normalized: tf.data.Dataset
) -> dict[str, list[Any]]:
    """Asks the Keras model, on what it was validated with in training.

    Args:
      network: float32 [N, H, W, 3] normalized images -> logits [N, classes].
      images: object [N], the raw bytes of each.
      normalized: The same images as batches of `trainer.input.make_dataset`.

    Returns:
      The first 32 images in base64 as `images`, and for each the probabilities of all classes as
      `probabilities`.
    """
    batch = next(iter(normalized))[0][:_IMAGES]
    # A GPU's matrix products have 10 bits of mantissa by default; a server on a CPU has all 23.
    reduced = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        logits = network(batch, training=False)
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(reduced)
    probabilities = keras.ops.softmax(keras.ops.cast(logits, "float32"))
    return {
        "images": [base64.b64encode(image).decode() for image in images[: len(batch)]],
        "probabilities": keras.ops.convert_to_numpy(probabilities).tolist(),
    }
