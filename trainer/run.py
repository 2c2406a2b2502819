"""TFX Trainer's `run_fn`: read, build, train, export."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
import tensorflow_transform as tft

from dataset import card as data_card
from dataset.card import DataCard
from trainer import (
    callbacks,
    engines,
    export,
    hyperparameters,
    jax_engine,
    known_answers,
    precision,
    presets,
    schedule,
    warm_start,
)
from trainer.input import make_dataset, mix_batches, read_examples, seed_after
from trainer.network import model
from trainer.network.mixing import Mixing
from trainer.preset import OVERRIDES, Preset

if TYPE_CHECKING:
    from tfx.components.trainer.fn_args_utils import FnArgs


class Split(NamedTuple):
    """Examples as they are on disk.

    Attributes:
      images: String [N], the raw bytes of each.
      labels: int64 [N].
    """

    images: Any
    labels: np.ndarray


class Inputs(NamedTuple):
    """What a training reads, whatever its hyperparameters.

    Attributes:
      transform_output: Transform's result.
      card: Of the data set.
      train: Batches of the train split; `shuffle_seed` gives their order.
      train_split: The same examples, as a tensor.
      validation: Batches of the validation split.
      validation_split: The same examples, as an array.
      base: The model to start from; None to start from random weights.
      seed: Fixes initial weights, dropout and augmentation.
      engine: What trains, of `trainer.engines`.
      compiled: Folder of what JAX has compiled, for later trainings.
    """

    transform_output: tft.TFTransformOutput
    card: DataCard
    train: Callable[..., tf.data.Dataset]
    train_split: Split
    validation: tf.data.Dataset
    validation_split: Split
    base: warm_start.BaseModel | None
    seed: int
    engine: str
    compiled: str

    @property
    def train_examples(self) -> int:
        """Images of the train split."""
        return len(self.train_split.labels)


class Trained(NamedTuple):
    """What a training has made.

    Attributes:
      network: Computes in float32.
      history: Metrics of each epoch.
      answers: See `trainer.known_answers.compute`; of the engine that has trained.
      how: The report's `precision`, `device`, `devices` and `versions`.
    """

    network: keras.Model
    history: list[dict[str, float]]
    answers: dict[str, list[Any]]
    how: dict[str, Any]


def run_fn(fn_args: FnArgs) -> None:
    """Trains a preset on the train split and exports it; TFX's Trainer calls this.

    Continues from the last epoch's checkpoint when an earlier run with the same data,
    hyperparameters and code was interrupted.

    Args:
      fn_args: Of its fields: `train_files`, `eval_files` (the validation split),
        `transform_graph_path`, `serving_model_dir`, `model_run_dir` (TensorBoard logs),
        `base_model` (to start from its weights, if it is there), `hyperparameters` (of Tuner, in
        place of the preset's) and `custom_config` with the keys `preset`, those of
        `trainer.preset.OVERRIDES`, `engine`, `seed` and `checkpoint_dir`.

    Raises:
      trainer.callbacks.NonFiniteLossError: With TensorFlow, the loss is no number any more.
      trainer.engines.EngineError: The engine cannot be used.
      trainer.export.ExportError: The model could not be exported.
      trainer.on_jax.process.TrainingError: The training with JAX failed.
      trainer.warm_start.WarmStartError: The model to start from does not fit.
      ValueError: A hyperparameter is out of range, or a split is empty.
    """
    callbacks.return_freed_memory()
    engines.share_gpus()
    config = fn_args.custom_config
    preset = configured_preset(config)
    tuned = fn_args.hyperparameters["values"] if fn_args.hyperparameters else {}
    preset = hyperparameters.apply(preset, tuned)
    keras.utils.set_random_seed(config["seed"])
    preset, inputs = read_inputs(fn_args, preset)
    base = inputs.base

    network = build_network(preset, inputs)
    start: dict[str, Any] | None = None
    if base:
        metrics = network.evaluate(inputs.validation, verbose=0, return_dict=True)
        accuracy = round(metrics["top_1_accuracy"], 6)
        start = {"epochs": base.epochs, "val_top_1_accuracy": accuracy}
        print(
            f"  starting from the model pushed last: {base.epochs} "
            f"epoch{'s' if base.epochs > 1 else ''} of training, validation top-1 {accuracy:.4f}",
            flush=True,
        )
        if preset.name == base.report["preset"]["name"]:
            tuned = {**base.tuned_architecture, **tuned}
    elif fn_args.base_model is not None:
        print("  no model was pushed yet to start from: training from scratch", flush=True)
    checkpoints = os.path.join(config["checkpoint_dir"], run_key(config, inputs, tuned))
    train = _train_with_jax if inputs.engine == engines.JAX else _train_with_tensorflow
    trained = train(network, inputs, preset, fn_args.model_run_dir, checkpoints)

    mean, variance = export.channel_statistics(inputs.transform_output)
    report = {
        "dataset": inputs.card.name,
        "limit": inputs.card.limit,
        "subset": inputs.card.subset,
        "train_examples": inputs.train_examples,
        "preset": dataclasses.asdict(preset),
        "tuned": dict(tuned) or None,
        "base_model": start,
        "seed": config["seed"],
        "engine": inputs.engine,
        **trained.how,
        "trainable_parameters": sum(
            math.prod(variable.shape) for variable in trained.network.trainable_variables
        ),
        "normalization": {"mean": mean.tolist(), "variance": variance.tolist()},
        "history": trained.history,
    }
    report["versions"] |= {"tensorflow": tf.__version__, "keras": keras.__version__}
    export.export_model(
        trained.network,
        inputs.transform_output,
        inputs.card,
        fn_args.serving_model_dir,
        {
            export.TRAINING_REPORT_FILE: report,
            known_answers.KNOWN_ANSWERS_FILE: trained.answers,
        },
    )
    # Only now, so that a full disk while exporting does not cost the training.
    tf.io.gfile.rmtree(checkpoints)


def configured_preset(config: Mapping[str, Any]) -> Preset:
    """Reads the preset and what overrides it out of a component's `custom_config`."""
    return dataclasses.replace(
        presets.get_preset(config["preset"]), **{name: config[name] for name in OVERRIDES}
    )


def read_inputs(fn_args: FnArgs, preset: Preset) -> tuple[Preset, Inputs]:
    """Reads what is to be trained on, and from what.

    Args:
      fn_args: See `run_fn`.
      preset: What is to be trained.

    Returns:
      The preset, as `warm_start.BaseModel.adapt` gives it; and what was read.

    Raises:
      trainer.engines.EngineError: The engine cannot be used.
      trainer.export.ExportError: The transform graph is of other code than this.
      trainer.warm_start.WarmStartError: The model to start from does not fit.
      ValueError: A split is empty.
    """
    engine = engines.choose(fn_args.custom_config["engine"])
    card = read_card(fn_args.train_files[0])
    base = warm_start.read_base_model(fn_args.base_model)
    if base:
        preset = base.adapt(preset, card)
    transform_output = tft.TFTransformOutput(fn_args.transform_graph_path)
    export.check_parity(transform_output)  # now, rather than after hours of training
    images, labels = read_examples(fn_args.train_files)
    train = Split(tf.constant(images), labels)
    del images  # 150 MB; the tensor is a copy
    validation = Split(*read_examples(fn_args.eval_files))
    transform = transform_output, card.shape
    return preset, Inputs(
        transform_output,
        card,
        functools.partial(make_dataset, *train, *transform, batch_size=preset.batch_size),
        train,
        make_dataset(*validation, *transform, batch_size=preset.batch_size),
        validation,
        base,
        fn_args.custom_config["seed"],
        engine,
        os.path.join(fn_args.custom_config["checkpoint_dir"], "compiled"),
    )


def build_network(preset: Preset, inputs: Inputs) -> keras.Model:
    """Builds the model on all devices, ready to be trained.

    Args:
      preset: The model and how to train it.
      inputs: What it is to be trained on; with the weights to start from, if any. Where JAX trains,
        the model computes in float32, ready for its weights.
    """
    policy = "float32"
    if inputs.engine == engines.TENSORFLOW:
        policy = precision.policy_name(preset, on_gpu=bool(tf.config.list_logical_devices("GPU")))
    with _strategy().scope(), precision.dtype_policy(policy):
        card = inputs.card
        network = model.build_model(preset, card.shape, card.num_classes, seed=inputs.seed)
        if inputs.base:
            warm_start.load_weights(network, inputs.base)
        steps = math.ceil(inputs.train_examples / preset.batch_size)
        schedule.compile_network(network, preset, steps_per_epoch=steps)
    return network


def read_card(train_pattern: str) -> DataCard:
    """Reads the data card.

    Args:
      train_pattern: A glob of a split's files; the card lies beside the split's folder.
    """
    # Written by components/example_gen beside the splits' folders.
    path = os.path.join(os.path.dirname(os.path.dirname(train_pattern)), data_card.CARD_FILE)
    with tf.io.gfile.GFile(path) as file:
        return data_card.from_json(file.read(), path)


def _strategy() -> tf.distribute.Strategy:
    """All GPUs of this machine, one GPU or the CPU: whatever TensorFlow sees."""
    if len(tf.config.list_logical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


def fit(
    network: keras.Model,
    inputs: Inputs,
    preset: Preset,
    kept: Sequence[keras.callbacks.Callback] = (),
    *,
    finished: int = 0,
    spent: float = 0.0,
) -> dict[str, list[float]]:
    """Trains as long as the preset says.

    Args:
      network: Of `build_network`.
      inputs: What to train on.
      preset: The model's.
      kept: Callbacks that keep what becomes of it.
      finished: Epochs that were trained before an interruption.
      spent: Seconds that were.

    Returns:
      Metric -> its values after each epoch that was trained now.
    """
    epochs, budget = preset.epochs, None
    if preset.train_minutes:
        budget = callbacks.TimeBudget(preset, spent)
        epochs = sys.maxsize if budget.progress < 1.0 else finished
    verbose, progress = callbacks.progress(budget)
    seed = seed_after(inputs.seed, finished)
    train = inputs.train(shuffle_seed=seed)
    if preset.mixes_labels:
        train = mix_batches(train, Mixing(preset, inputs.card.num_classes), seed=seed)
    history: dict[str, list[float]] = network.fit(
        train,
        validation_data=inputs.validation,
        initial_epoch=finished,
        epochs=epochs,
        verbose=verbose,
        shuffle=False,  # Keras's own, which data sets do not have and newer ones warn about
        callbacks=[
            *([budget] if budget else []),  # before those that read its metric
            *([keras.callbacks.SwapEMAWeights()] if preset.ema_momentum else []),
            *kept,
            callbacks.EpochSeeds(),
            callbacks.FiniteLoss(),
            callbacks.ReturnMemory(),
            *progress,
        ],
    ).history
    return history


def _train_with_tensorflow(
    network: keras.Model, inputs: Inputs, preset: Preset, log_dir: str, checkpoints: str
) -> Trained:
    history = _fit(network, inputs, preset, log_dir, checkpoints)
    details = [
        tf.config.experimental.get_device_details(gpu)
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    how = {
        "precision": network.dtype_policy.name,
        "device": details[0].get("device_name", "GPU") if details else "cpu",
        "devices": len(details) or 1,
        "versions": {},
    }
    network = precision.in_float32(network, preset)
    answers = known_answers.compute(network, inputs.validation_split.images, inputs.validation)
    return Trained(network, history, answers, how)


def _train_with_jax(
    network: keras.Model, inputs: Inputs, preset: Preset, log_dir: str, checkpoints: str
) -> Trained:
    trained = jax_engine.fit(preset, inputs, checkpoints)
    network.set_weights(trained.weights)
    result = trained.result
    callbacks.log_epochs(result.history, log_dir)
    how = {
        "precision": result.precision,
        "device": result.device,
        "devices": result.devices,
        "versions": dict(result.versions),
    }
    answers = jax_engine.checked_answers(network, inputs, result)
    return Trained(network, result.history, answers, how)


def _fit(
    network: keras.Model, inputs: Inputs, preset: Preset, log_dir: str, checkpoints: str
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
    timed = finished and preset.train_minutes
    fit(
        network,
        inputs,
        preset,
        [history, checkpoint, keras.callbacks.TensorBoard(log_dir, write_graph=False)],
        finished=finished,
        spent=history.epochs[-1]["training_seconds"] if timed else 0.0,
    )
    return history.epochs


def run_key(config: Mapping[str, Any], inputs: Inputs, tuned: Mapping[str, Any]) -> str:
    """Names the checkpoints of one training: same data, hyperparameters and code, same name.

    The artifacts' paths do not count, which are new ones in a run without the cache, nor does the
    engine: either goes on from the other's checkpoints.
    """
    base = inputs.base.fingerprint() if inputs.base else None
    config = {name: value for name, value in config.items() if name != "engine"}
    what = json.dumps((config, inputs.card.to_json(), tuned, base), sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:16]
