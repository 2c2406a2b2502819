"""The convolutional tokenizer and sequence pooling."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from trainer.conv_layers import ConvolutionalTokenizer, SequencePooling


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_tokenizer_shape_and_parameters() -> None:
    tokenizer = ConvolutionalTokenizer((32, 64, 96))
    assert tokenizer(_random(2, 32, 32, 3)).shape == (2, 64, 96)
    convolutions = 9 * (3 * 32 + 32 * 64 + 64 * 96)
    norms, positions = 2 * (32 + 64 + 96), 64 * 96
    trainable = sum(int(np.prod(w.shape)) for w in tokenizer.trainable_weights)
    assert trainable == convolutions + norms + positions


def test_tokens_are_row_by_row_and_have_their_positions() -> None:
    tokenizer = ConvolutionalTokenizer((4, 8))
    tokenizer.build((None, 6, 10, 1))
    tokenizer.positions.assign(np.arange(15 * 8).reshape(15, 8))
    # Without an image only the positions are left: no bias, ReLU(0) = 0.
    tokens = ops.convert_to_numpy(tokenizer(np.zeros((1, 6, 10, 1), np.float32)))
    np.testing.assert_allclose(tokens[0], np.arange(15 * 8).reshape(15, 8), atol=1e-5)
    tokenizer.positions.assign(np.zeros((15, 8)))
    image = np.zeros((1, 6, 10, 1), np.float32)
    image[0, 1, 9] = 5.0  # the right end of the first of three rows of tokens
    changed = np.flatnonzero(ops.convert_to_numpy(tokenizer(image))[0].any(axis=1))
    assert 4 in changed and set(changed) <= {3, 4, 8, 9}


def test_batch_statistics_are_used_in_training_only() -> None:
    tokenizer = ConvolutionalTokenizer((4,))
    images = 3.0 + _random(8, 8, 8, 3)
    first = ops.convert_to_numpy(tokenizer(images, training=False))
    trained = ops.convert_to_numpy(tokenizer(images, training=True))
    assert np.abs(first - trained).max() > 0.1


def test_pooling_weighs_tokens_by_their_score() -> None:
    pooling = SequencePooling()
    tokens = _random(2, 5, 3)
    pooling.build(tokens.shape)
    pooling.set_weights([np.array([[50.0], [0.0], [0.0]]), np.zeros(1)])
    best = tokens[np.arange(2), tokens[:, :, 0].argmax(axis=1)]
    np.testing.assert_allclose(ops.convert_to_numpy(pooling(tokens)), best, atol=1e-3)
    pooling.set_weights([np.zeros((3, 1)), np.zeros(1)])
    np.testing.assert_allclose(
        ops.convert_to_numpy(pooling(tokens)), tokens.mean(axis=1), atol=1e-6
    )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(ConvolutionalTokenizer((4, 8), name="cut"), (2, 8, 8, 3)), (SequencePooling(), (2, 4, 8))],
)
def test_config_round_trip_gives_the_same_layer(
    layer: keras.layers.Layer, shape: tuple[int, ...]
) -> None:
    x = _random(*shape)
    expected = ops.convert_to_numpy(layer(x))
    copy = keras.layers.deserialize(keras.layers.serialize(layer))
    copy.set_weights(layer.get_weights())
    np.testing.assert_allclose(ops.convert_to_numpy(copy(x)), expected, atol=1e-6)
    assert copy.compute_output_shape(shape) == expected.shape


def test_tokenizer_needs_a_width() -> None:
    with pytest.raises(ValueError, match="filters is empty"):
        ConvolutionalTokenizer(())
