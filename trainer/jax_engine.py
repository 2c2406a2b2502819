"""Trainings with JAX as the pipeline sees them: from its artifacts to a network in TensorFlow."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from trainer import export, known_answers, weights
from trainer.on_jax import process
from trainer.on_jax.job import SPLITS, Folder, Job, Result
from trainer.preset import Preset

if TYPE_CHECKING:
    from trainer.run import Inputs

# Of probabilities that are computed in float32, in another order.
_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Trained:
    """A training's result.

    Attributes:
      result: What JAX's process says of it.
      weights: One array for each of the network's.
    """

    result: Result
    weights: list[np.ndarray]


def fit(preset: Preset, inputs: Inputs, checkpoints: str | None = None) -> Trained:
    """Trains, or trains on; in a process of its own.

    Args:
      preset: What to train, and how.
      inputs: What to train on, and from.
      checkpoints: Folder of this training; its checkpoints are those of `trainer.callbacks`, so
        that TensorFlow can go on from them, too. None keeps none.

    Raises:
      trainer.on_jax.process.TrainingError: It failed.
    """
    mean, variance = export.channel_statistics(inputs.transform_output)
    with tempfile.TemporaryDirectory(prefix="vit-jax-") as path:
        job = Job(
            preset,
            inputs.card.num_classes,
            inputs.seed,
            mean.tolist(),
            variance.tolist(),
            os.path.abspath(checkpoints or os.path.join(path, "checkpoints")),
            inputs.other_classes,
        )
        folder = Folder(path)
        for name, (images, labels) in zip(SPLITS, (inputs.train_split, inputs.validation_split)):
            folder.write_split(name, _pixels(images, inputs.card.shape), labels)
        folder.write_job(job, inputs.base.packed_weights() if inputs.base else None)
        process.run(folder, inputs.compiled)
        result, packed = folder.read_result()
    return Trained(result, weights.unpack(packed))


def checked_answers(network: keras.Model, inputs: Inputs, result: Result) -> dict[str, list[Any]]:
    """JAX's own answers to some images, as `trainer.known_answers.compute` gives TensorFlow's.

    Args:
      network: With the trained weights, computing in float32.
      inputs: What was trained on.
      result: Of the training.

    Raises:
      trainer.export.ExportError: TensorFlow's differ from them.
    """
    answers = known_answers.compute(network, inputs.validation_split.images, inputs.validation)
    theirs = result.probabilities[: len(answers["images"])]
    difference = float(np.abs(np.subtract(answers["probabilities"], theirs)).max())
    if not difference <= _TOLERANCE:
        raise export.ExportError(
            f"the network that JAX has trained answers differently in TensorFlow: probabilities "
            f"differ by up to {difference:.3g}, more than {_TOLERANCE:g}. Train with TensorFlow "
            "(--engine tensorflow)."
        )
    return {**answers, "probabilities": theirs}


def _pixels(images: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Images as raw bytes, [N], to uint8 [N, *shape]."""
    raw = images.numpy() if tf.is_tensor(images) else images
    return np.frombuffer(b"".join(raw), np.uint8).reshape(len(raw), *shape)
