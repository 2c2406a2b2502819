"""The optimizer, its learning rate over time, and the loss of a preset."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from trainer.muon import Muon
from trainer.preset import Preset

# Of a model's variables: what no optimizer decays where a preset says `decay_matrices_only`, and
# what Muon leaves to Adam (with biases and all else of one axis).
_NOT_DECAYED = ("bias", "gamma", "beta", "embedding", "temperature")
_NOT_ORTHOGONAL = ("embedding", "logits", "score", "depthwise")


def build_optimizer(
    preset: Preset,
    *,
    steps_per_epoch: int | None,
    muon: Callable[..., Muon] = Muon,
) -> keras.optimizers.Optimizer:
    """Builds the preset's optimizer, with its learning rate's schedule and its weight decay.

    A warm-up is linear, from 0 to the preset's learning rate, and the rest of the steps cosine.
    With `train_minutes` the learning rate is a variable, which `trainer.callbacks.TimeBudget` sets.

    Args:
        preset: Whose training settings are used.
        steps_per_epoch: Optimizer steps in one epoch; with `epochs` the length of the schedule.
            None for a learning rate that is a variable, which the caller sets.
        muon: Makes the optimizer where it is Muon: the class, or one like it.

    Returns:
        A new optimizer: AdamW with Keras's defaults for everything else (β = .9 / .999, ε = 1e-7),
        or Muon.

    Raises:
        ValueError: `steps_per_epoch` is below 1.
    """
    if steps_per_epoch is not None and steps_per_epoch < 1:
        raise ValueError(
            f"steps_per_epoch is {steps_per_epoch}: there must be at least one step. "
            f"Use more training images, or a batch_size below {preset.batch_size}."
        )
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = preset.learning_rate
    is_cosine = preset.learning_rate_schedule == "cosine" and not preset.train_minutes
    if is_cosine and steps_per_epoch is not None:
        steps = preset.epochs * steps_per_epoch
        warmup = round(preset.warmup * steps)
        learning_rate = keras.optimizers.schedules.CosineDecay(
            0.0 if warmup else preset.learning_rate,
            decay_steps=steps - warmup,
            warmup_target=preset.learning_rate if warmup else None,
            warmup_steps=warmup,
        )
    options: dict[str, Any] = {
        "weight_decay": preset.weight_decay,
        "global_clipnorm": preset.gradient_clip_norm or None,
    }
    if preset.ema_momentum:
        options |= {"use_ema": True, "ema_momentum": preset.ema_momentum}
    if preset.optimizer == "muon":
        optimizer = muon(
            learning_rate,
            exclude_layers=_NOT_ORTHOGONAL,
            projections={"qkv_kernel": 3},
            orthogonalization_dtype=keras.config.dtype_policy().compute_dtype,
            ns_steps=5,
            adam_lr_ratio=0.15,
            adam_beta_2=0.98,
            **options,
        )
    else:
        optimizer = keras.optimizers.AdamW(learning_rate, **options)
    if preset.decay_matrices_only:
        optimizer.exclude_from_weight_decay(var_names=list(_NOT_DECAYED))
    return optimizer


def learning_rate_at(preset: Preset, progress: float) -> float:
    """The learning rate of a training whose length is a time.

    Args:
        preset: Whose training settings are used.
        progress: How much of the time has passed, 0 to 1.
    """
    if preset.learning_rate_schedule == "constant":
        return preset.learning_rate
    if progress < preset.warmup:
        return preset.learning_rate * progress / preset.warmup
    decayed = min(1.0, (progress - preset.warmup) / (1 - preset.warmup))
    return preset.learning_rate * (1 + math.cos(math.pi * decayed)) / 2


def learning_rates(preset: Preset, steps_per_epoch: int, epoch: int) -> np.ndarray:
    """The learning rate of each step of an epoch, as `build_optimizer`'s schedule has it.

    Args:
        preset: Whose training settings are used; its `epochs` are the schedule's length.
        steps_per_epoch: Steps of an epoch.
        epoch: Which, from 0.

    Returns:
        float32 [steps_per_epoch].
    """
    total = preset.epochs * steps_per_epoch
    preset = dataclasses.replace(preset, warmup=round(preset.warmup * total) / total)
    steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
    return np.array([learning_rate_at(preset, step / total) for step in steps], np.float32)


def compile_network(network: keras.Model, preset: Preset, *, steps_per_epoch: int) -> None:
    """Makes a network ready for `fit`; under the dtype policy that it was built under.

    Args:
        network: Of `trainer.network.model.build_model`.
        preset: Gives optimizer, loss and metrics.
        steps_per_epoch: See `build_optimizer`.

    Raises:
        ValueError: See `build_optimizer`.
    """
    network.compile(
        optimizer=build_optimizer(preset, steps_per_epoch=steps_per_epoch),
        loss=build_loss(preset),
        metrics=build_metrics(preset),
    )


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
    if preset.label_smoothing or preset.mixes_labels:
        return SmoothedCrossentropy(preset.label_smoothing, name="loss")
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build_metrics(preset: Preset) -> list[keras.metrics.Metric]:
    """Builds `top_1_accuracy` and `top_5_accuracy`, for the labels that the preset trains on."""
    if preset.mixes_labels:
        return [TopKAccuracy(1, "top_1_accuracy"), TopKAccuracy(5, "top_5_accuracy")]
    return [
        keras.metrics.SparseCategoricalAccuracy(name="top_1_accuracy"),
        keras.metrics.SparseTopKCategoricalAccuracy(k=5, name="top_5_accuracy"),
    ]
