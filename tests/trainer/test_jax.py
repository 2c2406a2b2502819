"""The model trains on the JAX backend, and needs no TensorFlow to do it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support import patience

ROOT = Path(__file__).resolve().parents[2]

# Runs in its own process, because a process has one backend. Prints one JSON line.
SCRIPT = """
import dataclasses, json, sys
import keras
import numpy as np
from trainer.network.model import build_model
from trainer.preset import replace
from trainer.presets import get_preset
from trainer.optimizer import build_optimizer

def train(preset, steps):
    model = build_model(preset, (32, 32, 3), 100, seed=0)
    model.compile(
        build_optimizer(preset.training, steps_per_epoch=steps),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 100, size=preset.training.batch_size)
    # A colour and noise per class: learnable, so the loss of a working model falls.
    colours = generator.normal(size=(100, 1, 1, 3))
    images = colours[labels] + 0.1 * generator.normal(size=(preset.training.batch_size, 32, 32, 3))
    images = images.astype("float32")
    logits = model.predict_on_batch(images)
    before = model.get_weights()
    losses = [float(model.train_on_batch(images, labels)) for _ in range(steps)]
    moved = {w.path: bool((a != w).any()) for a, w in zip(before, model.weights, strict=True)}
    return {
        "losses": losses,
        "moved": moved,
        "jit_compile": model.jit_compile,
        "logits_shape": list(logits.shape),
    }

tiny = replace(get_preset("tiny"), learning_rate=3e-3)
notebook = replace(get_preset("notebook"), transformer_layers=1, batch_size=4)
print(json.dumps({
    "backend": keras.config.backend(),
    "tiny": train(tiny, 40),
    "notebook": train(notebook, 1),
    "tensorflow_imported": "tensorflow" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def result() -> dict:
    process = patience.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        cpu_seconds=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_runs_on_jax_without_tensorflow(result: dict) -> None:
    assert result["backend"] == "jax"
    assert not result["tensorflow_imported"]


def test_tiny_learns_a_fixed_batch(result: dict) -> None:
    losses = result["tiny"]["losses"]
    assert all(0.0 < loss < 20.0 for loss in losses)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_notebook_takes_a_step(result: dict) -> None:
    assert result["notebook"]["logits_shape"] == [4, 100]
    (loss,) = result["notebook"]["losses"]
    assert 0.0 < loss < 20.0


@pytest.mark.parametrize("preset", ["tiny", "notebook"])
def test_every_weight_changes_in_one_compiled_program(result: dict, preset: str) -> None:
    assert result[preset]["jit_compile"] is True
    still = [path for path, moved in result[preset]["moved"].items() if not moved]
    # A key's bias adds the same to the scores of all keys, which a softmax cancels.
    assert still == (["block_0/attention/key/bias"] if preset == "notebook" else [])
