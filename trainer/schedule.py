"""The optimizer of a preset."""

from __future__ import annotations

import keras

from trainer.presets import Preset


def build_optimizer(preset: Preset, *, steps_per_epoch: int) -> keras.optimizers.Optimizer:
    """Builds AdamW with the preset's learning rate, its schedule and its weight decay.

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
        learning_rate = keras.optimizers.schedules.CosineDecay(
            preset.learning_rate, decay_steps=preset.epochs * steps_per_epoch
        )
    return keras.optimizers.AdamW(learning_rate=learning_rate, weight_decay=preset.weight_decay)
