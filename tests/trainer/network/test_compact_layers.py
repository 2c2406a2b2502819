"""The layers of the `compact` preset."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from trainer.network.compact_layers import (
    BatchNormBlock,
    ConvolutionalTokenizer,
    FusedBatchNormalization,
    NormalizedConvolution,
    SequencePooling,
)


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_tokenizer_shape_and_parameters() -> None:
    tokenizer = ConvolutionalTokenizer((32, 64, 96))
    assert tokenizer(_random(2, 32, 32, 3)).shape == (2, 64, 96)
    convolutions = 9 * (3 * 32 + 32 * 64 + 64 * 96)
    norms, positions = 2 * (32 + 64 + 96), 64 * 96
    trainable = sum(int(np.prod(w.shape)) for w in tokenizer.trainable_weights)
    assert trainable == convolutions + norms + positions


@pytest.mark.parametrize("shape", [(16, 4, 6, 5), (16, 9, 5)])
def test_fused_normalization_equals_keras(shape: tuple[int, ...]) -> None:
    fused, reference = FusedBatchNormalization(), keras.layers.BatchNormalization(epsilon=1e-5)
    x = 2.0 + 3.0 * _random(*shape)
    for layer in (fused, reference):
        layer.momentum = 0.5
        layer.build(shape)
        layer.gamma.assign(1.0 + _random(5))
        layer.beta.assign(_random(5))
    for training in (True, False):
        actual, expected = (
            ops.convert_to_numpy(layer(x, training=training)) for layer in (fused, reference)
        )
        assert actual.shape == shape
        np.testing.assert_allclose(actual, expected, atol=1e-4 if training else 5e-2)
    # Of n values, TensorFlow's variance is that of all that could be drawn: n / (n - 1) as large.
    n = x.size // 5
    moving, theirs = (ops.convert_to_numpy(layer.moving_variance) for layer in (fused, reference))
    factor = n / (n - 1) if keras.config.backend() == "tensorflow" else 1.0
    np.testing.assert_allclose(moving - 0.5, (theirs - 0.5) * factor, rtol=1e-4)
    np.testing.assert_allclose(fused.moving_mean, reference.moving_mean, atol=1e-5)
    scale, shift = fused.folded()
    np.testing.assert_allclose(x * scale + shift, actual, atol=1e-4)


def test_fused_normalization_keeps_half_precision_and_its_own_variables() -> None:
    layer = FusedBatchNormalization(dtype="mixed_bfloat16")
    y = layer(ops.cast(_random(8, 4, 4, 3), "bfloat16"), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert {str(w.dtype) for w in layer.weights} == {"float32"}
    before = ops.convert_to_numpy(layer.moving_mean)
    layer.trainable = False
    layer(_random(8, 4, 4, 3) + 9.0, training=True)
    np.testing.assert_array_equal(layer.moving_mean, before)


def test_residual_pairs_add_to_what_they_get() -> None:
    tokenizer = ConvolutionalTokenizer((4, 8), residual_pairs=(1, 0))
    images = _random(2, 8, 8, 3)
    tokenizer.build(images.shape)
    assert [len(stage) for stage in tokenizer.stages] == [3, 1]
    # Without their scale a pair adds nothing.
    last = tokenizer.stages[0][2].norm
    last.gamma.assign(np.zeros(4))
    plain = ConvolutionalTokenizer((4, 8))
    plain.build(images.shape)
    weights = [*tokenizer.stages[0][0].get_weights(), *tokenizer.stages[1][0].get_weights()]
    for layer, values in zip(
        (plain.stages[0][0], plain.stages[1][0]), (weights[:5], weights[5:]), strict=True
    ):
        layer.set_weights(values)
    plain.positions.assign(tokenizer.positions)
    np.testing.assert_allclose(
        ops.convert_to_numpy(tokenizer(images)), ops.convert_to_numpy(plain(images)), atol=1e-5
    )
    last.beta.assign(np.ones(4))
    assert np.abs(ops.convert_to_numpy(tokenizer(images) - plain(images))).max() > 0.1


def test_block_is_a_transformer_block_with_other_norms() -> None:
    """With normalizations that do nothing to normalized tokens, against Keras's attention."""
    heads, key_dim, width = 2, 3, 8
    block = BatchNormBlock(heads, key_dim, mlp_dim=16)
    x = _random(4, 5, width)
    block.build(x.shape)
    reference = keras.layers.MultiHeadAttention(heads, key_dim, use_bias=False)
    reference.build(x.shape, x.shape)
    kernel = ops.convert_to_numpy(block.qkv_kernel)
    parts = [part.reshape(width, heads, key_dim) for part in np.split(kernel, 3, axis=1)]
    output = ops.convert_to_numpy(block.output_kernel).reshape(heads, key_dim, width)
    reference.query_dense.kernel.assign(parts[0])
    reference.key_dense.kernel.assign(parts[1])
    reference.value_dense.kernel.assign(parts[2])
    reference.output_dense.kernel.assign(output)
    y = x + ops.convert_to_numpy(reference(x, x))
    bias = _random(16)
    block.mlp_bias.assign(bias)
    hidden = np.maximum(y @ ops.convert_to_numpy(block.mlp_kernel) + bias, 0)
    expected = y + hidden @ ops.convert_to_numpy(block.mlp_output_kernel)
    np.testing.assert_allclose(ops.convert_to_numpy(block(x)), expected, atol=1e-4)


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
    [
        (ConvolutionalTokenizer((4, 8), (1, 0), name="cut"), (2, 8, 8, 3)),
        (NormalizedConvolution(4, strides=2), (2, 8, 8, 3)),
        (FusedBatchNormalization(momentum=0.5), (2, 8, 8, 3)),
        (BatchNormBlock(2, 4, 16), (2, 4, 8)),
        (SequencePooling(), (2, 4, 8)),
    ],
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
    with pytest.raises(ValueError, match=r"residual_pairs is \(1,\).*filters, which is \(4, 8\)"):
        ConvolutionalTokenizer((4, 8), (1,))
