"""The model for serving equals the trained one."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from tests.support.networks import build_model
from trainer.network.inference import for_inference
from trainer.preset import replace
from trainer.presets import get_preset


def _trained_looking(preset: str, layers: int) -> keras.Model:
    """A model whose biases, scales and shifts are away from the 0 and 1 they start at."""
    network = build_model(replace(get_preset(preset), transformer_layers=layers), seed=0)
    draw = np.random.default_rng(0)
    for weight in network.weights:
        spread = 0.5 if weight.name == "moving_variance" else 0.05
        noise = spread * draw.uniform(-1, 1, size=weight.shape)
        weight.assign(ops.convert_to_numpy(weight) + noise.astype(np.float32))
    return network


@pytest.mark.parametrize("preset", ["notebook", "tiny", "compact"])
def test_equals_the_network(preset: str) -> None:
    network = _trained_looking(preset, 3)
    images = np.random.default_rng(1).normal(size=(8, 32, 32, 3)).astype(np.float32)
    before = network.get_weights()
    frozen = for_inference(network)
    for batch in (images, images[:1]):
        logits = ops.convert_to_numpy(network(batch, training=False))
        actual = ops.convert_to_numpy(frozen(batch, training=False))
        np.testing.assert_allclose(actual, logits, atol=1e-5 * np.abs(logits).max())
    for a, b in zip(before, network.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_holds_what_is_multiplied_out_and_no_random_state() -> None:
    frozen = for_inference(_trained_looking("notebook", 1))
    assert frozen.get_layer("patch_embedding").kernel.shape == (49, 7 * 7 * 3, 64)
    assert frozen.get_layer("block_0").query_kernel.shape == (64, 4 * 64)
    names = [layer.name for layer in frozen.layers]
    assert "augmentation" not in names and "head_dropout" not in names
    # Query and output projections, MLP, and their biases.
    block = 64 * 256 + 256 + 256 * 64 + 64 + 64 * 128 + 128 + 128 * 64 + 64
    assert frozen.get_layer("block_0").count_params() == block


def test_batch_normalizations_are_folded_away() -> None:
    frozen = for_inference(_trained_looking("compact", 1))
    assert [layer.name for layer in frozen.layers][1:3] == ["tokenizer", "block_0"]
    names = {weight.name for weight in frozen.get_layer("block_0").weights}
    assert names == {
        "qkv_kernel",
        "qkv_bias",
        "output_kernel",
        "mlp_kernel",
        "mlp_bias",
        "mlp_output_kernel",
    }


def test_leaves_other_models_alone() -> None:
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    assert for_inference(other) is other
