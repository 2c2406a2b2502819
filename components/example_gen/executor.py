"""Executor of ImageExampleGen: the shards of a source to files of tf.Examples, in three splits.

A shard goes into one file, image after image, in the order that the source gives: the same data
give the same bytes however busy the machine is, and memory does not grow with the data, as it would
with the shuffle of TFX's own ExampleGens.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import tensorflow as tf
from tfx import types
from tfx.components.util import examples_utils
from tfx.dsl.components.base import base_beam_executor
from tfx.dsl.io import fileio
from tfx.proto import example_gen_pb2
from tfx.types import artifact_utils, standard_component_specs

from dataset import images
from dataset.card import CARD_FILE, SPLITS, TRAIN, DataCard, Split
from dataset.format import DataError
from dataset.interface import (
    Item,
    Options,
    Shard,
    Source,
    Unreadable,
    check_unreadable,
    options_from_json,
)
from dataset.source import open_source
from dataset.splitting import shown

UNREADABLE_FILE = "unreadable.json"

DATASET_NAME_KEY = "dataset_name"
FINGERPRINT_KEY = "content_fingerprint"
LIMIT_KEY = "limit"
OPTIONS_KEY = "options"

_FILE_FORMAT = "tfrecords_gzip"
# Photographs hardly become smaller; a higher level takes several times as long.
_WRITER_OPTIONS = tf.io.TFRecordOptions(compression_type="GZIP", compression_level=1)


def decode_and_resize(item: Item, card: DataCard) -> np.ndarray:
    """Makes the stored image of an item: uint8 [*card.shape].

    Raises:
      images.UnreadableImage: It cannot be decoded.
    """
    pixels = images.decode(item.image) if isinstance(item.image, bytes) else item.image
    return images.resize(pixels, card.image_size, card.resize)


def to_example(image: np.ndarray, item: Item) -> bytes:
    """Converts an image to a serialized tf.Example of image, label and maybe superclass."""
    feature = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[item.label])),
    }
    if item.superclass is not None:
        feature["superclass"] = tf.train.Feature(
            int64_list=tf.train.Int64List(value=[item.superclass])
        )
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    result: bytes = example.SerializeToString(deterministic=True)
    return result


def write_shard(
    task: tuple[str, str, Shard], card: DataCard
) -> Iterator[tuple[str, int, list[Unreadable]]]:
    """Writes a shard.

    Args:
      task: Name of the split, path of the file, and the shard.
      card: Of the data set.

    Yields:
      Once: the split, how many examples were written, and what could not be read.
    """
    split, path, shard = task
    count = 0
    unreadable = []
    with tf.io.TFRecordWriter(path, _WRITER_OPTIONS) as writer:
        for item in shard.read():
            if isinstance(item, Unreadable):
                unreadable.append(item)
                continue
            try:
                image = decode_and_resize(item, card)
            except images.UnreadableImage as error:
                unreadable.append(Unreadable(item.name, error.reason, item.label))
                continue
            writer.write(to_example(image, item))
            count += 1
    yield split, count, unreadable


class Executor(base_beam_executor.BaseBeamExecutor):
    """Opens the source and writes its splits, the card and the list of what cannot be read.

    It takes nothing from a driver, so it runs unchanged where orchestrators do not call any.
    """

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See base class.

        Raises:
          DataError: The source is damaged, or more of it than allowed cannot be read.
        """
        self._log_startup(input_dict, output_dict, exec_properties)
        options = dataclasses.replace(
            options_from_json(exec_properties[OPTIONS_KEY]),
            limit=exec_properties.get(LIMIT_KEY) or None,  # pipelines' parameters cannot be None
        )
        source = open_source(
            exec_properties[standard_component_specs.INPUT_BASE_KEY],
            options,
            name=exec_properties[DATASET_NAME_KEY],
        )
        examples = artifact_utils.get_single_instance(
            output_dict[standard_component_specs.EXAMPLES_KEY]
        )
        written = self._write(source, examples.uri)
        unreadable = [item for _, _, items in written for item in items]
        _check_written(source, written, unreadable, options)
        counts = Counter[str]()
        for split, count, _ in written:
            counts[split] += count
        card = dataclasses.replace(
            source.card,
            splits={
                split: Split(counts[split], source.card.splits[split].derived) for split in SPLITS
            },
            source=dataclasses.replace(
                source.card.source, unreadable=len(source.unreadable) + len(unreadable)
            ),
        )
        listed = [
            {"file": item.name, "reason": item.reason}
            for item in sorted([*source.unreadable, *unreadable])
        ]
        for name, text in (
            (CARD_FILE, card.to_json()),
            (UNREADABLE_FILE, json.dumps(listed, indent=1, ensure_ascii=False) + "\n"),
        ):
            with fileio.open(os.path.join(examples.uri, name), "w") as file:
                file.write(text)
        examples.split_names = artifact_utils.encode_split_names(list(SPLITS))
        examples_utils.set_payload_format(examples, example_gen_pb2.FORMAT_TF_EXAMPLE)
        examples_utils.set_file_format(examples, _FILE_FORMAT)
        for key in (DATASET_NAME_KEY, FINGERPRINT_KEY):
            examples.set_string_custom_property(key, exec_properties[key])

    def _write(self, source: Source, uri: str) -> list[tuple[str, int, list[Unreadable]]]:
        tasks = []
        for split in SPLITS:
            folder = os.path.join(uri, f"Split-{split}")
            fileio.makedirs(folder)
            shards = source.shards(split)
            tasks += [
                (
                    split,
                    os.path.join(folder, f"data_tfrecord-{at:05}-of-{len(shards):05}.gz"),
                    shard,
                )
                for at, shard in enumerate(shards)
            ]
        results = os.path.join(uri, "results")
        with self._make_beam_pipeline() as pipeline:
            _ = (
                pipeline
                | "Shards" >> beam.Create(tasks)
                | "Spread" >> beam.Reshuffle()
                | "WriteShard" >> beam.FlatMap(write_shard, source.card)
                | "ToJson" >> beam.Map(json.dumps)
                | "Results" >> beam.io.WriteToText(results, num_shards=1, shard_name_template="")
            )
        with fileio.open(results, "r") as file:
            written = [
                (split, count, [Unreadable(*item) for item in items])
                for split, count, items in map(json.loads, file.read().splitlines())
            ]
        fileio.remove(results)
        return written


def _check_written(
    source: Source,
    written: Sequence[tuple[str, int, list[Unreadable]]],
    unreadable: Sequence[Unreadable],
    options: Options,
) -> None:
    """Stops where too much could not be read, or nothing of a class."""
    total = sum(count for _, count, _ in written) + len(unreadable) + len(source.unreadable)
    check_unreadable([*source.unreadable, *unreadable], total, options)
    lost = Counter(item.label for split, _, items in written for item in items if split == TRAIN)
    gone = [
        source.card.classes[label]
        for label, count in enumerate(source.counts[TRAIN])
        if count and count == lost[label]
    ]
    if gone:
        raise DataError(
            f"no image of {shown(gone)} in {TRAIN} can be read: replace them, or remove the class"
        )


def without_limit(options: Options) -> Options:
    """The options without the limit, which is a property of its own: a parameter on Kubeflow."""
    return dataclasses.replace(options, limit=None)
