"""Stronger augmentation for long trainings: RandAugment and random erasing, inside the model."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from trainer.preset import Preset

# Black and white, in deviations from the mean: with CIFAR's statistics pixels run from -1.9 to 2.0.
_VALUE_RANGE = (-2.1, 2.1)


def strong_augmentation_layers(preset: Preset) -> list[keras.layers.Layer]:
    """Builds what follows the chain of `trainer.augment.augmentation_layers`.

    As there, the layers map float32 images [B, H, W, C], normalized, to the same shape and dtype,
    and act in training only. What is erased becomes the mean colour, a rectangle of 2 to 33 % of
    the image (Zhong et al., "Random Erasing Data Augmentation", https://arxiv.org/abs/1708.04896).

    Args:
        preset: Whose `rand_augment_ops`, `rand_augment_magnitude` and `random_erasing` are used.

    Returns:
        The layers to apply in order; empty if all are off.
    """
    layers: list[keras.layers.Layer] = []
    if preset.rand_augment_ops:
        layers.append(
            RandAugment(
                preset.rand_augment_ops,
                preset.rand_augment_magnitude,
                dtype="float32",
                name="rand_augment",
            )
        )
    if preset.random_erasing:
        layers.append(
            keras.layers.RandomErasing(
                (preset.random_erasing, preset.random_erasing),
                fill_value=0.0,
                dtype="float32",
                name="random_erasing",
            )
        )
    return layers


@keras.saving.register_keras_serializable(package="vit")
class RandAugment(keras.layers.Layer):
    """Gives each image operations drawn at random, of random strength up to a magnitude.

    The operations are Keras's layers. `keras.layers.RandAugment` is not used: it draws one for all
    images of a batch, computes all of them for each image, and turns by up to half a turn where
    this goes to 30°. Here a batch is dealt out to the operations, in an order drawn anew for
    each round: every image gets one, and every operation as many images.

    Largest strengths, as in the paper: shears by 0.3 and shifts by 30 % of the image along both
    axes, rotation by 30°, brightness by ± 0.5 of the range, saturation, contrast and sharpness by
    ± 0.9, 4 bits for each colour; and, without a strength, full contrast and nothing at all. What
    comes in from outside is the mean colour. Two of the paper's are left out: Keras's solarization
    draws its threshold from nearly 0 on, whatever the magnitude, and XLA takes minutes to compile
    its histogram equalization.

    Source: Cubuk et al., "RandAugment", https://arxiv.org/abs/1909.13719, section 3; with the
    strengths drawn, as in Müller and Hutter, "TrivialAugment", https://arxiv.org/abs/2103.10158.

    Input and output: images [B, H, W, 3], float32, normalized; unchanged at inference.

    Args:
        num_ops: Operations for each image, one after the other.
        magnitude: Strength as a fraction of the largest, above 0 and at most 1.
        **kwargs: `keras.layers.Layer` arguments.

    Raises:
        ValueError: `num_ops` or `magnitude` is out of range.
    """

    def __init__(self, num_ops: int, magnitude: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_ops < 1 or not 0 < magnitude <= 1:
            raise ValueError(
                f"num_ops is {num_ops} and magnitude is {magnitude}: num_ops must be at least 1, "
                "magnitude above 0 and at most 1."
            )
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.order_generator = keras.random.SeedGenerator()
        self.operations = _operations(magnitude)
        # See `augmentation_layers`.
        compiles = keras.config.backend() != "tensorflow"
        for layer in (self, *self.operations):
            layer.supports_jit = layer.supports_jit or compiles
        self.supports_jit = compiles

    def build(self, input_shape: tuple[Any, ...]) -> None:
        """Builds the operations, which have no weights."""
        for operation in self.operations:
            operation.build(input_shape)
        self.built = True

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Transforms images [B, H, W, 3], each its own way."""
        if not training:
            return images
        for _ in range(self.num_ops):
            images = self._deal(images)
        return images

    def _deal(self, images: Any) -> Any:
        batch, shares = ops.shape(images)[0], len(self.operations) + 1
        # As many places for each share, the fewest that hold the batch; the few left over are
        # filled with images once more, whose results nobody takes.
        share = (batch + shares - 1) // shares
        order = keras.random.shuffle(ops.arange(shares * share), seed=self.order_generator)
        dealt = ops.take(images, order % batch, axis=0)
        parts = [
            operation(dealt[index * share : (index + 1) * share], training=True)
            for index, operation in enumerate(self.operations)
        ]
        parts.append(dealt[(shares - 1) * share :])  # left as they are
        return ops.take(ops.concatenate(parts), ops.argsort(order)[:batch], axis=0)

    def compute_output_shape(self, input_shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "num_ops": self.num_ops, "magnitude": self.magnitude}


def _operations(magnitude: float) -> list[keras.layers.Layer]:
    moved: dict[str, Any] = {"fill_mode": "constant", "dtype": "float32"}
    seen: dict[str, Any] = {"value_range": _VALUE_RANGE, "dtype": "float32"}
    return [
        keras.layers.RandomShear(0.3 * magnitude, 0.3 * magnitude, **moved),
        keras.layers.RandomTranslation(0.3 * magnitude, 0.3 * magnitude, **moved),
        keras.layers.RandomRotation(magnitude / 12, **moved),
        keras.layers.RandomBrightness(0.5 * magnitude, **seen),
        keras.layers.RandomColorDegeneration((-0.9 * magnitude, 0.9 * magnitude), **seen),
        keras.layers.RandomContrast(0.9 * magnitude, **seen),
        # Here 0 is a blurred image, 1/2 the image itself and 1 a sharpened one.
        keras.layers.RandomSharpness((0.5 - 0.45 * magnitude, 0.5 + 0.45 * magnitude), **seen),
        keras.layers.RandomPosterization((round(8 - 4 * magnitude), 8), **seen),
        keras.layers.AutoContrast(**seen),
    ]
