"""ExampleGen's output, made by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import tensorflow as tf
from tfx import types
from tfx.types import artifact_utils, standard_artifacts

from dataset.card import CARD_FILE, DataCard


def example(**features: int | float | bytes | list[bytes] | None) -> bytes:
    """A serialized tf.Example of these features; None leaves one out."""
    message = tf.train.Example()
    for name, value in features.items():
        if value is None:
            continue
        feature = message.features.feature[name]
        if isinstance(value, float):
            feature.float_list.value.append(value)
        elif isinstance(value, int):
            feature.int64_list.value.append(value)
        else:
            feature.bytes_list.value.extend(value if isinstance(value, list) else [value])
    return message.SerializeToString()


def write_split(folder: Path, examples: Iterable[bytes]) -> None:
    """Writes serialized examples as ExampleGen does: compressed records, in a folder of a split."""
    folder.mkdir(parents=True)
    with tf.io.TFRecordWriter(str(folder / "data.gz"), "GZIP") as writer:
        for item in examples:
            writer.write(item)


def examples_artifact(
    folder: Path, splits: Mapping[str, Iterable[bytes]], card: DataCard
) -> types.Artifact:
    """An artifact of these splits, with the data set's card beside them."""
    artifact = standard_artifacts.Examples()
    artifact.uri = str(folder)
    artifact.split_names = artifact_utils.encode_split_names(list(splits))
    for split, examples in splits.items():
        write_split(folder / f"Split-{split}", examples)
    (folder / CARD_FILE).write_text(card.to_json())
    return artifact
