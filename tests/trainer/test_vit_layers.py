"""Shifted patches, locality self-attention, stochastic depth, and the preset made of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from trainer.inference import for_inference
from trainer.layers import Patches, TransformerBlock
from trainer.model import build_model
from trainer.presets import get_preset
from trainer.vit_layers import (
    LocalitySelfAttention,
    ShiftedPatches,
    SmallDataBlock,
    StochasticDepth,
)

VIT = get_preset("vit_cifar")
SMALL = dataclasses.replace(
    VIT,
    transformer_layers=2,
    projection_dim=24,
    num_heads=3,
    key_dim=8,
    transformer_units=(16, 24),
    tokenizer_filters=(8, 8, 24),
)


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _numpy(x: Any) -> np.ndarray:
    return ops.convert_to_numpy(x)


def test_shifted_patches_equal_a_literal_restatement() -> None:
    images, size = _random(2, 8, 12, 3), 4
    copies = [images]
    for down, right in ((-2, -2), (-2, 2), (2, -2), (2, 2)):
        moved = np.zeros_like(images)
        for y in range(8):
            for x in range(12):
                if 0 <= y - down < 8 and 0 <= x - right < 12:
                    moved[:, y, x] = images[:, y - down, x - right]
        copies.append(moved)
    expected = [
        [np.concatenate([c[b, y : y + 4, x : x + 4] for c in copies], -1).ravel()]
        for b in range(2)
        for y in range(0, 8, 4)
        for x in range(0, 12, 4)
    ]
    actual = _numpy(ShiftedPatches(size)(images))
    np.testing.assert_array_equal(actual, np.reshape(expected, (2, 6, 4 * 4 * 15)))
    assert ShiftedPatches(size).compute_output_shape((None, 8, 12, 3)) == (None, 6, 240)
    # The image's own channels are the plain layer's patches.
    own = actual.reshape(2, 6, 16, 15)[..., :3].reshape(2, 6, 48)
    np.testing.assert_array_equal(own, _numpy(Patches(size)(images)))


def test_stochastic_depth_drops_whole_images_and_keeps_the_expectation() -> None:
    layer, x = StochasticDepth(0.25), np.ones((4000, 3, 2), np.float32)
    result = _numpy(layer(x, training=True))
    assert (result == result[:, :1, :1]).all()
    values = np.sort(np.unique(result))
    np.testing.assert_allclose(values, [0.0, 1 / 0.75], rtol=1e-6)
    assert abs(result.mean() - 1.0) < 0.045  # five deviations
    assert (_numpy(layer(x, training=True)) != result).any()
    for still in (layer(x, training=False), StochasticDepth(0.0)(x, training=True)):
        np.testing.assert_array_equal(still, x)
    half = ops.cast(x[:8], "bfloat16")
    assert keras.backend.standardize_dtype(layer(half, training=True).dtype) == "float32"
    assert keras.backend.standardize_dtype(
        StochasticDepth(0.5, dtype="bfloat16")(half, training=True).dtype
    ) == ("bfloat16")


def _reference_attention(
    layer: LocalitySelfAttention, x: np.ndarray, temperature: np.ndarray, masked: bool
) -> np.ndarray:
    """The paper's formula with loops, from a layer's projections."""
    kernels = {w.path.split("/")[-2:][0] + "/" + w.name: _numpy(w) for w in layer.weights}
    heads, width = layer.num_heads, layer.key_dim
    q, k, v = (
        x @ kernels[f"{name}/kernel"] + kernels[f"{name}/bias"]
        for name in ("query", "key", "value")
    )
    mixed = np.zeros_like(q)
    for b in range(len(x)):
        for h in range(heads):
            columns = slice(h * width, (h + 1) * width)
            scores = temperature[h] * q[b][:, columns] @ k[b][:, columns].T
            if masked:
                np.fill_diagonal(scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            mixed[b][:, columns] = weights @ v[b][:, columns]
    return mixed @ kernels["output/kernel"] + kernels["output/bias"]


def _attention(dtype: str = "float32") -> LocalitySelfAttention:
    layer = LocalitySelfAttention(3, 4, 0.0, dtype=dtype)
    layer.build((None, 6, 10))
    draw = np.random.default_rng(1)
    layer.set_weights([w + 0.3 * draw.normal(size=w.shape) for w in layer.get_weights()])
    return layer


def test_locality_attention_equals_the_papers_formula() -> None:
    layer, x = _attention(), _random(2, 6, 10)
    temperature = _numpy(layer.temperature)
    expected = _reference_attention(layer, x, temperature, masked=True)
    np.testing.assert_allclose(_numpy(layer(x)), expected, atol=1e-5)
    unmasked = _reference_attention(layer, x, temperature, masked=False)
    assert np.abs(unmasked - expected).max() > 0.05
    half = _numpy(ops.cast(_same(layer, "mixed_bfloat16")(x), "float32"))
    np.testing.assert_allclose(half, expected, atol=0.1)


def _same(layer: LocalitySelfAttention, dtype: str) -> LocalitySelfAttention:
    copy = _attention(dtype)
    copy.set_weights(layer.get_weights())
    return copy


def test_temperature_starts_at_the_usual_scale_and_is_learned_by_each_head() -> None:
    layer = LocalitySelfAttention(3, 4, 0.0)
    layer.build((None, 6, 10))
    np.testing.assert_allclose(_numpy(layer.temperature), np.full(3, 0.5), rtol=1e-6)
    assert any(w is layer.temperature for w in layer.trainable_weights)
    model = keras.Sequential([keras.Input((6, 10)), layer])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.train_on_batch(_random(8, 6, 10), _random(8, 6, 10, seed=1))
    moved = np.abs(_numpy(layer.temperature) - 0.5)
    assert moved.min() > 0 and len(set(moved.tolist())) == 3


def test_block_without_its_additions_is_the_plain_block() -> None:
    options = (2, 8, (32, 16), 0.1, 1e-6, True)
    plain, block = TransformerBlock(*options), SmallDataBlock(*options)
    x = _random(2, 5, 16)
    expected = plain(x)
    block(x)
    block.set_weights(plain.get_weights())
    np.testing.assert_allclose(_numpy(block(x)), _numpy(expected), atol=1e-6)


def test_dropped_branches_leave_the_image_as_it_was() -> None:
    block = SmallDataBlock(
        2, 8, (32, 16), 0.0, 1e-6, True, locality_attention=True, stochastic_depth=0.5
    )
    x = _random(400, 5, 16)
    result = _numpy(block(x, training=True))
    unchanged = (result == x).all(axis=(1, 2)).mean()
    assert abs(unchanged - 0.25) < 0.11  # both branches, each with probability 1/2


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ShiftedPatches(4, name="cut"), (2, 8, 8, 3)),
        (StochasticDepth(0.2), (2, 5, 8)),
        (LocalitySelfAttention(2, 4, 0.1), (2, 5, 8)),
        (
            SmallDataBlock(
                2, 4, (16, 8), 0.1, 1e-6, True, locality_attention=True, stochastic_depth=0.2
            ),
            (2, 5, 8),
        ),
    ],
)
def test_config_round_trip_gives_the_same_layer(
    layer: keras.layers.Layer, shape: tuple[int, ...]
) -> None:
    x = _random(*shape)
    expected = _numpy(layer(x))
    copy = keras.layers.deserialize(keras.layers.serialize(layer))
    assert copy.get_config() == layer.get_config()
    copy(x)
    copy.set_weights(layer.get_weights())
    np.testing.assert_allclose(_numpy(copy(x)), expected, atol=1e-6)
    assert copy.compute_output_shape(shape) == expected.shape


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_size is 1: half of it"):
        ShiftedPatches(1)
    with pytest.raises(ValueError, match=r"rate is 1\.0"):
        StochasticDepth(1.0)


def test_preset_has_the_parameters_it_states() -> None:
    model = build_model(VIT, seed=0)
    trainable = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    assert trainable == 3_002_897
    assert model.count_params() == trainable + 2 * (64 + 128 + 192)  # the norms' moving averages
    assert model.get_layer("tokenizer").output.shape == (None, VIT.num_patches, 192)
    rates = [model.get_layer(f"block_{index}").stochastic_depth for index in range(9)]
    np.testing.assert_allclose(rates, np.linspace(0.0, 0.1, 9))


@pytest.mark.parametrize(
    "changes", [{}, {"tokenizer_filters": (), "shifted_patches": True}], ids=["vit", "shifted"]
)
def test_model_is_the_same_plain_reloaded_and_for_inference(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    preset = dataclasses.replace(SMALL, **changes)
    images = _random(4, 32, 32, 3)
    model = build_model(preset, seed=0)
    trained = _numpy(model(images, training=True))  # moves the averages of batch normalizations
    expected = _numpy(model(images, training=False))
    assert np.abs(trained - expected).max() > 0.01
    plain = build_model(preset, seed=1, plain=True)
    assert [w.path for w in plain.weights] == [w.path for w in model.weights]
    plain.set_weights(model.get_weights())
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    for other in (plain, reloaded, for_inference(model)):
        np.testing.assert_allclose(_numpy(other(images, training=False)), expected, atol=1e-5)


def test_strong_augmentation_is_left_out_of_rewritten_models() -> None:
    preset = dataclasses.replace(
        get_preset("notebook"),
        transformer_layers=1,
        mlp_head_units=(),
        rand_augment_ops=1,
        rand_augment_magnitude=0.5,
        random_erasing=0.5,
    )
    model = build_model(preset, seed=0)
    names = {layer.name for layer in model.layers}
    assert {"augmentation", "rand_augment", "random_erasing"} < names
    frozen = for_inference(model)
    assert not {"augmentation", "rand_augment", "random_erasing"} & {x.name for x in frozen.layers}
    images = _random(2, 32, 32, 3)
    np.testing.assert_allclose(
        _numpy(frozen(images)), _numpy(model(images, training=False)), atol=1e-4
    )
