"""Networks for tests to which the size of images and the number of classes do not matter."""

from __future__ import annotations

from typing import Any

import keras

from trainer.network import model
from trainer.preset import Preset


def build_model(
    preset: Preset,
    num_classes: int = 100,
    input_shape: tuple[int, ...] = (32, 32, 3),
    **options: Any,
) -> keras.Model:
    """`trainer.network.model.build_model` with the size and the classes of CIFAR-100."""
    return model.build_model(preset, input_shape, num_classes, **options)
