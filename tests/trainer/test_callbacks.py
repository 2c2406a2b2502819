"""Progress lines, and what makes an interrupted training continue as if nothing had happened."""

from __future__ import annotations

import re
import time

import keras
import numpy as np
import pytest

from trainer import callbacks
from trainer.checkpoint import History
from trainer.preset import Training, replace
from trainer.presets import get_preset


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(32, 32, 32, 3)).astype("float32"), np.arange(32)


def small_model() -> keras.Model:
    """With augmentation and dropout, each with its random generator."""
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.RandomFlip("horizontal", seed=1),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5, seed=2),
            keras.layers.Dense(32, kernel_initializer=keras.initializers.GlorotUniform(seed=3)),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss)
    return model


def fit(
    model: keras.Model, data: tuple, epochs: int, added: list[keras.callbacks.Callback], first=0
) -> list[float]:
    options = {"initial_epoch": first, "batch_size": 16, "verbose": 0, "shuffle": False}
    return model.fit(*data, epochs=epochs, callbacks=added, **options).history["loss"]


def test_epochs_draw_different_numbers(data: tuple):
    model = small_model()
    model.optimizer.learning_rate = 0.0
    losses = fit(model, data, 3, [callbacks.EpochSeeds()])
    assert len({round(loss, 5) for loss in losses}) == 3


def test_a_short_epoch_has_one_line(data: tuple, capsys: pytest.CaptureFixture[str]):
    (loss,) = fit(small_model(), data, 1, [callbacks.ProgressLines()])
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"  epoch 1/1 took \d+ s  loss {loss:.4f}", line)


class _SlowStep(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        time.sleep(0.25)


def test_a_long_epoch_says_where_it_stands(
    data: tuple, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(callbacks, "_SECONDS_PER_LINE", 0.4)
    model = small_model()
    # 16 steps of a quarter of a second: a line at every second one.
    added = [_SlowStep(), callbacks.ProgressLines()]
    model.fit(*data, epochs=1, batch_size=2, verbose=0, callbacks=added)
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("  epoch 1/1 took ")
    assert 2 <= len(lines) <= 8
    for line in lines:
        match = re.fullmatch(
            r"  epoch 1/1  step (\d+)/16  (\d+) s left  loss \d+\.\d{4}",
            line,
        )
        assert match, line
        step, left = int(match[1]), int(match[2])
        # A step takes the pause and a little; compiling the first one must not count.
        assert (16 - step) * 0.25 - 0.5 <= left <= (16 - step) * 0.6 + 0.5


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]):
    verbose, added = callbacks.progress()  # the output is captured
    assert verbose == 0
    assert [type(callback) for callback in added] == [callbacks.ProgressLines]


def budget_of(seconds: float) -> Training:
    preset = replace(
        get_preset("compact"), train_minutes=seconds / 60, learning_rate=1e-3, warmup=0.5
    )
    return preset.training


class Rates(keras.callbacks.Callback):
    """What the learning rate was at each step, and a pause in each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.seen.append(float(self.model.optimizer.learning_rate))
        time.sleep(0.05)

    def on_test_begin(self, logs: dict | None = None) -> None:
        time.sleep(0.5)


def test_a_time_budget_ends_the_training_and_shapes_its_rates(data: tuple):
    model, rates = small_model(), Rates()
    history = History()
    began = time.monotonic()
    model.fit(
        *data,
        batch_size=8,
        epochs=1000,
        verbose=0,
        validation_data=data,
        callbacks=[callbacks.TimeBudget(budget_of(2.0)), rates, history],
    )
    took = time.monotonic() - began
    epochs = history.epochs
    # Of an epoch at least three steps of 0.05 s count, of its validation's 0.5 s nothing.
    assert 2 <= len(epochs) <= 14
    assert took > 2.0 + 0.5 * len(epochs)
    trained = [epoch["training_seconds"] for epoch in epochs]
    assert trained == sorted(trained) and 2.0 <= trained[-1] < 3.0
    peak = int(np.argmax(rates.seen))
    assert rates.seen[0] == 0.0 and rates.seen[peak] == pytest.approx(1e-3, rel=0.2)
    assert rates.seen[: peak + 1] == sorted(rates.seen[: peak + 1])
    assert rates.seen[peak:] == sorted(rates.seen[peak:], reverse=True)
    assert rates.seen[-1] < 2e-4
    # What was spent before an interruption counts.
    rest = callbacks.TimeBudget(budget_of(2.0), spent=1.5)
    assert rest.progress == pytest.approx(0.75)
    assert callbacks.TimeBudget(budget_of(2.0), spent=2.5).progress == 1.0


def test_a_loss_that_is_no_number_ends_the_training(data: tuple):
    model = small_model()
    images, labels = data
    broken = np.where(np.arange(32)[:, None, None, None] == 17, np.nan, images)
    message = r"the loss is nan at step 3 of epoch 1: train with a lower --learning_rate,"
    with pytest.raises(callbacks.NonFiniteLossError, match=message):
        model.fit(
            broken,
            labels,
            batch_size=8,
            shuffle=False,
            verbose=0,
            callbacks=[callbacks.FiniteLoss()],
        )


def test_weights_that_are_no_numbers_after_the_last_step_end_the_training(data: tuple):
    model = small_model()
    broken = np.where(np.arange(32)[:, None, None, None] == 17, np.nan, data[0])
    message = r"the loss is nan in the validation of epoch 1: train with a lower --learning_rate,"
    with pytest.raises(callbacks.NonFiniteLossError, match=message):
        model.fit(
            *data,
            validation_data=(broken, data[1]),
            verbose=0,
            callbacks=[callbacks.FiniteLoss()],
        )


def test_learning_rates_of_steps_to_come():
    budget = callbacks.TimeBudget(budget_of(2.0), spent=0.5)
    budget.add(0.1)
    assert budget.seconds_left == pytest.approx(1.4)
    # Up to 1e-3 in the first second, then half a cosine; one step is beyond the end.
    rates = budget.learning_rates(5, 0.4)
    np.testing.assert_allclose(rates, [0.6e-3, 1e-3, 0.6545e-3, 0.0955e-3, 0.0], atol=1e-7)
