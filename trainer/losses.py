"""The loss of a preset, and the accuracies that are measured beside it."""

from __future__ import annotations

from typing import Any

import keras
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
        **kwargs: `keras.losses.Loss` arguments.
    """

    def __init__(self, label_smoothing: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.label_smoothing = label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the loss of each example, [B]."""
        log_probabilities = ops.log_softmax(y_pred)  # (B, classes)
        if _are_probabilities(y_true, y_pred):
            of_label = ops.sum(ops.cast(y_true, y_pred.dtype) * log_probabilities, axis=1)
        else:
            labels = ops.cast(ops.reshape(y_true, (-1, 1)), "int32")
            of_label = ops.take_along_axis(log_probabilities, labels, axis=1)[:, 0]
        of_all = ops.mean(log_probabilities, axis=1)
        return -(1 - self.label_smoothing) * of_label - self.label_smoothing * of_all

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "label_smoothing": self.label_smoothing}


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


def build_loss(preset: Preset) -> keras.losses.Loss:
    """Builds the loss: cross-entropy of the logits, smoothed if the preset says so."""
    if preset.training.label_smoothing or preset.augmentation.mixes_labels:
        return SmoothedCrossentropy(preset.training.label_smoothing, name="loss")
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
