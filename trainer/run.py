"""TFX Trainer's `run_fn`: read, build, train, export."""

from __future__ import annotations

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
    losses,
    precision,
    presets,
    warm_start,
)
from trainer import report as reports
from trainer.checkpoint import Checkpoint, History
from trainer.input import make_dataset, read_examples, training_batches
from trainer.network import model
from trainer.network.mixing import Mixing
from trainer.optimizer import compile_network
from trainer.preset import OVERRIDES, Preset, override, replace

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
      train: Gives the batches of the train split from a `first_step` on, with a `mixing`.
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

    @property
    def other_classes(self) -> bool:
        """Whether the model to start from knows other classes than the data."""
        return self.base is not None and self.base.has_other_classes(self.card)

    def steps(self, preset: Preset) -> int:
        """Steps of an epoch."""
        return math.ceil(self.train_examples / preset.training.batch_size)


class Trained(NamedTuple):
    """What a training has made.

    Attributes:
      network: Computes in float32.
      history: Metrics of each epoch.
      answers: See `trainer.known_answers.compute`; of the engine that has trained.
      precision: See `trainer.report.TrainingReport`, as for the rest.
      device: On which.
      devices: How many.
      versions: Of the engine.
    """

    network: keras.Model
    history: list[dict[str, float]]
    answers: dict[str, list[Any]]
    precision: str
    device: str
    devices: int
    versions: Mapping[str, str]


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
    preset, inputs, tuned = prepare(fn_args)
    checkpoints = os.path.join(
        fn_args.custom_config["checkpoint_dir"], run_key(fn_args.custom_config, inputs, tuned)
    )
    network = build_network(preset, inputs)
    start = _evaluated_start(network, inputs, asked_for=fn_args.base_model is not None)
    train = _train_with_jax if inputs.engine == engines.JAX else _train_with_tensorflow
    trained = train(network, inputs, preset, fn_args.model_run_dir, checkpoints)
    export.export_model(
        trained.network,
        inputs.transform_output,
        inputs.card,
        fn_args.serving_model_dir,
        {
            reports.REPORT_FILE: _report(preset, inputs, tuned, start, trained).to_json(),
            known_answers.KNOWN_ANSWERS_FILE: json.dumps(trained.answers, indent=1) + "\n",
        },
    )
    # Only now, so that a full disk while exporting does not cost the training.
    tf.io.gfile.rmtree(checkpoints)


def prepare(fn_args: FnArgs) -> tuple[Preset, Inputs, dict[str, Any]]:
    """Reads all that a training or a search depends on.

    Args:
      fn_args: See `run_fn`.

    Returns:
      The preset with all that is set otherwise; what was read; and what a Tuner has chosen, for
      this training or for the model that it starts from.

    Raises:
      trainer.engines.EngineError: The engine cannot be used.
      trainer.export.ExportError: The transform graph is of other code than this.
      trainer.warm_start.WarmStartError: The model to start from does not fit.
      ValueError: A hyperparameter is out of range, or a split is empty.
    """
    callbacks.return_freed_memory()
    engines.share_gpus()
    config = fn_args.custom_config
    keras.utils.set_random_seed(config["seed"])
    tuned = dict(fn_args.hyperparameters["values"]) if fn_args.hyperparameters else {}
    preset = hyperparameters.apply(configured_preset(config), tuned)
    preset, inputs = read_inputs(fn_args, preset)
    if inputs.base and preset.name == inputs.base.report.preset.name:
        tuned = {**inputs.base.tuned_architecture, **tuned}
    return preset, inputs, tuned


def configured_preset(config: Mapping[str, Any]) -> Preset:
    """Reads the preset and what overrides it out of a component's `custom_config`."""
    preset = override(presets.get_preset(config["preset"]), config["set"])
    return replace(preset, **{name: config[name] for name in OVERRIDES})


def _evaluated_start(
    network: keras.Model, inputs: Inputs, *, asked_for: bool
) -> reports.Start | None:
    """Measures the model that training starts from, and says which it is."""
    base = inputs.base
    if base is None:
        if asked_for:
            print("  no model was pushed yet to start from: training from scratch", flush=True)
        return None
    metrics = network.evaluate(inputs.validation, verbose=0, return_dict=True)
    accuracy = round(metrics["top_1_accuracy"], 6)
    epochs = base.report.epochs
    what = "all but the classifier of " if inputs.other_classes else ""
    print(
        f"  starting from {what}the model pushed last: {epochs} epoch{'s' if epochs > 1 else ''} "
        f"of training, validation top-1 {accuracy:.4f}",
        flush=True,
    )
    return reports.Start(epochs, accuracy)


def _report(
    preset: Preset,
    inputs: Inputs,
    tuned: Mapping[str, Any],
    start: reports.Start | None,
    trained: Trained,
) -> reports.TrainingReport:
    mean, variance = export.channel_statistics(inputs.transform_output)
    versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
    return reports.TrainingReport(
        dataset=inputs.card.name,
        limit=inputs.card.limit,
        subset=inputs.card.subset,
        train_examples=inputs.train_examples,
        preset=preset,
        tuned=tuned or None,
        base_model=start,
        seed=inputs.seed,
        engine=inputs.engine,
        precision=trained.precision,
        device=trained.device,
        devices=trained.devices,
        versions={**trained.versions, **versions},
        trainable_parameters=sum(
            math.prod(variable.shape) for variable in trained.network.trainable_variables
        ),
        normalization=reports.Normalization(tuple(mean.tolist()), tuple(variance.tolist())),
        history=trained.history,
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
    transform, size = (transform_output, card.shape), preset.training.batch_size
    seed = fn_args.custom_config["seed"]
    return preset, Inputs(
        transform_output,
        card,
        functools.partial(training_batches, *train, *transform, batch_size=size, seed=seed),
        train,
        make_dataset(*validation, *transform, batch_size=size),
        validation,
        base,
        seed,
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
            warm_start.load_weights(network, inputs.base, card)
        weights = losses.class_weights(inputs.train_split.labels, card.num_classes)
        steps = inputs.steps(preset)
        compile_network(
            network,
            preset,
            steps_per_epoch=steps,
            class_weights=weights,
            other_classes=inputs.other_classes,
        )
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
    training, budget, steps = preset.training, None, inputs.steps(preset)
    epochs = training.epochs
    if training.train_minutes:
        budget = callbacks.TimeBudget(training, spent)
        epochs = sys.maxsize if budget.progress < 1.0 else finished
    verbose, progress = callbacks.progress(budget)
    mixing = None
    if preset.augmentation.mixes_labels:
        mixing = Mixing(preset.augmentation, inputs.card.num_classes)
    history: dict[str, list[float]] = network.fit(
        inputs.train(first_step=finished * steps, mixing=mixing),
        steps_per_epoch=steps,
        validation_data=inputs.validation,
        initial_epoch=finished,
        epochs=epochs,
        verbose=verbose,
        shuffle=False,  # Keras's own, which data sets do not have and newer ones warn about
        callbacks=[
            *([budget] if budget else []),  # before those that read its metric
            *([keras.callbacks.SwapEMAWeights()] if training.ema_momentum else []),
            callbacks.FiniteLoss(),  # before what keeps the epoch
            *kept,
            callbacks.EpochSeeds(),
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
    policy = network.dtype_policy.name
    network = precision.in_float32(network, preset)
    answers = known_answers.compute(network, inputs.validation_split.images, inputs.validation)
    device = details[0].get("device_name", "GPU") if details else "cpu"
    return Trained(network, history, answers, policy, device, len(details) or 1, {})


def _train_with_jax(
    network: keras.Model, inputs: Inputs, preset: Preset, log_dir: str, checkpoints: str
) -> Trained:
    trained = jax_engine.fit(preset, inputs, checkpoints)
    network.set_weights(trained.weights)
    result = trained.result
    callbacks.log_epochs(result.history, log_dir)
    answers = jax_engine.checked_answers(network, inputs, result)
    how = result.precision, result.device, result.devices, result.versions
    return Trained(network, result.history, answers, *how)


def _fit(
    network: keras.Model, inputs: Inputs, preset: Preset, log_dir: str, checkpoints: str
) -> list[dict[str, float]]:
    """Trains, or trains on; returns the metrics of all epochs and leaves the checkpoints."""
    history = History()
    checkpoint = Checkpoint(checkpoints, history)
    with network.distribute_strategy.scope():
        finished = checkpoint.restore(network)
    if finished:
        callbacks.log_epochs(history.epochs, log_dir)
    timed = finished and preset.training.train_minutes
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
