"""The optimizer's settings, the learning rate over the steps or the time, and the loss."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest

from trainer.model import build_model
from trainer.presets import get_preset
from trainer.schedule import (
    SmoothedCrossentropy,
    build_loss,
    build_optimizer,
    learning_rate_at,
)


def _learning_rate(optimizer: keras.optimizers.Optimizer, step: int) -> float:
    optimizer.iterations.assign(step)
    return float(optimizer.learning_rate)


def test_notebook_is_adamw_at_a_constant_rate() -> None:
    optimizer = build_optimizer(get_preset("notebook"), steps_per_epoch=176)
    assert type(optimizer) is keras.optimizers.AdamW
    assert optimizer.weight_decay == 1e-3
    assert (optimizer.beta_1, optimizer.beta_2, optimizer.epsilon) == (0.9, 0.999, 1e-7)
    rates = [_learning_rate(optimizer, step) for step in (0, 1760, 3520)]
    np.testing.assert_allclose(rates, 1e-3, rtol=1e-6)


def test_cosine_falls_from_the_peak_to_zero_over_all_epochs() -> None:
    preset = dataclasses.replace(
        get_preset("notebook"), learning_rate_schedule="cosine", epochs=4, learning_rate=0.01
    )
    optimizer = build_optimizer(preset, steps_per_epoch=25)
    rates = [_learning_rate(optimizer, step) for step in (0, 25, 50, 100, 120)]
    quarter = 0.005 * (1 + np.cos(np.pi / 4))
    np.testing.assert_allclose(rates, [0.01, quarter, 0.005, 0.0, 0.0], atol=1e-8)


def test_weight_decay_is_decoupled_and_scaled_by_the_rate() -> None:
    preset = dataclasses.replace(get_preset("notebook"), learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer(preset, steps_per_epoch=1)
    weight = keras.Variable([2.0, -4.0])
    optimizer.apply([keras.ops.zeros(2)], [weight])
    # Without a gradient only the decay acts: w - rate * decay * w.
    np.testing.assert_allclose(keras.ops.convert_to_numpy(weight), [1.9, -3.8], rtol=1e-6)


def test_warm_up_rises_to_the_peak_then_falls_to_zero() -> None:
    preset = dataclasses.replace(get_preset("compact"), epochs=4, learning_rate=0.01, warmup=0.1)
    optimizer = build_optimizer(preset, steps_per_epoch=50)
    rates = [_learning_rate(optimizer, step) for step in (0, 10, 20, 110, 200)]
    np.testing.assert_allclose(rates, [0.0, 0.005, 0.01, 0.005, 0.0], atol=1e-6)


def test_decay_leaves_out_biases_norms_and_positions() -> None:
    network = build_model(get_preset("compact"), seed=0)
    preset = dataclasses.replace(
        get_preset("compact"), learning_rate=0.1, learning_rate_schedule="constant", warmup=0.0
    )
    optimizer = build_optimizer(preset, steps_per_epoch=1)
    for variable in network.trainable_variables:
        variable.assign(keras.ops.ones(variable.shape))
    zeros = [keras.ops.zeros(v.shape) for v in network.trainable_variables]
    optimizer.apply(zeros, network.trainable_variables)
    kept = {v.name for v in network.trainable_variables if float(keras.ops.min(v)) == 1.0}
    assert kept == {"bias", "mlp_bias", "gamma", "beta", "position_embedding"}
    decayed = {v.name for v in network.trainable_variables if float(keras.ops.max(v)) < 1.0}
    blocks = {"qkv_kernel", "output_kernel", "mlp_kernel", "mlp_output_kernel"}
    assert decayed == {"kernel", *blocks}


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_rate_over_time_is_the_one_over_steps(schedule: str) -> None:
    preset = dataclasses.replace(
        get_preset("compact"),
        learning_rate_schedule=schedule,
        warmup=0.1 if schedule == "cosine" else 0.0,
        epochs=1,
    )
    by_steps = build_optimizer(preset, steps_per_epoch=1000)
    for step in (0, 50, 100, 400, 999, 1000):
        expected = _learning_rate(by_steps, step)
        assert learning_rate_at(preset, step / 1000) == pytest.approx(expected, abs=1e-8)
    by_time = build_optimizer(dataclasses.replace(preset, train_minutes=1.0), steps_per_epoch=1000)
    by_time.learning_rate = 0.125
    assert _learning_rate(by_time, 500) == 0.125


def test_moving_average_of_the_weights() -> None:
    preset = dataclasses.replace(get_preset("notebook"), ema_momentum=0.75, weight_decay=0.0)
    optimizer = build_optimizer(preset, steps_per_epoch=1)
    weight = keras.Variable([0.0])
    optimizer.build([weight])
    seen = []
    for _ in range(2):
        optimizer.apply([keras.ops.ones(1)], [weight])
        seen.append(float(weight[0]))
    optimizer.finalize_variable_values([weight])
    assert float(weight[0]) == pytest.approx(0.75 * seen[0] + 0.25 * seen[1], rel=1e-5)


def test_smoothed_loss_is_that_of_smoothed_one_hot_labels() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 100)).astype(np.float32)
    labels = np.array([0, 5, 99, 5, 1, 2])
    loss = build_loss(get_preset("compact"))
    assert isinstance(loss, SmoothedCrossentropy)
    reference = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    expected = float(reference(np.eye(100, dtype=np.float32)[labels], logits))
    assert abs(float(loss(labels, logits)) - expected) < 1e-5
    copy = keras.losses.deserialize(keras.losses.serialize(loss))
    assert abs(float(copy(labels, logits)) - expected) < 1e-5
    assert type(build_loss(get_preset("notebook"))) is keras.losses.SparseCategoricalCrossentropy


def test_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps_per_epoch is 0.*batch_size below 256"):
        build_optimizer(get_preset("notebook"), steps_per_epoch=0)
