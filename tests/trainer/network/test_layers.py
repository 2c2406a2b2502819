"""Layers: exact shapes, variables, configuration round trips and early errors."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from trainer.network.layers import MLP, PatchEmbedding, Patches, TransformerBlock


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _block(**changes: Any) -> TransformerBlock:
    arguments: dict[str, Any] = {
        "num_heads": 4,
        "key_dim": 64,
        "mlp_units": (128, 64),
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
    }
    return TransformerBlock(**{**arguments, **changes})


def test_patches_of_a_small_image_by_hand() -> None:
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    patches = ops.convert_to_numpy(Patches(2)(image))
    expected = [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    np.testing.assert_array_equal(patches, expected)


def test_patches_equal_extract_patches() -> None:
    images = _random(2, 12, 20, 3)
    expected = ops.reshape(ops.image.extract_patches(images, size=4), (2, 15, 48))
    np.testing.assert_array_equal(
        ops.convert_to_numpy(Patches(4)(images)), ops.convert_to_numpy(expected)
    )


def test_patches_name_the_size_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"32 x 30 pixels .* patch_size 8: choose a patch_size"):
        Patches(8)(_random(1, 32, 30, 3))
    with pytest.raises(ValueError, match="fixed size"):
        Patches(8)(keras.Input((None, None, 3)))
    with pytest.raises(ValueError, match="patch_size is 0"):
        Patches(0)


def test_patch_embedding_is_a_projection_plus_positions() -> None:
    patches = _random(2, 49, 3072)
    layer = PatchEmbedding(64)
    tokens = ops.convert_to_numpy(layer(patches))
    assert tokens.shape == (2, 49, 64)
    assert [tuple(w.shape) for w in layer.weights] == [(3072, 64), (64,), (49, 64)]
    assert layer.count_params() == 199_808
    kernel, bias, positions = layer.get_weights()
    np.testing.assert_allclose(tokens, patches @ kernel + bias + positions, atol=1e-4)


def test_patch_embedding_needs_a_fixed_number_of_patches() -> None:
    with pytest.raises(ValueError, match="fixed number of patches"):
        PatchEmbedding(64)(keras.Input((None, 3072)))
    with pytest.raises(ValueError, match="projection_dim is 0"):
        PatchEmbedding(0)


def test_block_shape_and_parameter_counts() -> None:
    block = _block()
    assert block(_random(2, 49, 64)).shape == (2, 49, 64)
    assert block.attention.count_params() == 66_368
    assert block.count_params() == 83_200
    assert len(block.trainable_weights) == len(block.weights) == 16


def test_block_refuses_an_mlp_that_does_not_fit_the_residual() -> None:
    with pytest.raises(ValueError, match=r"mlp_units is \(128, 32\).* end mlp_units with 64"):
        _block(mlp_units=(128, 32))(_random(2, 49, 64))


def test_mlp_is_dense_and_exact_gelu() -> None:
    x = _random(5, 7)
    mlp = MLP((3,), 0.5)
    y = ops.convert_to_numpy(mlp(x))
    kernel, bias = mlp.get_weights()
    gelu = ops.gelu(x @ kernel + bias, approximate=False)
    np.testing.assert_allclose(y, ops.convert_to_numpy(gelu), atol=1e-6)
    with pytest.raises(ValueError, match="hidden_units is empty"):
        MLP((), 0.5)


def test_mlp_with_a_linear_output() -> None:
    x = _random(5, 7)
    mlp = MLP((4, 3), 0.0, linear_output=True)
    y = ops.convert_to_numpy(mlp(x))
    first, bias, last, last_bias = mlp.get_weights()
    expected = ops.convert_to_numpy(ops.gelu(x @ first + bias, approximate=False))
    np.testing.assert_allclose(y, expected @ last + last_bias, atol=1e-5)


@pytest.mark.parametrize("layer", [MLP((8, 64), 0.5), _block(dropout_rate=0.5)])
def test_dropout_is_active_in_training_only(layer: keras.layers.Layer) -> None:
    x = _random(2, 4, 64)
    inference = ops.convert_to_numpy(layer(x))
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x, training=False)), inference)
    first = ops.convert_to_numpy(layer(x, training=True))
    second = ops.convert_to_numpy(layer(x, training=True))
    assert np.abs(first - inference).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Patches(4, name="cut"), (2, 8, 8, 3)),
        (PatchEmbedding(16), (2, 4, 48)),
        (MLP((32, 16), 0.25), (2, 4, 16)),
        (_block(dropout_rate=0.25, layer_norm_epsilon=1e-5), (2, 4, 64)),
    ],
)
def test_config_round_trip_gives_the_same_layer(
    layer: keras.layers.Layer, shape: tuple[int, ...]
) -> None:
    x = _random(*shape)
    expected = ops.convert_to_numpy(layer(x))
    copy = keras.layers.deserialize(keras.layers.serialize(layer))
    assert type(copy) is type(layer)
    assert copy.get_config() == layer.get_config()
    assert copy.compute_output_shape(shape) == expected.shape
    assert copy.built
    copy.set_weights(layer.get_weights())
    np.testing.assert_allclose(ops.convert_to_numpy(copy(x)), expected, atol=1e-6)
