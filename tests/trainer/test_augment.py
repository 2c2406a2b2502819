"""Augmentation: the reference chain, its switches, and when it acts."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from trainer.augment import augmentation_layers
from trainer.presets import get_preset


def _apply(images: np.ndarray, *, training: bool, **settings: Any) -> np.ndarray:
    x = images
    for layer in augmentation_layers(dataclasses.replace(get_preset("notebook"), **settings)):
        x = layer(x, training=training)
    return ops.convert_to_numpy(x)


def _images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(8, 32, 32, 3)).astype(np.float32)


def test_chain_is_the_reference_chain() -> None:
    expected = [
        keras.layers.RandomFlip("horizontal"),
        keras.layers.RandomRotation(factor=0.02),
        keras.layers.RandomZoom(height_factor=0.2, width_factor=0.2),
    ]
    chain = augmentation_layers(get_preset("notebook"))
    assert [type(layer) for layer in chain] == [type(layer) for layer in expected]
    for layer, reference in zip(chain, expected, strict=True):
        assert {**layer.get_config(), "name": None, "dtype": None} == {
            **reference.get_config(),
            "name": None,
            "dtype": None,
        }


def test_zero_or_false_turns_a_step_off() -> None:
    preset = get_preset("notebook")
    off = dataclasses.replace(preset, random_flip=False, random_rotation=0.0, random_zoom=0.0)
    assert augmentation_layers(off) == []
    names = [layer.name for layer in augmentation_layers(dataclasses.replace(off, random_zoom=0.1))]
    assert names == ["random_zoom"]


def test_inference_passes_images_through_unchanged() -> None:
    np.testing.assert_array_equal(_apply(_images(), training=False), _images())


@pytest.mark.parametrize("step", ["random_flip", "random_rotation", "random_zoom"])
def test_each_step_changes_images_in_training(step: str) -> None:
    off: dict[str, Any] = {"random_flip": False, "random_rotation": 0.0, "random_zoom": 0.0}
    del off[step]
    # 64 copies of one image: some are mirrored, and each has its own angle and scale.
    images = np.repeat(_images()[:1], 64, axis=0)
    result = _apply(images, training=True, **off)
    assert result.shape == images.shape
    assert result.dtype == np.float32
    assert len({image.tobytes() for image in result}) == (2 if step == "random_flip" else 64)


def test_flip_mirrors_left_to_right() -> None:
    image = _images()[:1]
    result = _apply(np.repeat(image, 64, axis=0), training=True, random_rotation=0, random_zoom=0)
    mirrored = [np.array_equal(row, image[0, :, ::-1]) for row in result]
    kept = [np.array_equal(row, image[0]) for row in result]
    assert sum(mirrored) + sum(kept) == 64
    assert 8 < sum(mirrored) < 56  # 64 fair coins: outside with probability < 1e-9


def test_border_is_filled_from_the_image() -> None:
    # Reflection of a flat image is flat; a border filled with a constant would show.
    flat = np.full((16, 32, 32, 3), 2.5, np.float32)
    np.testing.assert_allclose(_apply(flat, training=True), flat, rtol=1e-5)


def test_steps_keep_float32_under_mixed_precision() -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        assert _apply(_images(), training=True).dtype == np.float32
    finally:
        keras.config.set_dtype_policy(before)
