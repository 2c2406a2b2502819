"""The optimizer and the loss of a preset."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from trainer.preset import Preset


def build_optimizer(preset: Preset, *, steps_per_epoch: int) -> keras.optimizers.Optimizer:
    """Builds AdamW with the preset's learning rate, its schedule and its weight decay.

    A warm-up is linear, from 0 to the preset's learning rate, and the rest of the steps cosine.

    Args:
        preset: Whose training settings are used.
        steps_per_epoch: Optimizer steps in one epoch; with `epochs` the length of the schedule.

    Returns:
        A new optimizer with Keras's defaults for everything else (β = .9 / .999, ε = 1e-7).

    Raises:
        ValueError: `steps_per_epoch` is below 1.
    """
    if steps_per_epoch < 1:
        raise ValueError(
            f"steps_per_epoch is {steps_per_epoch}: there must be at least one step. "
            f"Use more training images, or a batch_size below {preset.batch_size}."
        )
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = preset.learning_rate
    if preset.learning_rate_schedule == "cosine":
        steps = preset.epochs * steps_per_epoch
        warmup = round(preset.warmup * steps)
        learning_rate = keras.optimizers.schedules.CosineDecay(
            0.0 if warmup else preset.learning_rate,
            decay_steps=steps - warmup,
            warmup_target=preset.learning_rate if warmup else None,
            warmup_steps=warmup,
        )
    optimizer = keras.optimizers.AdamW(
        learning_rate=learning_rate, weight_decay=preset.weight_decay
    )
    if preset.decay_matrices_only:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "embedding"])
    return optimizer


@keras.saving.register_keras_serializable(package="vit")
class SmoothedCrossentropy(keras.losses.Loss):
    """Cross-entropy of logits [B, classes] with labels [B], a share of which all classes get.

    Keras's own label smoothing needs one-hot labels; this is the same value.

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
        labels = ops.cast(ops.reshape(y_true, (-1, 1)), "int32")
        of_label = ops.take_along_axis(log_probabilities, labels, axis=1)[:, 0]
        of_all = ops.mean(log_probabilities, axis=1)
        return -(1 - self.label_smoothing) * of_label - self.label_smoothing * of_all

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "label_smoothing": self.label_smoothing}


def build_loss(preset: Preset) -> keras.losses.Loss:
    """Builds the loss: cross-entropy of the logits, smoothed if the preset says so."""
    if preset.label_smoothing:
        return SmoothedCrossentropy(preset.label_smoothing, name="loss")
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
