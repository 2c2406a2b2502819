"""The fast layers compute what the plain ones do, forward and backward, from the same weights."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from trainer.network.fast_layers import (
    FastDropout,
    FoldedPatchEmbedding,
    FusedTransformerBlock,
    patch_windows,
    resize_matrix,
)
from trainer.network.layers import PatchEmbedding, Patches, TransformerBlock

BLOCK: dict[str, Any] = {"num_heads": 4, "key_dim": 64, "mlp_units": (128, 64)}


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _blocks(dropout_rate: float = 0.1) -> tuple[FusedTransformerBlock, TransformerBlock]:
    arguments = {**BLOCK, "dropout_rate": dropout_rate, "layer_norm_epsilon": 1e-6}
    pair = FusedTransformerBlock(**arguments), TransformerBlock(**arguments)
    weights = None
    for block in pair:
        block.build((None, 49, 64))
        # Biases, scales and shifts away from the 0 and 1 that would hide a mistake in them.
        weights = weights or [
            w + 0.1 * _random(*w.shape, seed=i) for i, w in enumerate(block.get_weights())
        ]
        block.set_weights(weights)
    return pair


class _PlainEmbedding:
    """Resize, cut, project, with the weights of a folded embedding."""

    def __init__(self, folded: FoldedPatchEmbedding, channels: int) -> None:
        self.size, self.patches = folded.image_size, Patches(folded.patch_size)
        self.embedding = PatchEmbedding(folded.projection_dim)
        self.embedding.build((None, folded.num_patches, folded.patch_size**2 * channels))
        self.embedding.set_weights(folded.get_weights())
        self.trainable_weights = self.embedding.trainable_weights

    def __call__(self, images: Any) -> Any:
        resize = keras.layers.Resizing(self.size, self.size, interpolation="bilinear")
        return self.embedding(self.patches(resize(images)))


def _gradients(layer: Any, x: np.ndarray) -> list[np.ndarray]:
    """Of a loss that depends on every output, averaged as a training's over the batch."""
    with tf.GradientTape() as tape:
        outputs = layer(x)
        loss = tf.reduce_mean(outputs * _random(*outputs.shape, seed=9))
    return [tf.convert_to_tensor(g).numpy() for g in tape.gradient(loss, layer.trainable_weights)]


@pytest.mark.parametrize(("size", "resized"), [(32, 224), (32, 32), (40, 24), (5, 12), (1, 4)])
def test_resize_matrix_is_the_bilinear_resize(size: int, resized: int) -> None:
    column = _random(1, size, 1, 3)
    expected = ops.image.resize(column, (resized, 1), interpolation="bilinear", antialias=False)
    actual = resize_matrix(size, resized) @ column[0, :, 0]
    np.testing.assert_allclose(actual, ops.convert_to_numpy(expected)[0, :, 0], atol=1e-6)


def test_windows_of_the_notebook_are_seven_pixels() -> None:
    pixels, weights = patch_windows(32, 224, 32)
    assert pixels.shape == (7, 7)
    assert weights.shape == (7, 32, 7)
    assert pixels[0, 0] == 0 and pixels[-1, -1] == 31
    np.testing.assert_allclose(weights.sum(axis=2), 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "image_size", "patch_size"),
    [((32, 32, 3), 224, 32), ((32, 32, 3), 32, 8), ((48, 40, 1), 32, 8), ((32, 32, 3), 72, 6)],
)
def test_fold_is_exact_forward_and_in_gradients(
    image: tuple[int, ...], image_size: int, patch_size: int
) -> None:
    images = _random(8, *image)
    folded = FoldedPatchEmbedding(64, image_size, patch_size)
    tokens = ops.convert_to_numpy(folded(images))
    plain = _PlainEmbedding(folded, image[-1])
    np.testing.assert_allclose(tokens, ops.convert_to_numpy(plain(images)), atol=1e-5)
    for actual, expected in zip(_gradients(folded, images), _gradients(plain, images)):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
        assert np.abs(expected).max() > 1e-5
    assert folded.compute_output_shape((8, *image)) == tokens.shape


def test_fold_never_makes_the_resized_image() -> None:
    folded = FoldedPatchEmbedding(64, 224, 32)
    folded.build((None, 32, 32, 3))
    function = tf.function(folded).get_concrete_function(tf.TensorSpec([256, 32, 32, 3]))
    sizes = [
        t.shape.num_elements() or 0 for op in function.graph.get_operations() for t in op.outputs
    ]
    assert max(sizes) == 49 * 256 * 147  # the windows; the resized images are 20 times as much


def test_block_is_exact_forward_and_in_gradients() -> None:
    tokens = _random(8, 49, 64)
    fused, plain = _blocks()
    np.testing.assert_allclose(
        ops.convert_to_numpy(fused(tokens)), ops.convert_to_numpy(plain(tokens)), atol=1e-5
    )
    assert len(fused.trainable_weights) == len(plain.trainable_weights) == 16
    for actual, expected in zip(_gradients(fused, tokens), _gradients(plain, tokens)):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_block_counts_the_values_bias_under_dropout() -> None:
    # With all else zero the output is the values' bias times the sum of a row of the dropped
    # weights: on average 1, in single rows not.
    fused, _ = _blocks(dropout_rate=0.5)
    fused.set_weights([np.zeros_like(w) for w in fused.get_weights()])
    fused.attention.value_dense.bias.assign(np.ones((4, 64)))
    fused.attention.output_dense.kernel.assign(np.full((4, 64, 64), 1 / 256))
    outputs = ops.convert_to_numpy(fused(np.zeros((64, 49, 64), np.float32), training=True))
    assert abs(outputs.mean() - 1) < 0.01
    # Four rows of 49 weights of 2 / 49 or nothing: a standard deviation of 1 / √196.
    assert abs(outputs.std() - 196**-0.5) < 0.01


@pytest.mark.parametrize("shape", [(1000, 1001), (7,)])  # an even and an odd number of values
def test_dropout_keeps_the_expectation(shape: tuple[int, ...]) -> None:
    layer = FastDropout(0.1, seed=3)
    outputs = ops.convert_to_numpy(layer(np.ones(shape, np.float32), training=True))
    assert outputs.shape == shape
    kept = 1 - round(0.1 * 65536) / 65536
    assert set(np.unique(outputs)) <= {np.float32(0), np.float32(1 / kept)}
    if outputs.size > 1000:
        assert abs((outputs > 0).mean() - 0.9) < 5 * (0.1 * 0.9 / outputs.size) ** 0.5
        # Neighbours, which share a draw of 32 bits, are independent.
        pairs = (outputs.ravel()[:-1:2] > 0) & (outputs.ravel()[1::2] > 0)
        assert abs(pairs.mean() - 0.81) < 5 * (0.81 * 0.19 / pairs.size) ** 0.5
    again = ops.convert_to_numpy(layer(np.ones(shape, np.float32), training=True))
    assert outputs.size < 1000 or (again != outputs).any()
    copy = FastDropout(0.1, seed=3)
    np.testing.assert_array_equal(copy(np.ones(shape, np.float32), training=True), outputs)
    np.testing.assert_array_equal(copy(outputs, training=False), outputs)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (FoldedPatchEmbedding(16, 48, 8, name="fold"), (2, 32, 32, 3)),
        (FusedTransformerBlock(2, 64, (8, 64), 0.25, 1e-5), (2, 4, 64)),
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
    copy.set_weights(layer.get_weights())
    np.testing.assert_allclose(ops.convert_to_numpy(copy(x)), expected, atol=1e-6)


def test_fold_refuses_patches_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"224 x 224 pixels cannot .* patch_size 30: choose"):
        FoldedPatchEmbedding(64, 224, 30).build((None, 32, 32, 3))
