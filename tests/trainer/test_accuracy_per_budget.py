"""The benchmark's training: as many steps as were asked for, also after an interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import accuracy_per_budget
from trainer.preset import replace
from trainer.presets import get_preset


def test_steps_are_cut_into_epochs_of_about_a_pass():
    preset, steps = accuracy_per_budget.budgeted(get_preset("compact"), 1885)
    assert (preset.training.epochs, steps) == (5, 377)
    preset, steps = accuracy_per_budget.budgeted(get_preset("compact"), 7)
    assert (preset.training.epochs, steps) == (1, 7)


def test_an_interrupted_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    draw = np.random.default_rng(0)
    images = draw.normal(size=(64, 32, 32, 3)).astype(np.float32)
    labels = draw.integers(100, size=64)
    examples = tf.data.Dataset.from_tensor_slices((images, labels))
    first_steps = []

    def train(first_step: int) -> tf.data.Dataset:
        first_steps.append(first_step)
        return examples.shuffle(64, seed=first_step).batch(16).repeat()

    datasets = {"train": train, "validation": examples.batch(32), "test": examples.batch(32)}
    tiny = get_preset("tiny")
    preset = replace(tiny, batch_size=16, learning_rate_schedule="constant", epochs=1)
    accuracy_per_budget.train_and_test(preset, 6, datasets, tmp_path)
    assert "continuing" not in capsys.readouterr().out
    longer = replace(preset, epochs=3)
    result = accuracy_per_budget.train_and_test(longer, 6, datasets, tmp_path)
    assert "continuing after epoch 1" in capsys.readouterr().out
    assert [epoch["epoch"] for epoch in result["history"]] == [1, 2, 3]
    assert result["history"][2]["loss"] < result["history"][0]["loss"]
    assert result["parameters"] == 63_172 and len(result["test"]) == 3
    assert first_steps == [0, 6]
