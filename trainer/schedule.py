"""The learning rate, as a function of how much of a training is done."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from trainer.preset import Training


def learning_rate_at(training: Training, progress: Any, xp: Any = np) -> Any:
    """The one curve of the learning rate: a linear warm-up from 0 to the peak, then half a cosine.

    Args:
        training: Gives peak, kind of schedule and warm-up.
        progress: How much of the training's steps or time is done, 0 to 1: a number or an array.
        xp: What computes it, `numpy` or `keras.ops`.

    Returns:
        The learning rate, of the progress's shape.
    """
    if training.learning_rate_schedule == "constant":
        return training.learning_rate * xp.ones_like(progress)
    warmup = training.warmup
    falling = xp.clip((progress - warmup) / (1 - warmup), 0.0, 1.0)
    curve = (1 + xp.cos(math.pi * falling)) / 2
    if warmup:
        curve = xp.where(progress < warmup, progress / warmup, curve)
    return training.learning_rate * curve


def learning_rates(training: Training, steps_per_epoch: int, epoch: int) -> np.ndarray:
    """The learning rate of each step of an epoch, where the training's length is `epochs`.

    Args:
        training: See `learning_rate_at`.
        steps_per_epoch: Steps of an epoch.
        epoch: Which, from 0.

    Returns:
        float32 [steps_per_epoch].
    """
    total = training.epochs * steps_per_epoch
    steps = np.arange(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
    rates: np.ndarray = learning_rate_at(_in_whole_steps(training, total), steps / total)
    return rates.astype(np.float32)


@keras.saving.register_keras_serializable(package="vit")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """`learning_rate_at` for an optimizer that counts steps.

    Args:
        training: See `learning_rate_at`; or its fields.
        steps: Of the whole training.
    """

    def __init__(self, training: Training | Mapping[str, Any], steps: int) -> None:
        super().__init__()
        if isinstance(training, Mapping):
            training = Training(**training)
        self._training, self._steps = training, steps
        self._curve = _in_whole_steps(training, steps)

    def __call__(self, step: Any) -> Any:
        """Returns the learning rate of a step, a scalar."""
        return learning_rate_at(self._curve, ops.cast(step, "float32") / self._steps, ops)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"training": dataclasses.asdict(self._training), "steps": self._steps}


def _in_whole_steps(training: Training, steps: int) -> Training:
    """The same with a warm-up that ends with a step."""
    return dataclasses.replace(training, warmup=round(training.warmup * steps) / steps)
