"""From the bytes of an image to what the model sees: the one place where pixels are normalised.

`normalize` is the whole computation. `preprocessing_fn` wraps it for TensorFlow Transform, whose
graph is applied in training; the exported signatures, through which Evaluator and model servers
call the model, use the same function with the constants that the transform graph holds (see
`trainer/export.py`), so training and serving cannot drift apart.
"""

from __future__ import annotations

import tensorflow as tf
import tensorflow_transform as tft

IMAGE_SHAPE = (32, 32, 3)  # rows, columns, RGB

# Features of the raw examples, as written by components/example_gen.
IMAGE_KEY = "image"  # 3,072 bytes: uint8, row-major, RGB interleaved
LABEL_KEY = "label"  # int64 in [0, 100)

# Transformed features: IMAGE_KEY float32 [N, 32, 32, 3], LABEL_KEY int64 [N], and the two
# constants, repeated for each row because Transform's outputs have a batch dimension.
IMAGE_MEAN_KEY = "image_mean"
IMAGE_VARIANCE_KEY = "image_variance"

# Keras's Normalization layer guards its division by the same value.
_EPSILON = 1e-7


def decode_images(raw: tf.Tensor) -> tf.Tensor:
    """Decodes raw image bytes.

    Args:
      raw: string [N], each 3,072 bytes.

    Returns:
      uint8 [N, 32, 32, 3].

    Raises:
      tf.errors.InvalidArgumentError: An image has another length (when it is computed).
    """
    # N rather than -1, with which images of twice the length would become twice as many.
    return tf.reshape(tf.io.decode_raw(raw, tf.uint8), [tf.size(raw), *IMAGE_SHAPE])


def normalize(pixels: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
    """Shifts and scales every channel to zero mean and unit variance.

    Args:
      pixels: uint8 or float [N, 32, 32, 3] with values in 0..255.
      mean: float32 [3], per channel, in units of pixel values.
      variance: float32 [3], per channel, in squared pixel values.

    Returns:
      float32 [N, 32, 32, 3].
    """
    return (tf.cast(pixels, tf.float32) - mean) / tf.maximum(tf.sqrt(variance), _EPSILON)


def preprocessing_fn(inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """TensorFlow Transform's callback.

    Args:
      inputs: IMAGE_KEY string [N], LABEL_KEY int64 [N], further features are ignored.

    Returns:
      The transformed features named above.
    """
    pixels = decode_images(inputs[IMAGE_KEY])
    values = tf.cast(pixels, tf.float32)
    # Law of total variance: all images have the same size, so the variance over all pixels is the
    # mean of the images' variances plus the variance of their means. The analyzers then see three
    # numbers an image in place of 3,072.
    image_means = tf.reduce_mean(values, axis=[1, 2])  # [N, 3]
    image_variances = tf.math.reduce_variance(values, axis=[1, 2])  # [N, 3]
    mean = tft.mean(image_means, reduce_instance_dims=False)  # [3]
    variance = tft.mean(image_variances, reduce_instance_dims=False) + tft.var(
        image_means, reduce_instance_dims=False
    )
    per_row = tf.stack([tf.shape(pixels)[0], IMAGE_SHAPE[2]])
    return {
        IMAGE_KEY: normalize(pixels, mean, variance),
        LABEL_KEY: inputs[LABEL_KEY],
        IMAGE_MEAN_KEY: tf.broadcast_to(mean, per_row),
        IMAGE_VARIANCE_KEY: tf.broadcast_to(variance, per_row),
    }
