"""Evaluates a model of `benchmarks/gpu_train.py` and exports it for serving.

    .venv/bin/python -m benchmarks.export_trained --trained trained --data ... --out model \\
        --transform_graph .../Transform/transform_graph/6

The exported model is a SavedModel with the signatures of the pipeline's own (`trainer/export.py`).
The transform graph is that of a pipeline run on the same data; its constants of the normalization
must be those of the training within 2 % of a deviation (the pipeline's training split lacks the
validation images). The figures printed are the exported model's own answers on test.bin.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tensorflow_transform as tft

from components.dataset import format as binary
from components.dataset.locate import Dataset, locate
from trainer import export, known_answers, trained
from trainer.input import make_dataset, raw_bytes

_TOLERANCE = 0.02
_BATCH = 500


def check_normalization(report: dict[str, Any], transform_output: tft.TFTransformOutput) -> None:
    """Refuses a transform graph of other data than a model was trained on.

    Args:
      report: Of the training, with `normalization`.
      transform_output: Of the pipeline.

    Raises:
      trainer.export.ExportError: A mean or a deviation is off by more than 2 %.
    """
    mean, variance = export.channel_statistics(transform_output)
    trained_on = {name: np.array(x) for name, x in report["normalization"].items()}
    deviation = np.sqrt(trained_on["variance"])
    shift = np.abs(mean - trained_on["mean"]) / deviation
    scale = np.abs(np.sqrt(variance) / deviation - 1)
    if not max(shift.max(), scale.max()) <= _TOLERANCE:
        raise export.ExportError(
            f"the transform graph normalizes with mean {np.round(mean, 2)} and variance "
            f"{np.round(variance, 1)}, but the model was trained with "
            f"{np.round(trained_on['mean'], 2)} and {np.round(trained_on['variance'], 1)}: give "
            "the graph of a run on the same data."
        )


def accuracy(model: Path, images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Top-1 and top-5 accuracy of an exported model.

    Args:
      model: The SavedModel's folder.
      images: uint8 [N, 32, 32, 3].
      labels: Integers [N].
    """
    predict = tf.saved_model.load(str(model)).signatures[export.SERVING_DEFAULT]
    answers = [
        predict(tf.constant(images[start : start + _BATCH]))["top_5_ids"].numpy()
        for start in range(0, len(images), _BATCH)
    ]
    hits = np.concatenate(answers) == labels[:, None]
    return float(hits[:, 0].mean()), float(hits.any(axis=1).mean())


def dataset_card(dataset: Dataset) -> dict[str, Any]:
    """Describes a data set as the pipeline's ExampleGen does."""
    names = binary.read_label_names(dataset.folder)
    _, fine, coarse = binary.read_records(dataset.folder / binary.TRAIN_FILE)
    superclasses = dict(zip(fine.tolist(), coarse.tolist()))
    return {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "limit": None,
        "subset": dataset.subset,
        "fine_label_names": list(names.fine),
        "coarse_label_names": list(names.coarse),
        "superclasses": [superclasses.get(label) for label in range(len(names.fine))],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exports as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trained", required=True, type=Path, help="--out of gpu_train")
    parser.add_argument("--data", required=True, help="archive or folder, as for the pipeline")
    parser.add_argument("--transform_graph", required=True, help="of a pipeline run")
    parser.add_argument("--out", required=True, type=Path, help="folder to create")
    options = parser.parse_args(argv)
    try:
        if options.out.exists():
            raise ValueError(f"{options.out} exists already: give another --out.")
        network, report = trained.load(options.trained)
        transform_output = tft.TFTransformOutput(options.transform_graph)
        check_normalization(report, transform_output)
        with tempfile.TemporaryDirectory() as folder:
            dataset = locate(options.data, Path(folder))
            card = dataset_card(dataset)
            images, labels, _ = binary.read_records(dataset.folder / binary.TEST_FILE)
        raw = raw_bytes(images[:_BATCH])
        normalized = make_dataset(raw, labels[:_BATCH], transform_output, batch_size=_BATCH)
        export.export_model(
            network,
            transform_output,
            export.class_names(card),
            str(options.out),
            {
                export.TRAINING_REPORT_FILE: report,
                export.DATASET_CARD_FILE: card,
                known_answers.KNOWN_ANSWERS_FILE: known_answers.compute(network, raw, normalized),
            },
        )
    except (ValueError, OSError, export.ExportError, tf.errors.OpError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    top_1, top_5 = accuracy(options.out, images, labels)
    print(f"{options.out}: test top-1 {top_1:.4f}, top-5 {top_5:.4f} on {len(labels):,} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
