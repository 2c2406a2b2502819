"""Executor of Cifar100ExampleGen: records to tf.Examples, in three splits."""

from __future__ import annotations

import os
from typing import Any

import apache_beam as beam
import tensorflow as tf
from apache_beam.io import filesystems
from tfx import types
from tfx.components.example_gen import base_example_gen_executor
from tfx.dsl.io import fileio
from tfx.types import artifact_utils, standard_component_specs

from components.example_gen import records
from dataset import format as dataset_format
from dataset.card import (
    CARD_FILE,
    SPLITS,
    TEST,
    TRAIN,
    VALIDATION,
    DataCard,
    SourceInfo,
    Split,
    Superclasses,
)
from dataset.unpacked import CIFAR_100

# The notebook trains with validation_split=0.1, which Keras takes from the end of the data.
_VALIDATION_DIVISOR = 10

DATASET_NAME_KEY = "dataset_name"
# Not `input_fingerprint`: where an orchestrator runs FileBasedExampleGen's driver after all, that
# property is the driver's, made of modification times.
FINGERPRINT_KEY = "content_fingerprint"
LIMIT_KEY = "limit"


def to_example(record: bytes) -> bytes:
    """Converts a record to a serialized tf.Example of image, label and superclass."""
    image, label, superclass = dataset_format.decode_record(record)
    feature = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "superclass": tf.train.Feature(int64_list=tf.train.Int64List(value=[superclass])),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


class _LimitPerClass(beam.PTransform):
    """Keeps the first `limit` records, with equal counts per class as far as they divide."""

    def __init__(self, limit: int):
        super().__init__()
        self._each, self._rest = divmod(limit, dataset_format.NUM_FINE_CLASSES)

    def _quota(self, label: int) -> int:
        return self._each + (label < self._rest)

    def expand(self, indexed_records: beam.PCollection) -> beam.PCollection:
        return (
            indexed_records
            | "KeyByClass" >> beam.Map(lambda pair: (pair[1][1], pair))  # byte 1: the fine label
            | "FirstOfClass" >> beam.combiners.Top.SmallestPerKey(self._each + 1)
            | "Quota" >> beam.FlatMap(lambda group: group[1][: self._quota(group[0])])
        )


class Executor(base_example_gen_executor.BaseExampleGenExecutor):
    """Reads train.bin and test.bin and writes the splits train, validation and test.

    It takes nothing from the driver (no span, version or fingerprint), so it runs unchanged where
    orchestrators do not call TFX drivers.
    """

    def GetInputSourceToExamplePTransform(self) -> beam.PTransform:
        """Never called: train.bin gives two splits, which takes `GenerateExamplesByBeam`."""
        raise NotImplementedError

    def GenerateExamplesByBeam(
        self, pipeline: beam.Pipeline, exec_properties: dict[str, Any]
    ) -> dict[str, beam.PCollection]:
        """See base class."""
        folder = exec_properties[standard_component_specs.INPUT_BASE_KEY]
        train_path = os.path.join(folder, dataset_format.TRAIN_FILE)
        test_path = os.path.join(folder, dataset_format.TEST_FILE)
        count = _count_records(train_path)
        _count_records(test_path)
        first_validation = count - count // _VALIDATION_DIVISOR

        indexed = {
            path: pipeline
            | f"Read[{os.path.basename(path)}]"
            >> records.ReadFixedLengthRecords(path, dataset_format.RECORD_BYTES)
            for path in (train_path, test_path)
        }
        splits = {
            TRAIN: indexed[train_path]
            | "BeforeLastTenth" >> beam.Filter(lambda pair: pair[0] < first_validation),
            VALIDATION: indexed[train_path]
            | "LastTenth" >> beam.Filter(lambda pair: pair[0] >= first_validation),
            TEST: indexed[test_path],
        }
        if limit := exec_properties.get(LIMIT_KEY):
            splits = {
                name: split | f"Limit[{name}]" >> _LimitPerClass(limit)
                for name, split in splits.items()
            }
        return {
            name: split | f"ToExample[{name}]" >> beam.Map(lambda pair: to_example(pair[1]))
            for name, split in splits.items()
        }

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See base class; writes the data set's card beside the splits."""
        folder = exec_properties[standard_component_specs.INPUT_BASE_KEY]
        classes, superclasses = (
            _read_label_names(os.path.join(folder, file), count)
            for file, count in (
                (dataset_format.FINE_NAMES_FILE, dataset_format.NUM_FINE_CLASSES),
                (dataset_format.COARSE_NAMES_FILE, dataset_format.NUM_COARSE_CLASSES),
            )
        )
        super().Do(input_dict, output_dict, exec_properties)
        examples = artifact_utils.get_single_instance(
            output_dict[standard_component_specs.EXAMPLES_KEY]
        )
        limit = exec_properties.get(LIMIT_KEY) or None  # pipelines' parameters cannot be None
        name = exec_properties[DATASET_NAME_KEY]
        train, test = (
            _count_records(os.path.join(folder, file))
            for file in (dataset_format.TRAIN_FILE, dataset_format.TEST_FILE)
        )
        validation = train // _VALIDATION_DIVISOR
        counts = {TRAIN: train - validation, VALIDATION: validation, TEST: test}
        if limit:
            counts = {split: min(limit, count) for split, count in counts.items()}
        size = dataset_format.IMAGE_SHAPE[:2]
        card = DataCard(
            name=name,
            classes=classes,
            image_size=size,
            splits={split: Split(counts[split], split == VALIDATION) for split in SPLITS},
            source=SourceInfo(
                kind=name,
                location=folder,
                fingerprint=exec_properties[FINGERPRINT_KEY],
                smallest=size,
                largest=size,
                unreadable=0,
                duplicates=0,
            ),
            superclasses=Superclasses(
                superclasses, _superclasses(os.path.join(folder, dataset_format.TRAIN_FILE))
            ),
            limit=limit,
            subset=bool(limit)
            or (name == CIFAR_100 and (train, test) != dataset_format.OFFICIAL_RECORDS),
        )
        with fileio.open(os.path.join(examples.uri, CARD_FILE), "w") as file:
            file.write(card.to_json())
        for key in (DATASET_NAME_KEY, FINGERPRINT_KEY):
            examples.set_string_custom_property(key, exec_properties[key])


def _count_records(path: str) -> int:
    _require(path)
    match = filesystems.FileSystems.match([path])[0]
    return dataset_format.count_records(match.metadata_list[0].size_in_bytes, path)


def _read_label_names(path: str, count: int) -> tuple[str, ...]:
    _require(path)
    with fileio.open(path, "r") as file:
        return dataset_format.parse_label_names(file.read(), count, path)


def _superclasses(path: str) -> tuple[int | None, ...]:
    """Reads which superclass goes with each class; None for one that no record has."""
    result: list[int | None] = [None] * dataset_format.NUM_FINE_CLASSES
    size = dataset_format.RECORD_BYTES * 1024
    with filesystems.FileSystems.open(path) as file:
        while block := file.read(size):
            for coarse, fine in {
                (block[at], block[at + 1])
                for at in range(0, len(block), dataset_format.RECORD_BYTES)
            }:
                # Labels out of range are DataGate's to report.
                if fine < len(result):
                    result[fine] = coarse
    return tuple(result)


def _require(path: str) -> None:
    if not fileio.exists(path):
        raise dataset_format.DataError(
            f"{path} does not exist; the data folder must hold {', '.join(dataset_format.FILES)}."
        )
