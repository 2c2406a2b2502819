"""From the bytes of an image to what the model sees: where TensorFlow normalizes pixels.

`normalize` is the whole computation. `preprocessing_fn` wraps it for TensorFlow Transform, whose
graph is applied in training; the exported signatures, through which Evaluator and model servers
call the model, use the same function with the constants that the transform graph holds (see
`trainer/export.py`), so training and serving cannot drift apart.
"""

from __future__ import annotations

import tensorflow as tf
import tensorflow_transform as tft

from dataset.card import CHANNELS

# Features of the raw examples, as written by components/example_gen.
IMAGE_KEY = "image"  # uint8, row-major, RGB interleaved: of one size, which the data card has
LABEL_KEY = "label"  # int64, a position in the card's classes

# Transformed features: IMAGE_KEY float32 [N, H x W, 3], ragged because Transform refuses a dense
# tensor of unknown size; LABEL_KEY int64 [N]; and the two constants, repeated for each row because
# Transform's outputs have a batch dimension.
IMAGE_MEAN_KEY = "image_mean"
IMAGE_VARIANCE_KEY = "image_variance"

# Keras's Normalization layer guards its division by the same value.
_EPSILON = 1e-7
_LEVELS = 256  # of a channel of a pixel


def decode_images(raw: tf.Tensor, shape: tuple[int, int, int]) -> tf.Tensor:
    """Decodes raw image bytes.

    Args:
      raw: string [N].
      shape: Height, width and channels of each.

    Returns:
      uint8 [N, *shape].

    Raises:
      tf.errors.InvalidArgumentError: An image has another length (when it is computed).
    """
    # N rather than -1, with which images of twice the length would become twice as many.
    return tf.reshape(tf.io.decode_raw(raw, tf.uint8), [tf.size(raw), *shape])


def normalize(pixels: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
    """Shifts and scales every channel to zero mean and unit variance.

    Args:
      pixels: uint8 or float [..., 3] with values in 0..255.
      mean: float32 [3], per channel, in units of pixel values.
      variance: float32 [3], per channel, in squared pixel values.

    Returns:
      float32 [..., 3].
    """
    return (tf.cast(pixels, tf.float32) - mean) / tf.maximum(tf.sqrt(variance), _EPSILON)


def preprocessing_fn(inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """TensorFlow Transform's callback.

    Args:
      inputs: IMAGE_KEY string [N], LABEL_KEY int64 [N], further features are ignored.

    Returns:
      The transformed features named above.
    """
    raw = inputs[IMAGE_KEY]
    pixels = tf.reshape(tf.io.decode_raw(raw, tf.uint8), [tf.size(raw), -1, CHANNELS])
    mean, variance = _statistics(pixels)
    per_row = tf.stack([tf.size(raw), CHANNELS])
    return {
        IMAGE_KEY: tf.RaggedTensor.from_tensor(normalize(pixels, mean, variance)),
        LABEL_KEY: inputs[LABEL_KEY],
        IMAGE_MEAN_KEY: tf.broadcast_to(mean, per_row),
        IMAGE_VARIANCE_KEY: tf.broadcast_to(variance, per_row),
    }


def _statistics(pixels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of each channel over all examples, float32 [3].

    By counting how often each level occurs: whole numbers, whose sum does not depend on how Beam
    cuts the data and in which order it combines the parts, as that of floats does.

    Args:
      pixels: uint8 [N, H x W, 3].
    """
    bins = tf.cast(pixels, tf.int32) + _LEVELS * tf.range(CHANNELS)  # (N, H x W, 3)
    of_images = tf.raw_ops.DenseBincount(
        input=tf.reshape(bins, [tf.shape(pixels)[0], -1]),
        size=_LEVELS * CHANNELS,
        weights=tf.zeros([0], tf.int64),
    )
    of_images = tf.ensure_shape(of_images, [None, _LEVELS * CHANNELS])
    counts = tf.reshape(tft.sum(of_images, reduce_instance_dims=False), [CHANNELS, _LEVELS])
    levels = tf.range(_LEVELS, dtype=tf.int64)
    number, total, squares = (
        tf.cast(tf.reduce_sum(counts * powers, axis=1), tf.float64)
        for powers in (1, levels, levels**2)
    )
    mean = total / number
    variance = squares / number - mean**2
    return tf.cast(mean, tf.float32), tf.cast(variance, tf.float32)
