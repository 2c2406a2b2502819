"""What TFX's Trainer and Tuner get, and trainings of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import tensorflow as tf
import tensorflow_transform as tft
import tensorflow_transform.beam as tft_beam
from tfx.components.trainer.fn_args_utils import FnArgs

from dataset import format as binary
from dataset import synthetic
from dataset.card import CARD_FILE, DataCard, SourceInfo, Split, Superclasses
from tests.support import examples
from trainer import preprocessing, run
from trainer import report as reports

TRAIN, VALIDATION = 180, 60
# Not in the order of the data set's own, so that they can come from the card alone.
NAMES = synthetic.LABEL_NAMES.fine[::-1]
CARD = DataCard(
    name="synthetic",
    classes=NAMES,
    image_size=(32, 32),
    resize="crop",
    splits={"train": Split(TRAIN, False), "validation": Split(VALIDATION, True)},
    source=SourceInfo("synthetic", "nowhere", "0" * 64, (32, 32), (32, 32), 0, 0),
    superclasses=Superclasses(("a", "b"), (0, 1) * 50),
    limit=None,
    subset=False,
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What TFX's Trainer gets: examples, their card and a transform graph."""

    folder: Path
    validation_images: np.ndarray
    validation_labels: np.ndarray


def write_split(folder: Path, images: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    rows = [{"image": image.tobytes(), "label": int(n)} for image, n in zip(images, labels)]
    examples.write_split(folder, [examples.example(**row) for row in rows])
    return rows


def make_inputs(work: Path) -> Inputs:
    data = synthetic.generate(work / "data", train=TRAIN + VALIDATION, test=1)
    images, labels, _ = binary.read_records(data / binary.TRAIN_FILE)
    rows = write_split(work / "examples" / "Split-train", images[:TRAIN], labels[:TRAIN])
    write_split(work / "examples" / "Split-validation", images[TRAIN:], labels[TRAIN:])
    (work / "examples" / CARD_FILE).write_text(CARD.to_json())
    metadata = tft.DatasetMetadata.from_feature_spec(
        {
            "image": tf.io.FixedLenFeature([], tf.string),
            "label": tf.io.FixedLenFeature([], tf.int64),
        }
    )
    with beam.Pipeline() as pipeline, tft_beam.Context(temp_dir=str(work / "tmp")):
        graph = (pipeline | beam.Create(rows), metadata) | tft_beam.AnalyzeDataset(
            preprocessing.preprocessing_fn
        )
        _ = graph | tft_beam.WriteTransformFn(str(work / "transform"))
    return Inputs(work, images[TRAIN:], labels[TRAIN:])


def arguments(
    inputs: Inputs,
    work: Path,
    *,
    base_model: Path | None = None,
    hyperparameters: dict[str, Any] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """FnArgs's fields for a run that writes below `work`; `overrides` are of `custom_config`."""
    config = {
        "preset": "tiny",
        "set": {},
        "epochs": 2,
        "train_minutes": 0.0,
        "batch_size": 64,
        "learning_rate": 2e-3,
        "weight_decay": 1e-3,
        "engine": "tensorflow",
        "seed": 7,
        "checkpoint_dir": str(work / "checkpoints"),
        "code": "of these tests",
    }
    return {
        "train_files": [str(inputs.folder / "examples" / "Split-train" / "*")],
        "eval_files": [str(inputs.folder / "examples" / "Split-validation" / "*")],
        "transform_graph_path": str(inputs.folder / "transform"),
        "serving_model_dir": str(work / "model" / "Format-Serving"),
        "model_run_dir": str(work / "model_run"),
        "base_model": str(base_model) if base_model else None,
        "hyperparameters": hyperparameters,
        "custom_config": {**config, **overrides},
    }


def train(inputs: Inputs, work: Path, **overrides: Any) -> dict[str, Any]:
    """Runs run_fn in this process; returns training.json."""
    run.run_fn(FnArgs(**arguments(inputs, work, **overrides)))
    return report(work)


def report(work: Path) -> dict[str, Any]:
    assets = work / "model" / "Format-Serving" / "assets.extra"
    return json.loads((assets / reports.REPORT_FILE).read_text())
