"""What a Tuner may choose: a preset's learning rate, weight decay, depth and augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.preset import Preset, replace

LEARNING_RATE = "learning_rate"
WEIGHT_DECAY = "weight_decay"
DEPTH = "transformer_layers"
AUGMENTATION = "augmentation"

# The numbers by which a preset augments images, each with the largest value that makes sense.
AUGMENTATION_LIMITS: dict[str, float] = {
    "random_rotation": 0.5,
    "random_zoom": 0.9,
    "random_shift": 16,
    "mixup": 4.0,
    "cutmix": 4.0,
}


def scale_augmentation(preset: Preset, factor: float) -> Preset:
    """Strengthens or weakens all of a preset's augmentation together.

    Args:
      preset: The preset; what it does not use stays off.
      factor: 0 for none but the flip, 1 for the preset's own, 2 for twice as strong.

    Returns:
      The preset with each number times the factor, within its limit; whole numbers stay whole.

    Raises:
      ValueError: The factor is negative.
    """
    if not factor >= 0:
        raise ValueError(f"the factor of the augmentation is {factor}: it must be 0 or more.")
    scaled = {}
    for name, limit in AUGMENTATION_LIMITS.items():
        value = getattr(preset.augmentation, name)
        # Never below the preset's own value because of the limit.
        new = min(value * factor, max(limit, value))
        scaled[name] = round(new) if isinstance(value, int) else new
    return replace(preset, **scaled)


def is_augmented(preset: Preset) -> bool:
    """Whether there is anything that `scale_augmentation` changes."""
    return any(getattr(preset.augmentation, name) for name in AUGMENTATION_LIMITS)


def apply(preset: Preset, values: Mapping[str, Any]) -> Preset:
    """Gives a preset the hyperparameters of a trial.

    Args:
      preset: The preset.
      values: Of any of the names above.

    Raises:
      ValueError: The preset refuses a value.
    """
    fields = {name: value for name, value in values.items() if name != AUGMENTATION}
    return scale_augmentation(replace(preset, **fields), values.get(AUGMENTATION, 1.0))


def shorten(preset: Preset, fraction: float) -> Preset:
    """Makes a trial of a training.

    Args:
      preset: What is to be trained.
      fraction: How long the trial is to be, as a part of the training's length.

    Returns:
      The preset with so many minutes, or else so many epochs, rounded, at least one.
    """
    return replace(
        preset,
        epochs=max(1, round(preset.training.epochs * fraction)),
        train_minutes=preset.training.train_minutes * fraction,
    )
