"""The Trainer's input: examples on disk to batches of normalized images."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_transform as tft

from trainer import preprocessing
from trainer.draws import epoch_draws
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
    files = sorted(name for pattern in file_patterns for name in _matching(pattern))
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


def _matching(pattern: str) -> list[str]:
    """Files of a folder whose names match; the folder's own name is taken as it is."""
    folder, names = os.path.split(pattern)
    if not tf.io.gfile.isdir(folder):
        return []
    found = fnmatch.filter(tf.io.gfile.listdir(folder), names)
    return [os.path.join(folder, name) for name in found]


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
) -> tf.data.Dataset:
    """Builds the batches of one split, in its order.

    Args:
      images: object [N], the raw bytes of each.
      labels: int64 [N].
      transform_output: Transform's result; its graph is applied to whole batches.
      shape: Height, width and channels of an image.
      batch_size: Examples per batch; the last batch may be smaller.

    Returns:
      A dataset of (image float32 [B, *shape], label int64 [B]).
    """
    load = _loader(images, labels, transform_output, shape)
    positions = tf.data.Dataset.range(len(images)).batch(batch_size)
    return positions.map(load, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def training_batches(
    images: np.ndarray,
    labels: np.ndarray,
    transform_output: tft.TFTransformOutput,
    shape: tuple[int, int, int],
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    mixing: Mixing | None = None,
) -> tf.data.Dataset:
    """Builds the endless batches of the train split: one shuffled pass after the other.

    A batch depends on the seed and the number of its step alone, see `trainer.draws`.

    Args:
      images: See `make_dataset`.
      labels: See `make_dataset`.
      transform_output: See `make_dataset`.
      shape: See `make_dataset`.
      batch_size: Examples per batch; the last batch of each pass may be smaller.
      seed: Of the order, and of what is drawn for the mixing.
      first_step: Of the training, where the dataset begins.
      mixing: Mixes the images of each batch among themselves; None does not.

    Returns:
      A dataset of (image float32 [B, *shape], label int64 [B] or, mixed, probabilities float32
      [B, classes]).
    """
    load = _loader(images, labels, transform_output, shape)
    steps = math.ceil(len(labels) / batch_size)

    def passes(epoch: tf.Tensor) -> tf.data.Dataset:
        order, seeds = tf.numpy_function(
            lambda epoch: epoch_draws(seed, int(epoch), len(labels), steps),
            [epoch],
            [tf.int32, tf.uint32],
        )
        order, seeds = tf.ensure_shape(order, [len(labels)]), tf.ensure_shape(seeds, [steps])
        batches = tf.data.Dataset.from_tensor_slices(order).batch(batch_size)
        return tf.data.Dataset.zip((batches, tf.data.Dataset.from_tensor_slices(seeds)))

    def batch(positions: tf.Tensor, draw: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image, label = load(positions)
        # A seed for each batch, so that it does not matter which of them are mixed side by side.
        return mixing(image, label, tf.stack([draw, 0])) if mixing else (image, label)

    epochs = tf.data.Dataset.range(first_step // steps, tf.int64.max)
    return (
        # Positions are shuffled, not images: these would be in memory once more.
        epochs.flat_map(passes)
        .skip(first_step % steps)
        .map(batch, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )


def _loader(
    images: Any, labels: Any, transform_output: tft.TFTransformOutput, shape: tuple[int, int, int]
) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """From positions [B] to (image float32 [B, *shape], label int64 [B])."""
    layer = transform_output.transform_features_layer()
    raw_images, all_labels = tf.constant(images), tf.constant(labels)

    def load(batch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        raw, label = tf.gather(raw_images, batch), tf.gather(all_labels, batch)
        transformed = layer({preprocessing.IMAGE_KEY: raw, preprocessing.LABEL_KEY: label})
        # As many images as there were: those of another size do not become more or fewer.
        pixels = transformed[preprocessing.IMAGE_KEY].flat_values
        image = tf.reshape(pixels, [tf.size(raw), *shape])
        return image, transformed[preprocessing.LABEL_KEY]

    return load
