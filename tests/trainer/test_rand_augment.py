"""RandAugment and random erasing: what they do to images, and when."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from trainer.presets import get_preset
from trainer.rand_augment import RandAugment, strong_augmentation_layers


def _images(count: int) -> np.ndarray:
    """Smooth images within black and white."""
    low = np.random.default_rng(0).uniform(-1.8, 1.8, size=(count, 5, 5, 3)).astype(np.float32)
    return ops.convert_to_numpy(ops.image.resize(low, (32, 32)))


def _apply(layer: keras.layers.Layer, images: np.ndarray) -> np.ndarray:
    return ops.convert_to_numpy(layer(images, training=True))


def test_layers_are_those_that_the_preset_turns_on() -> None:
    preset = get_preset("compact")
    assert strong_augmentation_layers(preset) == []
    preset = dataclasses.replace(
        preset, rand_augment_ops=2, rand_augment_magnitude=0.5, random_erasing=0.25
    )
    first, second = strong_augmentation_layers(preset)
    assert (first.num_ops, first.magnitude) == (2, 0.5)
    assert (second.factor, second.fill_value) == ((0.25, 0.25), 0.0)
    images = _images(2)
    for layer in (first, second):
        np.testing.assert_array_equal(layer(images, training=False), images)


@pytest.mark.parametrize("count", [1, 7, 40])
def test_every_image_gets_one_operation_and_stays_in_its_place(count: int) -> None:
    images = _images(count)
    result = _apply(RandAugment(1, 0.2), images)
    assert result.shape == images.shape and result.dtype == np.float32
    assert np.abs(result).max() <= 2.11  # black and white
    # Weak operations: a result is far more like its own image than like another's.
    distance = ((result[:, None] - images) ** 2).mean(axis=(2, 3, 4))
    assert (distance.argmin(axis=1) == np.arange(count)).all()


def test_operations_get_as_many_images_each() -> None:
    images = np.repeat(_images(1), 200, axis=0)
    layer = RandAugment(1, 1.0)
    result = _apply(layer, images)
    unchanged = np.abs(result - images).max(axis=(1, 2, 3)) < 1e-6
    assert len(layer.operations) == 9
    assert unchanged.sum() >= 20  # a tenth of them; more where a strength is drawn as 0
    assert unchanged.sum() < 40
    moved_again = _apply(layer, images)
    unchanged_again = np.abs(moved_again - images).max(axis=(1, 2, 3)) < 1e-6
    assert (unchanged != unchanged_again).any()


def test_each_operation_changes_images_and_none_leaves_the_range() -> None:
    images = _images(16)
    for operation in RandAugment(1, 1.0).operations:
        result = _apply(operation, images)
        assert np.isfinite(result).all() and np.abs(result).max() <= 2.11, operation.name
        assert np.abs(result - images).mean() > 0.01, operation.name


def test_magnitude_is_that_of_the_change() -> None:
    images = _images(400)
    weak, strong = (
        np.abs(_apply(RandAugment(1, magnitude), images) - images).mean(axis=(1, 2, 3))
        for magnitude in (0.1, 1.0)
    )
    assert np.median(strong) > 3 * np.median(weak)


def test_erasing_takes_rectangles_out_of_a_share_of_the_images() -> None:
    preset = dataclasses.replace(get_preset("compact"), random_erasing=0.25)
    (layer,) = strong_augmentation_layers(preset)
    result = _apply(layer, np.ones((2000, 32, 32, 3), np.float32))
    assert set(np.unique(result)) == {0.0, 1.0}
    erased = result[..., 0] == 0
    share = erased.any(axis=(1, 2)).mean()
    assert 0.2 < share < 0.3  # 0.25, five deviations
    for mask in erased[erased.any(axis=(1, 2))][:50]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert mask.sum() == len(rows) * len(columns)
        assert np.ptp(rows) == len(rows) - 1 and np.ptp(columns) == len(columns) - 1
        assert 0.01 < mask.mean() < 0.36


def test_configuration_round_trip_and_refusal() -> None:
    copy = keras.layers.deserialize(keras.layers.serialize(RandAugment(2, 0.3, name="strong")))
    assert (copy.num_ops, copy.magnitude, copy.name) == (2, 0.3, "strong")
    with pytest.raises(ValueError, match=r"num_ops is 0 and magnitude is 0\.5"):
        RandAugment(0, 0.5)
    with pytest.raises(ValueError, match=r"magnitude is 1\.5"):
        RandAugment(1, 1.5)
