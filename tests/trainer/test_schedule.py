"""The optimizer: AdamW's settings, and the learning rate over the steps."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest

from trainer.presets import get_preset
from trainer.schedule import build_optimizer


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


def test_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps_per_epoch is 0.*batch_size below 256"):
        build_optimizer(get_preset("notebook"), steps_per_epoch=0)
