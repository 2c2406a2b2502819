"""TFX Trainer's `run_fn`: read, build, train, export."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
import tensorflow_transform as tft

from trainer import callbacks, export, known_answers, model, precision, presets, schedule
from trainer.input import make_dataset, mix_batches, read_examples
from trainer.mixing import Mixing
from trainer.preset import OVERRIDES, Preset

if TYPE_CHECKING:
    from tfx.components.trainer.fn_args_utils import FnArgs

# Written by components/example_gen beside the splits' folders.
DATASET_CARD_FILE = "dataset.json"
TRAINING_REPORT_FILE = "training.json"


def run_fn(fn_args: FnArgs) -> None:
    """Trains a preset on the train split and exports it; TFX's Trainer calls this.

    Continues from the last epoch's checkpoint when an earlier run with the same data,
    hyperparameters and code was interrupted.

    Args:
      fn_args: Of its fields: `train_files`, `eval_files` (the validation split),
        `transform_graph_path`, `serving_model_dir`, `model_run_dir` (TensorBoard logs) and
        `custom_config` with the keys `preset`, those of `trainer.preset.OVERRIDES`, `seed` and
        `checkpoint_dir`.

    Raises:
      trainer.export.ExportError: The model could not be exported.
      ValueError: A hyperparameter is out of range, or a split is empty.
    """
    callbacks.return_freed_memory()
    config = fn_args.custom_config
    preset = dataclasses.replace(
        presets.get_preset(config["preset"]), **{name: config[name] for name in OVERRIDES}
    )
    keras.utils.set_random_seed(config["seed"])
    card = read_dataset_card(fn_args.train_files[0])

    transform_output = tft.TFTransformOutput(fn_args.transform_graph_path)
    export.check_parity(transform_output)  # now, rather than after hours of training
    images, labels = read_examples(fn_args.train_files)
    train = make_dataset(
        images,
        labels,
        transform_output,
        batch_size=preset.batch_size,
        shuffle_seed=config["seed"],
    )
    del images  # 150 MB; the dataset holds a copy
    validation_images, validation_labels = read_examples(fn_args.eval_files)
    validation = make_dataset(
        validation_images, validation_labels, transform_output, batch_size=preset.batch_size
    )

    classes = len(card["fine_label_names"])
    if preset.mixes_labels:
        train = mix_batches(train, Mixing(preset, classes), seed=config["seed"])
    policy = precision.policy_name(preset, on_gpu=bool(tf.config.list_logical_devices("GPU")))
    with _strategy().scope(), precision.dtype_policy(policy):
        network = model.build_model(preset, num_classes=classes, seed=config["seed"])
        network.compile(
            optimizer=schedule.build_optimizer(preset, steps_per_epoch=len(train)),
            loss=schedule.build_loss(preset),
            metrics=schedule.build_metrics(preset),
        )
    checkpoints = os.path.join(config["checkpoint_dir"], _run_key(config, card))
    history = _fit(network, train, validation, preset, fn_args.model_run_dir, checkpoints)
    network = precision.in_float32(network, preset)

    mean, variance = export.channel_statistics(transform_output)
    report = {
        "dataset": card["name"],
        "limit": card["limit"],
        "subset": card["subset"],
        "train_examples": len(labels),
        "preset": dataclasses.asdict(preset),
        "seed": config["seed"],
        "precision": policy,
        "trainable_parameters": sum(math.prod(v.shape) for v in network.trainable_variables),
        "normalization": {"mean": mean.tolist(), "variance": variance.tolist()},
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
        "history": history,
    }
    export.export_model(
        network,
        transform_output,
        export.class_names(card),
        fn_args.serving_model_dir,
        {
            TRAINING_REPORT_FILE: report,
            DATASET_CARD_FILE: card,
            known_answers.KNOWN_ANSWERS_FILE: known_answers.compute(
                network, validation_images, validation
            ),
        },
    )
    # Only now, so that a full disk while exporting does not cost the training.
    tf.io.gfile.rmtree(checkpoints)


def read_dataset_card(train_pattern: str) -> dict[str, Any]:
    """Reads the data set's name and class names.

    Args:
      train_pattern: A glob of a split's files; the card lies beside the split's folder.
    """
    path = os.path.join(os.path.dirname(os.path.dirname(train_pattern)), DATASET_CARD_FILE)
    with tf.io.gfile.GFile(path) as file:
        return json.loads(file.read())


def _strategy() -> tf.distribute.Strategy:
    """All GPUs of this machine, one GPU or the CPU: whatever TensorFlow sees."""
    if len(tf.config.list_logical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def _fit(
    network: keras.Model,
    train: tf.data.Dataset,
    validation: tf.data.Dataset,
    preset: Preset,
    log_dir: str,
    checkpoints: str,
) -> list[dict[str, float]]:
    """Trains, or trains on; returns the metrics of all epochs and leaves the checkpoints."""
    history = callbacks.HistoryFile(f"{checkpoints}/history.json")
    checkpoint = callbacks.Checkpoint(checkpoints)
    with network.distribute_strategy.scope():
        finished = checkpoint.restore(network)
    if finished:
        history.restore(finished)
        callbacks.log_epochs(history.epochs, log_dir)
        print(f"  continuing after epoch {finished}", flush=True)
    epochs, budget = preset.epochs, None
    if preset.train_minutes:
        spent = history.epochs[-1]["training_seconds"] if finished else 0.0
        budget = callbacks.TimeBudget(preset, spent)
        epochs = sys.maxsize if budget.progress < 1.0 else finished
    verbose, progress = callbacks.progress(budget)
    network.fit(
        train,
        validation_data=validation,
        # The order of the examples starts anew from that of epoch 1.
        initial_epoch=finished,
        epochs=epochs,
        verbose=verbose,
        callbacks=[
            *([budget] if budget else []),  # before those that read its metric
            *([keras.callbacks.SwapEMAWeights()] if preset.ema_momentum else []),
            history,
            checkpoint,
            callbacks.EpochSeeds(),
            callbacks.ReturnMemory(),
            keras.callbacks.TensorBoard(log_dir, write_graph=False),
            *progress,
        ],
    )
    return history.epochs


def _run_key(config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """Names the checkpoints of one training: same data, hyperparameters and code, same name.

    The artifacts' paths do not count, which are new ones in a run without the cache.
    """
    what = json.dumps((config, card), sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:16]
