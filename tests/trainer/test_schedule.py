"""The optimizer's settings, the learning rate over the steps or the time, and the loss."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tests.support.networks import build_model
from trainer.losses import (
    SmoothedCrossentropy,
    TopKAccuracy,
    build_loss,
    build_metrics,
    class_weights,
)
from trainer.optimizer import build_optimizer
from trainer.preset import replace
from trainer.presets import get_preset
from trainer.schedule import Schedule, learning_rate_at, learning_rates


def _learning_rate(optimizer: keras.optimizers.Optimizer, step: int) -> float:
    optimizer.iterations.assign(step)
    return float(optimizer.learning_rate)


def test_notebook_is_adamw_at_a_constant_rate() -> None:
    optimizer = build_optimizer(get_preset("notebook").training, steps_per_epoch=176)
    assert isinstance(optimizer, keras.optimizers.AdamW)
    assert optimizer.weight_decay == 1e-3
    assert (optimizer.beta_1, optimizer.beta_2, optimizer.epsilon) == (0.9, 0.999, 1e-7)
    rates = [_learning_rate(optimizer, step) for step in (0, 1760, 3520)]
    np.testing.assert_allclose(rates, 1e-3, rtol=1e-6)


def test_cosine_falls_from_the_peak_to_zero_over_all_epochs() -> None:
    preset = replace(
        get_preset("notebook"), learning_rate_schedule="cosine", epochs=4, learning_rate=0.01
    )
    optimizer = build_optimizer(preset.training, steps_per_epoch=25)
    rates = [_learning_rate(optimizer, step) for step in (0, 25, 50, 100, 120)]
    quarter = 0.005 * (1 + np.cos(np.pi / 4))
    np.testing.assert_allclose(rates, [0.01, quarter, 0.005, 0.0, 0.0], atol=1e-8)


def test_weight_decay_is_decoupled_and_scaled_by_the_rate() -> None:
    preset = replace(get_preset("notebook"), learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer(preset.training, steps_per_epoch=1)
    weight = keras.Variable([2.0, -4.0])
    optimizer.apply([keras.ops.zeros(2)], [weight])
    # Without a gradient only the decay acts: w - rate * decay * w.
    np.testing.assert_allclose(keras.ops.convert_to_numpy(weight), [1.9, -3.8], rtol=1e-6)


def test_warm_up_rises_to_the_peak_then_falls_to_zero() -> None:
    preset = replace(get_preset("compact"), epochs=4, learning_rate=0.01, warmup=0.1)
    optimizer = build_optimizer(preset.training, steps_per_epoch=50)
    rates = [_learning_rate(optimizer, step) for step in (0, 10, 20, 110, 200)]
    np.testing.assert_allclose(rates, [0.0, 0.005, 0.01, 0.005, 0.0], atol=1e-6)


def test_decay_leaves_out_biases_norms_and_positions() -> None:
    network = build_model(get_preset("compact"), seed=0)
    preset = replace(
        get_preset("compact"), learning_rate=0.1, learning_rate_schedule="constant", warmup=0.0
    )
    optimizer = build_optimizer(preset.training, steps_per_epoch=1)
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
    preset = replace(
        get_preset("compact"),
        learning_rate_schedule=schedule,
        warmup=0.1 if schedule == "cosine" else 0.0,
        epochs=1,
    )
    by_steps = build_optimizer(preset.training, steps_per_epoch=1000)
    for step in (0, 50, 100, 400, 999, 1000):
        expected = _learning_rate(by_steps, step)
        assert learning_rate_at(preset.training, step / 1000) == pytest.approx(expected, abs=1e-8)
    by_time = build_optimizer(replace(preset, train_minutes=1.0).training, steps_per_epoch=1000)
    by_time.learning_rate = 0.125
    assert _learning_rate(by_time, 500) == 0.125


def test_one_curve_for_steps_on_either_engine_and_for_the_clock() -> None:
    training = replace(get_preset("compact"), epochs=3, warmup=0.13).training
    by_optimizer = Schedule(training, 3 * 7)
    copy = keras.optimizers.schedules.deserialize(
        keras.optimizers.schedules.serialize(by_optimizer)
    )
    on_jax = np.concatenate([learning_rates(training, 7, epoch) for epoch in range(3)])
    for schedule in (by_optimizer, copy):
        rates = [float(schedule(step)) for step in range(21)]
        np.testing.assert_allclose(rates, on_jax, atol=1e-8)


def test_moving_average_of_the_weights() -> None:
    preset = replace(get_preset("notebook"), ema_momentum=0.75, weight_decay=0.0)
    optimizer = build_optimizer(preset.training, steps_per_epoch=1)
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


def test_balanced_classes_count_alike() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [3])
    weights = class_weights(labels, 4)
    assert weights == pytest.approx([10 / 18, 10 / 9, 0.0, 10 / 3])
    assert np.mean(np.take(weights, labels)) == pytest.approx(1.0)
    logits = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    plain = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=None)
    each = keras.ops.convert_to_numpy(plain(labels, logits))
    balanced = build_loss(replace(get_preset("tiny"), balance=True), weights)
    # The mean of the classes' means.
    of_classes = [each[labels == label].mean() for label in (0, 1, 3)]
    assert float(balanced(labels, logits)) == pytest.approx(np.mean(of_classes), rel=1e-5)
    one_hot = np.eye(4, dtype=np.float32)[labels]
    assert float(balanced(one_hot, logits)) == pytest.approx(np.mean(of_classes), rel=1e-5)
    copy = keras.losses.deserialize(keras.losses.serialize(balanced))
    assert float(copy(labels, logits)) == pytest.approx(np.mean(of_classes), rel=1e-5)
    unbalanced = build_loss(get_preset("tiny"), weights)
    assert float(unbalanced(labels, logits)) == pytest.approx(each.mean(), rel=1e-5)


MIXING = replace(get_preset("compact"), mixup=0.8)


def test_mixed_labels_have_the_loss_of_probabilities() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(6, 100)).astype(np.float32)
    mixed = generator.dirichlet(np.full(100, 0.1), size=6).astype(np.float32)
    loss = build_loss(MIXING)
    reference = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    assert abs(float(loss(mixed, logits)) - float(reference(mixed, logits))) < 1e-5
    # Labels of one class alone are the validation split's integers.
    labels = np.array([0, 5, 99, 5, 1, 2])
    one_hot = np.eye(100, dtype=np.float32)[labels]
    assert abs(float(loss(labels, logits)) - float(loss(one_hot, logits))) < 1e-5


def test_metrics_take_integers_and_probabilities() -> None:
    logits = np.tile(np.linspace(0.0, 1.0, 100, dtype=np.float32), (4, 1))
    labels = np.array([99, 95, 94, 99])
    mixed = 0.6 * np.eye(100)[labels] + 0.4 * np.eye(100)[99 - labels]
    for preset in (get_preset("compact"), MIXING):
        for metric, expected in zip(build_metrics(preset, 100), (0.5, 0.75), strict=True):
            assert metric.name == ("top_1_accuracy" if expected == 0.5 else "top_5_accuracy")
            metric.update_state(labels, logits)
            assert float(metric.result()) == expected
            if preset is MIXING:
                metric.reset_state()
                metric.update_state(mixed.astype(np.float32), logits)
                assert float(metric.result()) == expected
    # Of fewer classes than five, all are among the best.
    for metric, expected in zip(build_metrics(MIXING, 3), (0.5, 1.0), strict=True):
        metric.update_state(np.array([2, 0]), logits[:2, :3])
        assert float(metric.result()) == expected
    copy = keras.metrics.deserialize(keras.metrics.serialize(TopKAccuracy(5, "five")))
    copy.update_state(labels, logits)
    assert (copy.name, float(copy.result())) == ("five", 0.75)


def test_gradients_are_clipped_by_their_norm_together() -> None:
    gradients = [keras.ops.array([3.0, 0.0]), keras.ops.array([0.0, 4.0])]
    steps = []
    for norm in (0.0, 1.0):
        preset = replace(get_preset("notebook"), gradient_clip_norm=norm)
        optimizer = build_optimizer(preset.training, steps_per_epoch=1)
        variables = [keras.Variable([0.0, 0.0]), keras.Variable([0.0, 0.0])]
        optimizer.apply(gradients, variables)
        # Adam's first moment is a tenth of the gradients that reached it.
        moments = [v for v in optimizer.variables if "momentum" in v.path]
        steps.append(np.concatenate([keras.ops.convert_to_numpy(v) for v in moments]))
    np.testing.assert_allclose(steps[0], [0.3, 0.0, 0.0, 0.4], rtol=1e-5)
    np.testing.assert_allclose(steps[1], steps[0] / 5, rtol=1e-5)


def test_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps_per_epoch is 0.*batch_size below 256"):
        build_optimizer(get_preset("notebook").training, steps_per_epoch=0)
