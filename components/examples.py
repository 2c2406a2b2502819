"""ExampleGen's output, for components that ask models about some of the images in it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from tfx import types
from tfx.dsl.io import fileio
from tfx.types import artifact_utils

from dataset import card as data_card
from dataset.card import DataCard


class ExamplesError(ValueError):
    """There are no examples, or they do not hold images of the size that the card says."""


def read_card(examples: types.Artifact) -> DataCard:
    """Reads the data set's card.

    Args:
      examples: ExampleGen's output.

    Raises:
      DataError: There is none that this version reads.
    """
    path = os.path.join(examples.uri, data_card.CARD_FILE)
    with fileio.open(path, "r") as file:
        return data_card.from_json(file.read(), path)


def read(examples: types.Artifact, split: str, count: int) -> list[bytes]:
    """Reads the first examples of a split.

    Args:
      examples: ExampleGen's output.
      split: The split's name.
      count: How many at most.

    Returns:
      Serialized tf.Examples, one at least.

    Raises:
      ExamplesError: There are none.
    """
    if split not in artifact_utils.decode_split_names(examples.split_names):
        raise ExamplesError(f"the examples in {examples.uri} have no split {split!r}.")
    folder = artifact_utils.get_split_uri([examples], split)
    files = sorted(os.path.join(folder, name) for name in fileio.listdir(folder))
    dataset = tf.data.TFRecordDataset(files, compression_type="GZIP")
    serialized = list(dataset.take(count).as_numpy_iterator()) if files else []
    if not serialized:
        raise ExamplesError(f"there are no examples in {folder} to query the model with.")
    return serialized


def images(serialized: Sequence[bytes], card: DataCard, where: str) -> np.ndarray:
    """Reads the images of examples; see `pixels`."""
    features = [tf.train.Example.FromString(item).features.feature for item in serialized]
    raw = [b"".join(feature["image"].bytes_list.value) for feature in features]
    return pixels(raw, card, where)


def labels(serialized: Sequence[bytes]) -> np.ndarray:
    """Reads the classes of examples, int64 [N]."""
    features = [tf.train.Example.FromString(item).features.feature for item in serialized]
    return np.array([feature["label"].int64_list.value[0] for feature in features])


def pixels(raw: Sequence[bytes], card: DataCard, where: str) -> np.ndarray:
    """Makes an array of images.

    Args:
      raw: `card.image_bytes` bytes each.
      card: The data set's.
      where: They are from, for the message.

    Returns:
      uint8 [N, H, W, 3].

    Raises:
      ExamplesError: An image has another length, or there are none.
    """
    wrong = [len(image) for image in raw if len(image) != card.image_bytes]
    if wrong or not raw:
        sizes = f"one has {wrong[0]} bytes" if wrong else "there are none"
        raise ExamplesError(f"{where}: images must have {card.image_bytes} bytes, {sizes}.")
    return np.stack([np.frombuffer(image, np.uint8).reshape(card.shape) for image in raw])
