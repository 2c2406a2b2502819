"""The model: exactly the reference, deterministic for a seed, and whole after a reload."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from tests.support.networks import build_model
from trainer.network.compact_layers import FusedBatchNormalization
from trainer.network.inference import for_inference
from trainer.optimizer import build_optimizer, compile_network
from trainer.preset import replace
from trainer.presets import PRESETS, get_preset

TINY = get_preset("tiny")
STILL = replace(TINY, dropout_rate=0.0, head_dropout_rate=0.0)  # augmentation only


def _images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 32, 32, 3)).astype(np.float32)


def _logits(model: keras.Model, *, training: bool = False) -> np.ndarray:
    return ops.convert_to_numpy(model(_images(), training=training))


@pytest.fixture(scope="module")
def notebook() -> keras.Model:
    return build_model(get_preset("notebook"), seed=0, plain=True)


@pytest.fixture
def dtype_policy() -> Iterator[None]:
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


def _reference_notebook() -> keras.Model:
    """The keras.io example's functional code, restated at the notebook's settings."""

    def mlp(x: Any, hidden_units: list[int], dropout_rate: float) -> Any:
        for units in hidden_units:
            x = layers.Dense(units, activation=keras.activations.gelu)(x)
            x = layers.Dropout(dropout_rate)(x)
        return x

    class PatchEncoder(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.projection = layers.Dense(64)
            self.position_embedding = layers.Embedding(input_dim=49, output_dim=64)

        def call(self, patch: Any) -> Any:
            positions = ops.expand_dims(ops.arange(start=0, stop=49, step=1), axis=0)
            return self.projection(patch) + self.position_embedding(positions)

    augmentation = keras.Sequential(
        [
            layers.Resizing(224, 224),
            layers.RandomFlip("horizontal"),
            layers.RandomRotation(factor=0.02),
            layers.RandomZoom(height_factor=0.2, width_factor=0.2),
        ]
    )
    inputs = keras.Input(shape=(32, 32, 3))
    patches = ops.image.extract_patches(augmentation(inputs), size=32)
    encoded = PatchEncoder()(layers.Reshape((49, 3072))(patches))
    for _ in range(12):
        x1 = layers.LayerNormalization(epsilon=1e-6)(encoded)
        attention = layers.MultiHeadAttention(num_heads=4, key_dim=64, dropout=0.1)(x1, x1)
        x2 = layers.Add()([attention, encoded])
        x3 = layers.LayerNormalization(epsilon=1e-6)(x2)
        x3 = mlp(x3, hidden_units=[128, 64], dropout_rate=0.1)
        encoded = layers.Add()([x3, x2])
    representation = layers.LayerNormalization(epsilon=1e-6)(encoded)
    representation = layers.Flatten()(representation)
    representation = layers.Dropout(0.5)(representation)
    features = mlp(representation, hidden_units=[2048, 1024], dropout_rate=0.5)
    return keras.Model(inputs, layers.Dense(100)(features))


def _seed_states(model: keras.Model) -> list[Any]:
    return [variable for variable in model.variables if "seed_generator" in variable.path]


def test_notebook_parameters_and_shapes(notebook: keras.Model) -> None:
    trainable = sum(int(np.prod(w.shape)) for w in notebook.trainable_weights)
    assert trainable == notebook.count_params() == 9_823_588
    for index in range(12):
        assert notebook.get_layer(f"block_{index}").attention.count_params() == 66_368
    assert notebook.get_layer("patch_embedding").output.shape == (None, 49, 64)
    assert notebook.input.name == "image"
    assert notebook.input_shape == (None, 32, 32, 3)
    assert notebook.output_shape == (None, 100)


def test_notebook_equals_the_reference_code(notebook: keras.Model) -> None:
    reference = _reference_notebook()
    assert [w.shape for w in reference.weights] == [w.shape for w in notebook.weights]
    reference.set_weights(notebook.get_weights())
    np.testing.assert_allclose(_logits(notebook), _logits(reference), atol=1e-5)
    # With the random streams copied too, augmentation and dropout draw the same numbers in the
    # same places, so training is the reference's as well.
    ours, theirs = _seed_states(notebook), _seed_states(reference)
    assert len(ours) == len(theirs) == 3 + 12 * 3 + 3
    for mine, other in zip(ours, theirs, strict=True):
        other.assign(mine)
    np.testing.assert_allclose(
        _logits(notebook, training=True), _logits(reference, training=True), atol=1e-4
    )


@pytest.mark.parametrize("preset", ["notebook", "tiny"])
def test_fast_and_plain_model_exchange_weights(preset: str) -> None:
    fast = build_model(get_preset(preset), seed=1)
    plain = build_model(get_preset(preset), seed=2, plain=True)
    assert [w.path for w in fast.weights] == [w.path for w in plain.weights]
    fast.set_weights(plain.get_weights())
    np.testing.assert_allclose(_logits(fast), _logits(plain), atol=1e-5)


def test_compact_parameters_and_shapes() -> None:
    model = build_model(get_preset("compact"), seed=0)
    trainable = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    assert trainable == 584_453
    norms = 32 + 3 * 64 + 128 + (3 * 2 + 1) * 128
    assert model.count_params() == trainable + 2 * norms  # their moving averages
    assert model.get_layer("tokenizer").output.shape == (None, 64, 128)
    assert model.get_layer("pool").output.shape == (None, 128)
    assert _logits(model).shape == (4, 100)


def test_tiny_parameters() -> None:
    assert build_model(TINY).count_params() == 63_172


def test_other_classes_and_input_shape() -> None:
    model = build_model(TINY, num_classes=7, input_shape=(48, 40, 1))
    assert model.output_shape == (None, 7)
    assert model(np.zeros((2, 48, 40, 1), np.float32)).shape == (2, 7)


def test_linear_head() -> None:
    model = build_model(replace(TINY, mlp_head_units=()))
    assert model.get_layer("logits").kernel.shape == (16 * 32, 100)


def test_resize_only_where_the_size_differs(notebook: keras.Model) -> None:
    assert "resize" in [layer.name for layer in notebook.layers]
    assert "resize" not in [layer.name for layer in build_model(TINY, plain=True).layers]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"input_shape": (32, 32)}, r"shape is \(32, 32\)"),
        ({"input_shape": (32, 0, 3)}, r"shape is \(32, 0, 3\)"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(TINY, **arguments)


def test_same_seed_same_weights_and_same_randomness() -> None:
    first, second, other = (build_model(TINY, seed=seed) for seed in (3, 3, 4))
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for _ in range(2):  # the streams advance alike, too
        np.testing.assert_allclose(
            _logits(first, training=True), _logits(second, training=True), atol=1e-6
        )
    assert np.abs(_logits(first) - _logits(other)).max() > 0.01


def test_seeded_weights_differ_from_one_another() -> None:
    # Query, key and value above all: they have one shape and one kind of initializer.
    weights = build_model(TINY, seed=3).get_weights()
    drawn = [w.tobytes() for w in weights if w.std() > 0]  # not zeros and ones
    assert len(set(drawn)) == len(drawn) == 1 + 1 + 2 * 6 + 2


def test_seed_leaves_the_process_random_state_alone() -> None:
    random.seed(11)
    expected = random.random()
    random.seed(11)
    build_model(TINY, seed=3)
    assert random.random() == expected
    first, second = build_model(TINY), build_model(TINY)
    assert np.abs(_logits(first) - _logits(second)).max() > 0.01


def test_augmentation_acts_in_training_only() -> None:
    model = build_model(STILL, seed=0)
    np.testing.assert_array_equal(_logits(model), _logits(model))
    assert np.abs(_logits(model, training=True) - _logits(model)).max() > 1e-3
    off = replace(STILL, random_flip=False, random_rotation=0.0, random_zoom=0.0)
    model = build_model(off, seed=0)
    np.testing.assert_allclose(_logits(model, training=True), _logits(model), atol=1e-6)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_graph_and_eager_agree(run_eagerly: bool) -> None:
    # The expected values are computed eagerly, layer by layer, from the same seed.
    images, labels = _images(), np.array([1, 2, 3, 99])
    model, expected = build_model(TINY, seed=5), build_model(TINY, seed=5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(build_optimizer(TINY.training, steps_per_epoch=1), loss, run_eagerly=run_eagerly)
    np.testing.assert_allclose(model.predict_on_batch(images), _logits(expected), atol=1e-5)
    np.testing.assert_allclose(
        float(model.train_on_batch(images, labels)),
        float(loss(labels, expected(images, training=True))),
        rtol=1e-5,
    )


def test_fixed_batch_is_learned() -> None:
    images, labels = _images(16), np.arange(16)
    model = build_model(STILL, seed=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(build_optimizer(STILL.training, steps_per_epoch=100), loss)
    losses = [float(model.train_on_batch(images, labels)) for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("preset", ["tiny", "notebook"])
def test_save_and_reload_gives_equal_outputs(preset: str, tmp_path: Path) -> None:
    small = replace(get_preset(preset), transformer_layers=1)
    model = build_model(small, seed=0)
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(_logits(reloaded), _logits(model), atol=1e-6)
    assert reloaded.to_json() == model.to_json()


@pytest.mark.parametrize(
    "changes",
    [{}, {"block": "layer_norm"}, {"depthwise_convolution": True}],
    ids=["compact", "layer_normalization", "depthwise_convolution"],
)
def test_convolutional_tokens_are_the_same_plain_reloaded_and_for_inference(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    preset = replace(
        get_preset("compact"),
        projection_dim=24,
        num_heads=3,
        key_dim=8,
        transformer_layers=2,
        transformer_units=(16, 24),
        tokenizer_filters=(8, 8, 24),
        **changes,
    )
    model = build_model(preset, seed=0)
    trained = _logits(model, training=True)  # moves the averages of batch normalizations
    expected = _logits(model)
    assert np.abs(trained - expected).max() > 0.01
    plain = build_model(preset, seed=1, plain=True)
    assert [w.path for w in plain.weights] == [w.path for w in model.weights]
    plain.set_weights(model.get_weights())
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    for other in (plain, reloaded, for_inference(model)):
        np.testing.assert_allclose(_logits(other), expected, atol=1e-5)


SMALL = {
    "patches": replace(STILL, projection_dim=8, key_dim=4, transformer_units=(8,), batch_size=8),
    "resized patches": replace(
        STILL, resize=64, patch_size=16, projection_dim=8, key_dim=8, transformer_units=(8,)
    ),
    "convolutions": replace(
        get_preset("compact_wide"),
        projection_dim=8,
        num_heads=2,
        key_dim=4,
        transformer_layers=1,
        transformer_units=(8, 8),
        tokenizer_filters=(4, 4, 8),
        tokenizer_residual_pairs=(),
    ),
}


@pytest.mark.parametrize("shape", [(32, 32, 3), (48, 48, 3), (64, 96, 3)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_each_architecture_trains_and_infers_at_every_size(
    name: str, shape: tuple[int, int, int]
) -> None:
    preset = SMALL[name]
    draw = np.random.default_rng(0)
    images, labels = draw.normal(size=(8, *shape)).astype(np.float32), np.arange(8) % 3
    model = build_model(preset, num_classes=3, input_shape=shape, seed=0)
    compile_network(model, replace(preset, mixup=0.0, cutmix=0.0), steps_per_epoch=1)
    before = model.evaluate(images, labels, verbose=0, return_dict=True)
    for _ in range(3):
        model.train_on_batch(images, labels)
    after = model.evaluate(images, labels, verbose=0, return_dict=True)
    assert np.isfinite(after["loss"]) and after["loss"] != before["loss"]
    assert after["top_5_accuracy"] == 1.0  # of three classes
    logits = model(images, training=False)
    served = for_inference(model)(images, training=False)
    np.testing.assert_allclose(served, logits, atol=1e-4)


def test_a_patch_size_that_does_not_divide_the_images_is_refused() -> None:
    for plain in (True, False):
        with pytest.raises(ValueError, match=r"36 x 32 pixels cannot be cut .* patch_size 8"):
            build_model(TINY, num_classes=3, input_shape=(36, 32, 3), plain=plain)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_weights_file_moves_between_models(preset: str, tmp_path: Path) -> None:
    small = replace(get_preset(preset), transformer_layers=1)
    model, other = build_model(small, seed=0), build_model(small, seed=1)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    for mine, loaded in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(loaded, mine, err_msg=mine.path)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.usefixtures("dtype_policy")
def test_mixed_precision_has_float32_logits(policy: str) -> None:
    expected = _logits(build_model(TINY, seed=0))
    keras.config.set_dtype_policy(policy)
    model = build_model(TINY, seed=0)
    assert model.get_layer("block_0").compute_dtype == policy.removeprefix("mixed_")
    assert model.get_layer("block_0").attention.compute_dtype == policy.removeprefix("mixed_")
    logits = _logits(model)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=0.1)
    model.compile(
        build_optimizer(TINY.training, steps_per_epoch=1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    assert 0.0 < float(model.train_on_batch(_images(), np.arange(4))) < 20.0


def test_statistics_are_averaged_as_long_as_the_weights():
    compact = replace(PRESETS["compact"], transformer_layers=1, ema_momentum=0.999)
    network = build_model(compact, num_classes=3)
    found = [
        layer.momentum
        for layer in network._flatten_layers()
        if isinstance(layer, FusedBatchNormalization)
    ]
    assert len(found) == 5 + 2 + 1 and set(found) == {0.999}
