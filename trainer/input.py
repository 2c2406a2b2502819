"""The Trainer's input: examples on disk to batches of normalised images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tensorflow_transform as tft

from trainer import preprocessing
from trainer.network.mixing import Mixing

# Of the raw examples.
FEATURES = {
    preprocessing.IMAGE_KEY: tf.io.FixedLenFeature([], tf.string),
    preprocessing.LABEL_KEY: tf.io.FixedLenFeature([], tf.int64),
}
_PARSE_BATCH = 1024


def read_examples(file_patterns: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Reads a split into memory, as raw bytes.

    Args:
      file_patterns: Globs of GZIP-compressed TFRecord files of tf.Examples.

    Returns:
      images: object [N], the raw bytes of each.
      labels: int64 [N].

    Raises:
      ValueError: No example matches.
    """
    files = sorted(name for pattern in file_patterns for name in tf.io.gfile.glob(pattern))
    # Read in the order of the files, so that the same artifact always gives the same batches.
    batches = (
        tf.data.TFRecordDataset(files, compression_type="GZIP", num_parallel_reads=len(files) or 1)
        .batch(_PARSE_BATCH)
        .map(lambda serialized: tf.io.parse_example(serialized, FEATURES))
    )
    parsed = list(batches.as_numpy_iterator())
    if not parsed:
        raise ValueError(f"no examples in {', '.join(file_patterns)}")
    return (
        np.concatenate([batch[preprocessing.IMAGE_KEY] for batch in parsed]),
        np.concatenate([batch[preprocessing.LABEL_KEY] for batch in parsed]),
    )


def seed_after(seed: int, epochs: int) -> int:
    """The seed of what is drawn by data sets from an epoch on, whose draws start with the process.

    Args:
      seed: Of the training.
      epochs: That were finished before, in another process; 0 gives the seed itself.
    """
    return seed + 1_000_003 * epochs


def raw_bytes(images: np.ndarray) -> np.ndarray:
    """Images uint8 [N, H, W, 3] as `read_examples` gives them, object [N]."""
    return np.array([image.tobytes() for image in images], dtype=object)


def make_dataset(
    images: np.ndarray,
    labels: np.ndarray,
    transform_output: tft.TFTransformOutput,
    shape: tuple[int, int, int],
    *,
    batch_size: int,
    shuffle_seed: int | None = None,
) -> tf.data.Dataset:
    """Builds the batches of one split.

    Args:
      images: object [N], the raw bytes of each.
      labels: int64 [N].
      transform_output: Transform's result; its graph is applied to whole batches.
      shape: Height, width and channels of an image.
      batch_size: Examples per batch; the last batch may be smaller.
      shuffle_seed: Reshuffle all examples at each epoch, from this seed. None keeps the order.

    Returns:
      A dataset of (image float32 [B, *shape], label int64 [B]).
    """
    layer = transform_output.transform_features_layer()

    def transform(raw: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        transformed = layer({preprocessing.IMAGE_KEY: raw, preprocessing.LABEL_KEY: label})
        # As many images as there were: those of another size do not become more or fewer.
        image = tf.reshape(transformed[preprocessing.IMAGE_KEY].flat_values, [tf.size(raw), *shape])
        return image, transformed[preprocessing.LABEL_KEY]

    # Positions are shuffled, not images: the buffer of a shuffle would hold all of them once more.
    raw_images, all_labels = tf.constant(images), tf.constant(labels)
    positions = tf.data.Dataset.range(len(images))
    if shuffle_seed is not None:
        positions = positions.shuffle(len(images), seed=shuffle_seed, reshuffle_each_iteration=True)

    def load(batch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return transform(tf.gather(raw_images, batch), tf.gather(all_labels, batch))

    return (
        positions.batch(batch_size)
        .map(load, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )


def mix_batches(dataset: tf.data.Dataset, mixing: Mixing, *, seed: int) -> tf.data.Dataset:
    """Mixes the images of each batch among themselves.

    Args:
      dataset: Of `make_dataset`.
      mixing: How.
      seed: Of the draws, which differ from epoch to epoch.

    Returns:
      A dataset of (image float32 [B, H, W, 3], probabilities float32 [B, classes]).
    """
    # A seed for each batch, so that it does not matter which of them are mixed side by side.
    draws = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True)

    def mix(batch: tuple[tf.Tensor, tf.Tensor], draw: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return mixing(*batch, tf.stack([tf.cast(draw, tf.uint32), 0]))

    return (
        tf.data.Dataset.zip((dataset, draws))
        .map(mix, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )
