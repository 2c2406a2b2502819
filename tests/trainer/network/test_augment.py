"""Augmentation: the reference chain, its switches, and when it acts."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from trainer.network.augment import RandomErasing, RandomProjection, augmentation_layers
from trainer.preset import replace
from trainer.presets import get_preset


def _apply(images: np.ndarray, *, training: bool, **settings: Any) -> np.ndarray:
    x = images
    for layer in augmentation_layers(replace(get_preset("notebook"), **settings).augmentation):
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
    chain = augmentation_layers(get_preset("notebook").augmentation)
    assert [type(layer) for layer in chain] == [type(layer) for layer in expected]
    for layer, reference in zip(chain, expected, strict=True):
        assert {**layer.get_config(), "name": None, "dtype": None} == {
            **reference.get_config(),
            "name": None,
            "dtype": None,
        }


def test_zero_or_false_turns_a_step_off() -> None:
    preset = get_preset("notebook")
    off = replace(preset, random_flip=False, random_rotation=0.0, random_zoom=0.0)
    assert augmentation_layers(off.augmentation) == []
    zoom = augmentation_layers(replace(off, random_zoom=0.1).augmentation)
    assert [layer.name for layer in zoom] == ["random_zoom"]


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


def test_shift_is_by_whole_pixels_up_to_the_limit() -> None:
    # The place of one bright pixel tells the shift.
    image = np.zeros((2000, 32, 32, 3), np.float32)
    image[:, 15, 15] = 1.0
    result = _apply(
        image,
        training=True,
        image_size=32,
        random_flip=False,
        random_rotation=0.0,
        random_zoom=0.0,
        random_shift=2,
    )
    assert set(np.unique(result)) == {0.0, 1.0}
    where = np.argwhere(result[..., 0] == 1.0)[:, 1:] - 15
    assert len(where) == 2000
    for axis in (0, 1):
        counts = np.bincount(where[:, axis] + 2, minlength=5)
        assert len(counts) == 5 and counts.min() > 320  # of 400 each, 4.5 deviations


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


def _with_the_seeds_of(projection: RandomProjection, chain: list[Any]) -> None:
    """Makes a projection draw what a chain of Keras's layers will draw."""
    ours = [v for v in projection.variables if "seed_generator" in v.path]
    theirs = [v for layer in chain for v in layer.variables if "seed_generator" in v.path]
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs):
        mine.assign(other)


def _chain_and_projection() -> tuple[list[Any], RandomProjection]:
    (projection,) = augmentation_layers(get_preset("notebook").augmentation, in_one=True)
    assert isinstance(projection, RandomProjection)
    return augmentation_layers(get_preset("notebook").augmentation), projection


def _train(layers: list[Any], images: Any) -> np.ndarray:
    for layer in layers:
        images = layer(images, training=True)
    return ops.convert_to_numpy(images)


@pytest.mark.parametrize("size", [32, 224])
def test_projection_maps_pixels_where_the_chain_does(size: int) -> None:
    # An image whose values are its pixels' coordinates shows where each came from: bilinear
    # resampling of a ramp is exact, once as well as three times.
    y, x = np.mgrid[:size, :size].astype(np.float32)
    ramp = np.repeat(np.stack([x, y], axis=-1)[None], 64, axis=0)
    chain, projection = _chain_and_projection()
    _with_the_seeds_of(projection, chain)
    expected, actual = _train(chain, ramp), _train([projection], ramp)
    # Not what came by reflection at the border, which the chain does up to twice.
    inside = np.all((expected > 0.2 * size) & (expected < 0.8 * size), axis=-1)
    assert inside.mean() > 0.25
    np.testing.assert_allclose(actual[inside], expected[inside], atol=1e-3 * size / 32)


def test_projection_of_small_images_is_that_of_resized_ones() -> None:
    # What the fast model does, projection then resize, against the reference's resize then chain.
    low = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype(np.float32)
    images = ops.convert_to_numpy(ops.image.resize(low, (32, 32), interpolation="bicubic"))
    chain, projection = _chain_and_projection()
    _with_the_seeds_of(projection, chain)
    expected = _train(chain, ops.image.resize(images, (224, 224)))
    actual = ops.convert_to_numpy(ops.image.resize(_train([projection], images), (224, 224)))
    error = np.sqrt(np.mean((actual - expected) ** 2)) / expected.std()
    unmatched = np.sqrt(np.mean((np.roll(actual, 1, axis=0) - expected) ** 2)) / expected.std()
    assert error < 0.1 < 1 < unmatched


def test_projection_draws_the_chains_distribution() -> None:
    _, projection = _chain_and_projection()
    a, b, _, c, d, *_ = ops.convert_to_numpy(projection.random_transforms(20_000, 32, 32)).T
    # a, b, c, d are mirror·cos·zoom_x, -mirror·sin·zoom_y, sin·zoom_x and cos·zoom_y.
    mirror, turn = np.sign(a), np.arctan2(c, np.abs(a)) / (2 * np.pi)
    zoom_x, zoom_y = np.hypot(a, c), np.hypot(b, d)
    assert abs(mirror.mean()) < 0.03
    for drawn, low, high in ((turn, -0.02, 0.02), (zoom_x, 0.8, 1.2), (zoom_y, 0.8, 1.2)):
        share = np.sort((drawn - low) / (high - low))
        # Kolmogorov and Smirnov's distance from the uniform distribution; 2 / √n: p < 0.001.
        assert np.abs(share - np.linspace(0, 1, len(share))).max() < 2 / np.sqrt(len(share))
    for first, second in ((mirror, turn), (turn, zoom_x), (zoom_x, zoom_y), (mirror, zoom_y)):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


def test_projection_acts_in_training_only_and_survives_its_configuration() -> None:
    _, projection = _chain_and_projection()
    np.testing.assert_array_equal(projection(_images(), training=False), _images())
    copy = keras.layers.deserialize(keras.layers.serialize(projection))
    assert copy.get_config() == projection.get_config()
    still = RandomProjection(False, 0.0, 0.0)
    np.testing.assert_allclose(_train([still], _images()), _images(), atol=1e-6)
    assert still.variables == []


def test_erasing_sets_a_rectangle_of_some_images_to_zero() -> None:
    images = np.ones((400, 24, 40, 3), np.float32)
    layer = RandomErasing(0.5)
    np.testing.assert_array_equal(layer(images, training=False), images)
    erased = ops.convert_to_numpy(layer(images, training=True)) == 0.0
    assert (erased == erased[..., :1]).all()  # all channels alike
    touched = erased.any(axis=(1, 2, 3))
    assert 0.4 < touched.mean() < 0.6
    for mask in erased[touched][..., 0]:
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        np.testing.assert_array_equal(mask, np.outer(rows, columns))  # a rectangle
        assert mask.mean() < 0.4
    assert len({mask.tobytes() for mask in erased[touched]}) > 100
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert again.probability == 0.5
