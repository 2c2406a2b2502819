"""The loss of a preset, and the accuracies that are measured beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from trainer.preset import Preset


@keras.saving.register_keras_serializable(package="vit")
class SmoothedCrossentropy(keras.losses.Loss):
    """Cross-entropy of logits [B, classes] with labels, a share of which all classes get.

    Labels are integers [B] or probabilities [B, classes]: those of mixed images and the plain ones
    of the validation split have one loss. Keras's own label smoothing needs the latter; this is the
    same value.

    Args:
        label_smoothing: Share of the probability that all classes divide among them, 0 to 1.
        class_weights: What an example of each class counts, mixed ones in their shares; None: 1.
        **kwargs: `keras.losses.Loss` arguments.
    """

    def __init__(
        self, label_smoothing: float, class_weights: Sequence[float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else [float(w) for w in class_weights]

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the loss of each example, [B]."""
        log_probabilities = ops.log_softmax(y_pred)  # (B, classes)
        if _are_probabilities(y_true, y_pred):
            shares = ops.cast(y_true, y_pred.dtype)

            def of_labels(values: Any) -> Any:
                return ops.sum(shares * values, axis=1)
        else:
            labels = ops.cast(ops.reshape(y_true, (-1, 1)), "int32")

            def of_labels(values: Any) -> Any:
                return ops.take_along_axis(values, labels, axis=1)[:, 0]

        of_all = ops.mean(log_probabilities, axis=1)
        loss = -(1 - self.label_smoothing) * of_labels(log_probabilities)
        loss -= self.label_smoothing * of_all
        if self.class_weights is None:
            return loss
        weights = ops.convert_to_tensor([self.class_weights], dtype=y_pred.dtype)
        return loss * of_labels(ops.broadcast_to(weights, ops.shape(y_pred)))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        settings = {
            "label_smoothing": self.label_smoothing,
            "class_weights": self.class_weights,
        }
        return {**super().get_config(), **settings}


@keras.saving.register_keras_serializable(package="vit")
class TopKAccuracy(keras.metrics.MeanMetricWrapper):
    """Share of images whose label is among the k most probable classes.

    Labels as for `SmoothedCrossentropy`; of a mixed image it is the one with the larger share.

    Args:
        k: How many classes count.
        name: The metric's name.
        **kwargs: `keras.metrics.Metric` arguments.
    """

    def __init__(self, k: int, name: str, **kwargs: Any) -> None:
        super().__init__(_is_in_top_k, name=name, k=k, **kwargs)
        self.k = k

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"k": self.k, "name": self.name, "dtype": self.dtype}


def _is_in_top_k(y_true: Any, y_pred: Any, k: int) -> Any:
    if _are_probabilities(y_true, y_pred):
        y_true = ops.argmax(y_true, axis=-1)
    return keras.metrics.sparse_top_k_categorical_accuracy(y_true, y_pred, k=k)


def _are_probabilities(y_true: Any, y_pred: Any) -> bool:
    return len(y_true.shape) == 2 and y_true.shape[1] == y_pred.shape[1]


def class_weights(labels: np.ndarray, num_classes: int) -> list[float]:
    """What an example of each class counts so that all classes count alike; 1 on average.

    Args:
        labels: Of the train split, integers [N].
        num_classes: Those without an example count 0.
    """
    counts = np.bincount(labels, minlength=num_classes)
    present = counts > 0
    weights = np.where(present, len(labels) / np.maximum(counts, 1) / present.sum(), 0.0)
    return [float(weight) for weight in weights]


def build_loss(preset: Preset, weights: Sequence[float] | None = None) -> keras.losses.Loss:
    """Builds the loss: cross-entropy of the logits, smoothed or balanced if the preset says so.

    Args:
        preset: See above.
        weights: Of `class_weights`, where the preset balances.
    """
    smoothing, balance = preset.training.label_smoothing, preset.training.balance
    if smoothing or balance or preset.augmentation.mixes_labels:
        return SmoothedCrossentropy(smoothing, weights if balance else None, name="loss")
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build_metrics(preset: Preset, num_classes: int) -> list[keras.metrics.Metric]:
    """Builds `top_1_accuracy` and `top_5_accuracy`, for the labels that the preset trains on.

    Args:
        preset: Says whether labels are mixed.
        num_classes: Of fewer than five, all are among the top five.
    """
    top = min(5, num_classes)
    if preset.augmentation.mixes_labels:
        return [TopKAccuracy(1, "top_1_accuracy"), TopKAccuracy(top, "top_5_accuracy")]
    return [
        keras.metrics.SparseCategoricalAccuracy(name="top_1_accuracy"),
        keras.metrics.SparseTopKCategoricalAccuracy(k=top, name="top_5_accuracy"),
    ]
