"""Runs ExampleGen's executor, and reads what it has written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf
from tfx.dsl.components.base.base_beam_executor import BaseBeamExecutor
from tfx.types import artifact_utils, standard_artifacts

from components.example_gen.component import ImageExampleGen
from components.example_gen.executor import Executor
from dataset.card import CARD_FILE, DataCard, from_json
from dataset.interface import Options
from pipeline.execution import beam_arguments


class Row(NamedTuple):
    """An example."""

    image: bytes
    label: int
    superclass: int | None


def ingest(
    location: Path | str,
    output: Path,
    *,
    limit: int | None = None,
    dataset_name: str = "synthetic",
    options: Options | None = None,
    workers: int = 1,
) -> standard_artifacts.Examples:
    """Runs the executor with the component's own properties, as an orchestrator without drivers."""
    component = ImageExampleGen(
        str(location),
        dataset_name=dataset_name,
        content_fingerprint="f1",
        limit=limit,
        options=options,
    )
    properties: dict[str, Any] = dict(component.exec_properties)
    examples = standard_artifacts.Examples()
    examples.uri = str(output)
    context = BaseBeamExecutor.Context(
        beam_pipeline_args=beam_arguments(workers=workers),
        tmp_dir=str(output.parent / "tmp"),
        unique_id="1",
    )
    Executor(context).Do({}, {"examples": [examples]}, properties)
    return examples


def files(examples: standard_artifacts.Examples, split: str) -> list[str]:
    """The files of a split, in their order."""
    folder = artifact_utils.get_split_uri([examples], split)
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))]


def read_rows(examples: standard_artifacts.Examples, split: str) -> list[Row]:
    """Reads a split in the order in which it was written."""
    rows = []
    records = tf.data.TFRecordDataset(files(examples, split), compression_type="GZIP")
    for record in records.as_numpy_iterator():
        feature = tf.train.Example.FromString(record).features.feature
        assert {"image", "label"} <= set(feature) <= {"image", "label", "superclass"}
        (image,) = feature["image"].bytes_list.value
        (label,) = feature["label"].int64_list.value
        superclass = feature["superclass"].int64_list.value if "superclass" in feature else [None]
        rows.append(Row(image, label, superclass[0]))
    return rows


def read_card(examples: standard_artifacts.Examples) -> DataCard:
    """Reads the card beside the splits."""
    path = Path(examples.uri, CARD_FILE)
    return from_json(path.read_text(), str(path))


def digest(rows: list[Row]) -> str:
    """SHA-256 of CIFAR-100's rows, whatever their order."""
    parts = sorted(row.image + bytes([row.label, row.superclass or 0]) for row in rows)
    return hashlib.sha256(b"".join(parts)).hexdigest()
