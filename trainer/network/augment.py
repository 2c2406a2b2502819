"""Training-time augmentation, as layers inside the model."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from trainer.network.layers import training_only
from trainer.preset import Augmentation


def augmentation_layers(
    augmentation: Augmentation, *, in_one: bool = False
) -> list[keras.layers.Layer]:
    """Builds the augmentation chain of the keras.io example, and what there is besides.

    The layers map float32 images [B, H, W, C] to the same shape and dtype, each image with its own
    random draw. They act in training only and pass images through unchanged at inference. Pixels
    that a rotation or zoom brings in from outside are filled by reflection, in-between values are
    bilinear (Keras's defaults, which the example uses).

    Rotation and zoom say that they cannot be compiled by XLA, because TensorFlow's
    `ImageProjectiveTransformV3` cannot; Keras then leaves the whole model uncompiled. With
    TensorFlow that is an ordinary graph. With JAX it would be op-by-op execution, without need:
    there they are plain `jax.numpy` and compile, so the flag is corrected.

    Args:
        augmentation: What to do; what mixes images is not a layer.
        in_one: Flip, rotate and zoom by one resampling.

    Returns:
        The layers to apply in order; empty if all are off.
    """
    flip, rotation = augmentation.random_flip, augmentation.random_rotation
    zoom, layers = augmentation.random_zoom, []
    # float32 whatever the policy: images are small numbers resampled three times, and rounding
    # them to half precision first would cost more accuracy than the speed is worth.
    options: dict[str, Any] = {"dtype": "float32"}
    if in_one and (flip or rotation or zoom):
        layers.append(RandomProjection(flip, rotation, zoom, name="augmentation", **options))
    elif not in_one:
        if flip:
            layers.append(keras.layers.RandomFlip("horizontal", name="random_flip", **options))
        if rotation:
            layers.append(keras.layers.RandomRotation(rotation, name="random_rotation", **options))
        if zoom:
            layers.append(keras.layers.RandomZoom(zoom, zoom, name="random_zoom", **options))
    if augmentation.random_shift:
        layers.append(RandomShift(augmentation.random_shift, name="random_shift", **options))
    if augmentation.random_erasing:
        layers.append(RandomErasing(augmentation.random_erasing, name="random_erasing", **options))
    if keras.config.backend() == "jax":
        for layer in layers:
            layer.supports_jit = True
    return [training_only(layer) for layer in layers]


@training_only
@keras.saving.register_keras_serializable(package="vit")
class RandomShift(keras.layers.Layer):
    """Moves each image by whole pixels, what comes in being reflected: a crop of the padded image.

    One look-up of pixels; Keras's `RandomTranslation` interpolates, and its `RandomCrop` draws once
    for the whole batch. Input and output: images [B, height, width, C] of the compute dtype;
    unchanged at inference.

    Args:
        shift: Largest movement along each axis, in pixels; below the images' size.
        **kwargs: `keras.layers.Layer` arguments.
    """

    def __init__(self, shift: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shift = shift
        self.generator = keras.random.SeedGenerator()

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Moves images [B, height, width, C], each its own way."""
        if not training:
            return images
        batch, (height, width, channels) = ops.shape(images)[0], images.shape[1:]
        rows = self._reflected(batch, height) * width  # (B, height)
        columns = self._reflected(batch, width)  # (B, width)
        first = ops.arange(batch, dtype="int32")[:, None, None] * (height * width)
        pixels = first + rows[:, :, None] + columns[:, None, :]  # (B, height, width)
        return ops.take(ops.reshape(images, (-1, channels)), pixels, axis=0)

    def _reflected(self, batch: Any, size: int) -> Any:
        """Positions along an axis that each image takes its pixels from, int32 [batch, size]."""
        moved = keras.random.randint(
            (batch, 1), -self.shift, self.shift + 1, seed=self.generator
        ) + ops.arange(size, dtype="int32")
        return (size - 1) - ops.abs((size - 1) - ops.abs(moved))

    def compute_output_shape(self, input_shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "shift": self.shift}


@training_only
@keras.saving.register_keras_serializable(package="vit")
class RandomErasing(keras.layers.Layer):
    """Sets a rectangle of an image to 0, the mean of normalized pixels.

    Its area is 2 to 33 % of the image's, its sides' ratio 0.3 to 3.3, as far as it is in the image.
    Input and output: images [B, height, width, C] of the compute dtype; unchanged at inference.

    Source: Zhong et al., "Random Erasing Data Augmentation", https://arxiv.org/abs/1708.04896.

    Args:
        probability: With which an image has one.
        **kwargs: `keras.layers.Layer` arguments.
    """

    def __init__(self, probability: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.probability = probability
        self.generator = keras.random.SeedGenerator()

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Erases from images [B, height, width, C], each its own rectangle."""
        if not training:
            return images
        draws = keras.random.uniform((5, ops.shape(images)[0], 1), seed=self.generator)
        coin, area, ratio, *centres = ops.unstack(draws, axis=0)  # (B, 1) each
        side = ops.sqrt(0.02 + 0.31 * area) / 2  # of the image's, from the centre
        stretch = ops.exp((2 * ratio - 1) * math.log(3.3) / 2)
        inside = []
        reaches = side * stretch, side / stretch
        for size, centre, reach in zip(images.shape[1:3], centres, reaches):
            at = (ops.arange(size, dtype="float32") + 0.5) / size
            inside.append(ops.abs(at - centre) < reach)  # (B, size)
        erased = ops.logical_and(inside[0][:, :, None], inside[1][:, None, :])  # (B, H, W)
        erased = ops.logical_and(erased, coin[:, :, None] < self.probability)
        return ops.where(erased[..., None], ops.zeros_like(images), images)

    def compute_output_shape(self, input_shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "probability": self.probability}


@training_only
@keras.saving.register_keras_serializable(package="vit")
class RandomProjection(keras.layers.Layer):
    """The chain of `augmentation_layers` as one resampling of the image.

    Flip, rotation and zoom are affine maps of the plane, and so is what they make together. The
    chain resamples three times, and in the `notebook` preset after the resize to 224 x 224; this
    resamples once, before it. Each image's map is drawn as the chain's layers draw theirs, in the
    same order and from as many generators, so with the same seeds it is the same map.

    Input and output: images [B, height, width, C] of the compute dtype; unchanged at inference.

    Args:
        flip: See `Augmentation.random_flip`.
        rotation: See `Augmentation.random_rotation`.
        zoom: See `Augmentation.random_zoom`.
        **kwargs: `keras.layers.Layer` arguments.
    """

    def __init__(self, flip: bool, rotation: float, zoom: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flip = flip
        self.rotation = rotation
        self.zoom = zoom
        for step in ("flip", "rotation", "zoom"):
            if getattr(self, step):
                setattr(self, f"{step}_generator", keras.random.SeedGenerator())
        # See `augmentation_layers`.
        self.supports_jit = keras.config.backend() != "tensorflow"

    def random_transforms(self, batch: Any, height: int, width: int) -> Any:
        """Draws a map for each image.

        Args:
            batch: Number of images.
            height: Of the images, in pixels.
            width: Of the images, in pixels.

        Returns:
            float32 [batch, 8] for `keras.ops.image.affine_transform`: from a pixel of the output to
            where its value is taken from.
        """
        one, zero = ops.ones((batch,)), ops.zeros((batch,))
        mirror, angle, zoom_x, zoom_y = one, zero, one, one
        if self.flip:
            draw = keras.random.uniform((batch,), seed=self.flip_generator)
            mirror = ops.where(draw <= 0.5, -one, one)
        if self.rotation:
            limit = 2 * math.pi * self.rotation
            angle = keras.random.uniform((batch,), -limit, limit, seed=self.rotation_generator)
        if self.zoom:
            low, high = 1 - self.zoom, 1 + self.zoom
            zoom_y = keras.random.uniform((batch,), low, high, seed=self.zoom_generator)
            zoom_x = keras.random.uniform((batch,), low, high, seed=self.zoom_generator)
        # Around the centre of the image; the chain's order is flip, rotation, zoom, and a map from
        # output to input takes them backwards. y points down, as in images.
        cos, sin = ops.cos(angle), ops.sin(angle)
        a, b = mirror * cos * zoom_x, mirror * -sin * zoom_y
        c, d = sin * zoom_x, cos * zoom_y
        x, y = (width - 1) / 2, (height - 1) / 2
        shift_x, shift_y = x - a * x - b * y, y - c * x - d * y
        return ops.stack([a, b, shift_x, c, d, shift_y, zero, zero], axis=1)

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Transforms images [B, height, width, C], each its own way."""
        if not training:
            return images
        batch, height, width = ops.shape(images)[0], images.shape[1], images.shape[2]
        return ops.image.affine_transform(
            images,
            self.random_transforms(batch, height, width),
            interpolation="bilinear",
            fill_mode="reflect",
        )

    def compute_output_shape(self, input_shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "flip": self.flip,
            "rotation": self.rotation,
            "zoom": self.zoom,
        }
