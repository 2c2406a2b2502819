"""Muon: orthogonal updates of whatever is a matrix, Adam for the rest."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from trainer.muon import Muon


def _variable(name: str, shape: tuple[int, ...]) -> keras.Variable:
    return keras.Variable(np.zeros(shape, np.float32), name=name)


def _update(variable: keras.Variable, gradient: np.ndarray, **options) -> np.ndarray:
    """What one step adds to the variable, per unit of the learning rate."""
    optimizer = Muon(0.5, weight_decay=None, **options)
    optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
    return -ops.convert_to_numpy(variable) / 0.5


def _gradient(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((24, 16), (24, 16)),
        ((16, 64), (16, 64)),
        ((3, 3, 4, 8), (36, 8)),  # a convolution
        ((8, 2, 4), (8, 8)),  # of an attention: to the heads
    ],
)
def test_updates_are_close_to_orthogonal(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    update = _update(_variable("kernel", shape), _gradient(*shape)).reshape(matrix)
    singular = np.linalg.svd(update, compute_uv=False)
    wide = max(1.0, matrix[1] / matrix[0]) ** 0.5
    # The iteration stops early, at values around 1 (see the source).
    assert singular.min() > 0.6 * wide and singular.max() < 1.25 * wide
    left, _, right = np.linalg.svd(_gradient(*shape).reshape(matrix), full_matrices=False)
    np.testing.assert_allclose(update / wide, left @ right, atol=0.25)


def test_half_precision_is_enough() -> None:
    gradient = 1e-6 * _gradient(24, 16)
    exact, rounded = (
        _update(_variable("kernel", (24, 16)), gradient, orthogonalization_dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(rounded, exact, atol=0.05)
    assert np.abs(rounded - exact).max() > 0


def test_projections_side_by_side_are_orthogonal_each() -> None:
    gradient = _gradient(16, 3 * 8)
    together = _update(_variable("qkv_kernel", (16, 24)), gradient, projections={"qkv": 3})
    for part, own in zip(np.split(together, 3, axis=1), np.split(gradient, 3, axis=1)):
        alone = _update(_variable("kernel", (16, 8)), own)
        np.testing.assert_allclose(part, alone, atol=1e-5)
    assert np.abs(together - _update(_variable("kernel", (16, 24)), gradient)).max() > 0.05


@pytest.mark.parametrize(
    ("name", "shape"), [("bias", (8,)), ("position_embedding", (4, 8)), ("logits_kernel", (8, 8))]
)
def test_the_rest_is_adams(name: str, shape: tuple[int, ...]) -> None:
    gradient = _gradient(*shape)
    actual = _update(
        _variable(name, shape),
        gradient,
        exclude_layers=["embedding", "logits"],
        adam_lr_ratio=0.1,
        adam_beta_2=0.98,
    )
    reference = _variable("reference", shape)
    adam = keras.optimizers.Adam(0.05, beta_1=0.9, beta_2=0.98)
    adam.apply([ops.convert_to_tensor(gradient)], [reference])
    np.testing.assert_allclose(actual, -ops.convert_to_numpy(reference) / 0.5, atol=1e-5)


def test_learns_by_fit_and_survives_its_configuration() -> None:
    keras.utils.set_random_seed(0)
    x = _gradient(256, 8)
    y = np.argmax(x[:, :4], axis=1)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(32, "relu")])
    model.add(keras.layers.Dense(4, name="logits"))
    optimizer = Muon(0.05, exclude_layers=["logits"], projections={"qkv": 3}, ns_steps=4)
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert isinstance(copy, Muon) and copy.get_config() == optimizer.get_config()
    model.compile(
        copy, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    history = model.fit(x, y, batch_size=32, epochs=12, verbose=0).history
    assert history["accuracy"][-1] > 0.9 > history["accuracy"][0]
