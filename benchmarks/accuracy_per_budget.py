"""Accuracy for a share of the time that the notebook's training takes on the same machine.

    .venv/bin/python benchmarks/accuracy_per_budget.py --data cifar-100.tar.gz --fraction 0.04

T_nb is the time of the notebook's 20 epochs, 176 steps of 256 images each, in its own code path
with its own augmentation, from its step time here. The step of the preset to train is timed in turn
with it, in one process, so that what else happens on the machine happens to both; the training is
as many of those steps as fit into the asked fraction of T_nb. Other processes then make it take
longer (the printed time tells), but not learn more. An interrupted training goes on after its last
epoch; a folder that has another preset's, data's or code's is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from serving.quiet import quiet_tensorflow

with quiet_tensorflow():
    import keras
    import numpy as np
    import tensorflow as tf

    from benchmarks.train_step import (
        Call,
        alternate,
        build_calls,
        matmul_gflops,
        transform_graph,
    )
    from components.code import fingerprint
    from dataset.format import (
        IMAGE_SHAPE,
        NUM_FINE_CLASSES,
        TEST_FILE,
        TRAIN_FILE,
        read_records,
    )
    from dataset.locate import locate
    from trainer import callbacks, precision, presets
    from trainer.checkpoint import Checkpoint, History
    from trainer.input import make_dataset, raw_bytes, training_batches
    from trainer.network import model
    from trainer.network.mixing import Mixing
    from trainer.optimizer import compile_network
    from trainer.preset import Preset, replace

_TRAIN_IMAGES = 45_000  # as in the notebook; the other 5,000 are for validation
_ANALYZED = 2_000
_NOTEBOOK_STEPS = 20 * 176
_NOTEBOOK_BATCH = 256
_STEPS_PER_CALL = 16
_ROUNDS = 6

Arrays = tuple[np.ndarray, np.ndarray]


def build(preset: Preset, steps_per_epoch: int) -> keras.Model:
    """The preset's network, compiled as the pipeline's Trainer does it."""
    policy = precision.policy_name(preset, on_gpu=bool(tf.config.list_logical_devices("GPU")))
    with precision.dtype_policy(policy):
        network = model.build_model(preset, IMAGE_SHAPE, NUM_FINE_CLASSES, seed=0)
        compile_network(network, preset, steps_per_epoch=steps_per_epoch)
    return network


def measure(preset: Preset, train: tf.data.Dataset, arrays: Arrays) -> dict[str, float]:
    """Times a training step of the notebook's and of the preset's, in turn.

    Args:
      preset: The one to train.
      train: Its batches.
      arrays: Training images and labels.

    Returns:
      `notebook_step` and `preset_step` in seconds, the least of all rounds; `t_nb` in seconds;
      `gflops` of float32 matrix products.
    """
    images, labels = arrays
    name = f"notebook training, batch {_NOTEBOOK_BATCH}"
    notebook = build_calls(images[:_NOTEBOOK_BATCH], labels[:_NOTEBOOK_BATCH])[name]
    network = build(preset, steps_per_epoch=_STEPS_PER_CALL)
    batches = train.take(_STEPS_PER_CALL)
    # A whole call of `fit`, which is more than its steps: its own time counts against the preset.
    ours = Call(
        lambda: network.fit(batches, verbose=0, shuffle=False),
        _STEPS_PER_CALL * preset.training.batch_size,
        1,
    )
    timings = alternate({"notebook": notebook, "preset": ours}, _ROUNDS)
    return {
        "notebook_step": timings["notebook"].seconds,
        "preset_step": timings["preset"].seconds / _STEPS_PER_CALL,
        "t_nb": timings["notebook"].seconds * _NOTEBOOK_STEPS,
        "gflops": matmul_gflops(),
    }


def budgeted(preset: Preset, steps: int) -> tuple[Preset, int]:
    """Cuts so many steps into epochs of about one pass over the images.

    Returns:
      The preset with its number of epochs, and the steps of each.
    """
    epochs = max(1, round(steps * preset.training.batch_size / _TRAIN_IMAGES))
    return replace(preset, epochs=epochs), steps // epochs


def train_and_test(
    preset: Preset,
    steps_per_epoch: int,
    datasets: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Trains, or trains on, and evaluates.

    Args:
      preset: With as many epochs as are to be trained.
      steps_per_epoch: Steps of each.
      datasets: `train`, from a step on, `validation` and `test`.
      folder: For the checkpoints.

    Returns:
      `history`, and `test`: (loss, top-1, top-5).
    """
    network = build(preset, steps_per_epoch)
    history = History()
    checkpoint = Checkpoint(str(folder), history)
    finished = checkpoint.restore(network)
    network.fit(
        datasets["train"](finished * steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        validation_data=datasets["validation"],
        initial_epoch=finished,
        epochs=preset.training.epochs,
        verbose=0,
        shuffle=False,
        callbacks=[
            _TrainingSeconds(),
            *([keras.callbacks.SwapEMAWeights()] if preset.training.ema_momentum else []),
            history,
            checkpoint,
            callbacks.EpochSeeds(),
            callbacks.ProgressLines(),
        ],
    )
    network = precision.in_float32(network, preset)
    network.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.SparseCategoricalAccuracy(),
            keras.metrics.SparseTopKCategoricalAccuracy(k=5),
        ],
    )
    return {
        "history": history.epochs,
        "parameters": sum(int(np.prod(w.shape)) for w in network.trainable_weights),
        "test": network.evaluate(datasets["test"], verbose=0),
    }


class _TrainingSeconds(keras.callbacks.Callback):
    """Adds to an epoch's metrics how long its steps took: wall time, and CPU time of all cores."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._began = time.monotonic(), time.process_time()

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        wall, cpu = self._began
        self._took = time.monotonic() - wall, time.process_time() - cpu

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if logs is not None:
            logs["training_seconds"], logs["cpu_seconds"] = self._took


def report(preset: Preset, fraction: float, measured: dict[str, float], result: dict) -> str:
    """Lays out what was measured."""
    history = result["history"]
    curve = "  ".join(f"{epoch['val_top_1_accuracy']:.3f}" for epoch in history)
    wall, cpu = (sum(e[key] for e in history) / 60 for key in ("training_seconds", "cpu_seconds"))
    budget = fraction * measured["t_nb"] / 60
    last = history[-1]
    return (
        f"{os.cpu_count()} cores, {measured['gflops']:.0f} GFLOPS in float32 matrix products\n"
        f"T_nb {measured['t_nb'] / 60:.1f} min ({measured['notebook_step']:.3f} s a step of 256); "
        f"{preset.name} {preset.training.batch_size / measured['preset_step']:.0f} images/s\n"
        f"budget {fraction:.4f} T_nb = {budget:.1f} min = {preset.training.epochs} epochs; in "
        f"{wall:.1f} min, {cpu:.1f} CPU minutes\n"
        f"validation top-1 by epoch  {curve}\n"
        f"{preset.name}, {result['parameters']:,} parameters: validation "
        f"{last['val_top_1_accuracy']:.4f} / {last['val_top_5_accuracy']:.4f}, "
        f"test {result['test'][1]:.4f} / {result['test'][2]:.4f}"
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="as for the pipeline")
    parser.add_argument("--fraction", type=float, required=True, help="of T_nb, 0.04 for a 25th")
    parser.add_argument("--preset", default=presets.ON_CPU, help="default: %(default)s")
    parser.add_argument(
        "--work_dir", default="output/accuracy_per_budget", help="default: %(default)s"
    )
    options = parser.parse_args()
    if not 0 < options.fraction < float("inf"):
        parser.error(f"--fraction is {options.fraction}: it must be above 0")
    preset = presets.get_preset(options.preset)
    work = Path(options.work_dir)
    folder = work / f"{preset.name}-{options.fraction:.4f}"
    folder.mkdir(parents=True, exist_ok=True)

    dataset = locate(options.data, work)
    what = {
        "preset": json.loads(json.dumps(dataclasses.asdict(preset))),
        "data": dataset.fingerprint,
        "code": fingerprint("trainer"),
    }
    images, labels, _ = read_records(dataset.folder / TRAIN_FILE)
    test_images, test_labels, _ = read_records(dataset.folder / TEST_FILE)
    split = slice(None, _TRAIN_IMAGES), slice(_TRAIN_IMAGES, None)
    graph_folder = tempfile.TemporaryDirectory(dir=work)
    # Of so many images mean and variance are known to half a percent.
    graph = transform_graph(images[:_ANALYZED], labels[:_ANALYZED], Path(graph_folder.name))
    train_images = tf.constant(raw_bytes(images[split[0]]))

    def train(first_step: int) -> tf.data.Dataset:
        mixes = preset.augmentation.mixes_labels
        return training_batches(
            train_images,
            labels[split[0]],
            graph,
            IMAGE_SHAPE,
            batch_size=preset.training.batch_size,
            seed=0,
            first_step=first_step,
            mixing=Mixing(preset.augmentation, NUM_FINE_CLASSES) if mixes else None,
        )

    datasets = {
        "train": train,
        "validation": make_dataset(
            raw_bytes(images[split[1]]), labels[split[1]], graph, IMAGE_SHAPE, batch_size=500
        ),
        "test": make_dataset(
            raw_bytes(test_images), test_labels, graph, IMAGE_SHAPE, batch_size=500
        ),
    }

    measurement = folder / "measurement.json"
    if not measurement.is_file():
        measured = measure(preset, train(0), (images, labels))
        partial = measurement.with_name("partial.json")
        partial.write_text(json.dumps({**measured, "of": what}, indent=1) + "\n")
        partial.replace(measurement)
    measured = json.loads(measurement.read_text())
    if measured.get("of") != what:
        parser.error(
            f"{folder} has a training of another preset, other data or other code: remove it, or "
            "give another --work_dir"
        )
    steps = int(options.fraction * measured["t_nb"] / measured["preset_step"])
    preset, steps_per_epoch = budgeted(preset, max(1, steps))
    print(
        f"T_nb {measured['t_nb'] / 60:.1f} min, {measured['gflops']:.0f} GFLOPS; {preset.name}: "
        f"{preset.training.epochs} epochs of {steps_per_epoch} steps",
        flush=True,
    )
    result = train_and_test(preset, steps_per_epoch, datasets, folder)
    text = report(preset, options.fraction, measured, result)
    (folder / "result.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
