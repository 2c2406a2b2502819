"""Training-time augmentation, as layers inside the model."""

from __future__ import annotations

import keras

from trainer.presets import Preset


def augmentation_layers(preset: Preset) -> list[keras.layers.Layer]:
    """Builds the augmentation chain of the keras.io example from a preset's settings.

    The layers map float32 images [B, H, W, C] to the same shape and dtype, each image with its own
    random draw. They act in training only and pass images through unchanged at inference. Pixels
    that a rotation or zoom brings in from outside are filled by reflection, in-between values are
    bilinear (Keras's defaults, which the example uses).

    Rotation and zoom say that they cannot be compiled by XLA, because TensorFlow's
    `ImageProjectiveTransformV3` cannot; Keras then leaves the whole model uncompiled. With
    TensorFlow that is an ordinary graph. With JAX it would be op-by-op execution, without need:
    there they are plain `jax.numpy` and compile, so the flag is corrected.

    Args:
        preset: Whose `random_flip`, `random_rotation` and `random_zoom` are used.

    Returns:
        The layers to apply in order; empty if all three are off.
    """
    # float32 whatever the policy: images are small numbers resampled three times, and rounding
    # them to half precision first would cost more accuracy than the speed is worth.
    layers: list[keras.layers.Layer] = []
    if preset.random_flip:
        layers.append(keras.layers.RandomFlip("horizontal", dtype="float32", name="random_flip"))
    if preset.random_rotation:
        layers.append(
            keras.layers.RandomRotation(
                preset.random_rotation, dtype="float32", name="random_rotation"
            )
        )
    if preset.random_zoom:
        layers.append(
            keras.layers.RandomZoom(
                preset.random_zoom, preset.random_zoom, dtype="float32", name="random_zoom"
            )
        )
    if keras.config.backend() == "jax":
        for layer in layers:
            layer.supports_jit = True
    return layers
