"""The notebook's training step as the notebook has it against ours, on a GPU, with JAX.

    .venv/bin/python -m benchmarks.gpu_step --data cifar-100-binary.tar.gz

Needs what `benchmarks/gpu_train.py` needs. A step is augmentation, forward, backward and AdamW on
256 images, compiled by XLA for both, data on the device: the notebook's in float32 through images
of 224 x 224, ours in bfloat16 with what `trainer/fast_layers.py` folds. Both take turns; medians
are printed. The target on a GPU is 8 times the notebook's rate; its own 185 ms a step, which were
TensorFlow's on its author's GPU, are 1,384 images/s.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np

from components.dataset import format as binary
from components.dataset.locate import locate
from trainer import precision, presets
from trainer.on_jax.training import Split, Training

_SIDES = (("notebook", True, "float32"), ("ours", False, "mixed_bfloat16"))


def rates(split: Split, rounds: int) -> dict[str, float]:
    """Times an epoch of either in turn.

    Args:
      split: To train on, at least a batch of it.
      rounds: How often each has its turn, after one that compiles it.

    Returns:
      `notebook` and `ours` -> images per second, median.
    """
    preset = presets.get_preset("notebook")
    trainings, states = {}, {}
    for who, plain, policy in _SIDES:
        with precision.dtype_policy(policy):
            training = Training(preset, split, binary.NUM_FINE_CLASSES, seed=0, plain=plain)
            states[who], _ = training.epoch(training.state(), 0)
        trainings[who] = training
    seconds: dict[str, list[float]] = {who: [] for who in trainings}
    for epoch in range(1, rounds + 1):
        for who, training in trainings.items():
            began = time.perf_counter()
            states[who], _ = training.epoch(states[who], epoch)
            seconds[who].append(time.perf_counter() - began)
    images = trainings["ours"].steps * preset.batch_size
    return {who: images / float(np.median(taken)) for who, taken in seconds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="archive or folder, as for the pipeline")
    parser.add_argument("--steps", type=int, default=100, help="of a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args(argv)
    if min(options.steps, options.rounds) < 1:
        parser.error("--steps and --rounds must be at least 1")
    if keras.config.backend() != "jax":
        parser.error(f"KERAS_BACKEND is {keras.config.backend()}: set it to jax, or unset it")
    with tempfile.TemporaryDirectory() as folder:
        data = locate(options.data, Path(folder)).folder
        images, labels, _ = binary.read_records(data / binary.TRAIN_FILE)
    wanted = options.steps * presets.get_preset("notebook").batch_size
    measured = rates(Split(images[:wanted], labels[:wanted]), options.rounds)
    print(
        f"training on {jax.devices()[0].device_kind}, images/s: notebook in float32 "
        f"{measured['notebook']:,.0f}, ours in bfloat16 {measured['ours']:,.0f}, "
        f"ratio {measured['ours'] / measured['notebook']:.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
