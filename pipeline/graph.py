"""The pipeline's graph, from raw records to a pushed model.

It reads nothing but its arguments; runners translate their configuration into them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow_model_analysis as tfma
from ml_metadata.proto import metadata_store_pb2
from tensorflow_model_analysis.proto import config_pb2

# Not from `tfx.v1`, which imports the clients of Google Cloud, too: six seconds for every command.
from tfx.components import ExampleValidator, StatisticsGen, Trainer, Transform, Tuner
from tfx.dsl.components.base.base_component import BaseComponent
from tfx.orchestration import pipeline
from tfx.proto import pusher_pb2, trainer_pb2, transform_pb2

from components.baseline.component import Baseline
from components.code import CODE_KEY, fingerprint
from components.converter.component import Converter
from components.data_gate.component import DataGate
from components.evaluator.component import BaselineEvaluator
from components.example_gen.component import ImageExampleGen
from components.pusher.component import AtomicPusher
from components.schema_gen.component import CardSchemaGen
from components.serving_validator.component import ServingValidator
from dataset.card import SPLITS, TEST, TRAIN, VALIDATION
from dataset.interface import Options
from pipeline.gate import METRICS, PRESET_CLASSES, Gate, GateMetric
from serving import client
from trainer.preset import OVERRIDES, Preset, differences
from trainer.presets import get_preset

# With which models are served: they are warmed up for its batch sizes.
BATCHING_FILE = os.path.join(os.path.dirname(client.__file__), "config", "batching.config")

# Dotted paths rather than module files: the package is installed wherever components run, so
# nothing is packed into a wheel and unpacked again. TFX's cache does not see changes behind a
# dotted path, hence the code fingerprints below.
_PREPROCESSING, _TRAINING = "trainer.preprocessing", "trainer"
_PREPROCESSING_FN = f"{_PREPROCESSING}.preprocessing_fn"
_RUN_FN = "trainer.run.run_fn"
_TUNER_FN = "trainer.tuning.tuner_fn"


@dataclass(frozen=True)
class DataSource:
    """The data a pipeline is run on.

    Args:
      folder: What `dataset.source` opens: a folder, a file or a URI.
      name: The data set's.
      fingerprint: Identifies the contents; part of the cache key.
      limit: Keep at most so many examples of each split, class-balanced; None keeps all.
      options: What else decides about the examples.
      classes: How many there are, as far as it is known; presets state their floors for 100.
    """

    folder: str
    name: str
    fingerprint: str
    limit: int | None = None
    options: Options = dataclasses.field(default_factory=Options)
    classes: int = PRESET_CLASSES


@dataclass(frozen=True)
class Tuning:
    """A search for better hyperparameters than the preset's.

    Args:
      trials: How many sets of them to try.
      trial_fraction: How long to train with each, as a fraction of the training's length.
    """

    trials: int
    trial_fraction: float


def create_pipeline(
    *,
    pipeline_name: str,
    pipeline_root: str,
    data: DataSource,
    preset: Preset,
    engine: str,
    seed: int,
    gate: Gate,
    serving_dir: str,
    checkpoint_dir: str,
    tuning: Tuning | None = None,
    warm_start: bool = False,
    exports: Sequence[str] = (),
    enable_cache: bool = True,
    metadata_connection_config: metadata_store_pb2.ConnectionConfig | None = None,
    beam_pipeline_args: Sequence[str] = (),
) -> pipeline.Pipeline:
    """Builds the pipeline.

    Args:
      pipeline_name: Names the pipeline in ML Metadata.
      pipeline_root: Folder or URI for the artifacts.
      data: What to train on.
      preset: The model and how to train it.
      engine: What trains it, of `trainer.engines.ENGINES`.
      seed: Fixes initial weights, shuffling, dropout and augmentation.
      gate: What the model must reach.
      serving_dir: TF Serving's model base path; each push adds a version.
      checkpoint_dir: Folder for the checkpoints from which an interrupted training continues.
      tuning: Search for hyperparameters before training with them; None trains with the preset's.
      warm_start: Start from the weights of the model pushed last, where there is one.
      exports: Formats to push the model in besides SavedModel, of
        `components.converter.formats.FORMATS`; without any there is no Converter.
      enable_cache: Take the outputs of unchanged components from earlier runs.
      metadata_connection_config: ML Metadata's database; None where the orchestrator has its own.
      beam_pipeline_args: Flags for the Beam pipelines inside components.

    Returns:
      The pipeline, to be given to a TFX runner.
    """
    example_gen = ImageExampleGen(
        data.folder,
        dataset_name=data.name,
        content_fingerprint=data.fingerprint,
        limit=data.limit,
        options=data.options,
    ).with_id("ExampleGen")
    examples = example_gen.outputs["examples"]

    schema_gen = CardSchemaGen(examples).with_id("SchemaGen")
    schema = schema_gen.outputs["schema"]
    statistics_gen = StatisticsGen(examples=examples, schema=schema)
    statistics = statistics_gen.outputs["statistics"]
    example_validator = ExampleValidator(statistics=statistics, schema=schema)
    data_gate = DataGate(
        examples=examples,
        statistics=statistics,
        anomalies=example_validator.outputs["anomalies"],
        expected_splits=SPLITS,
    )

    transform = Transform(
        examples=examples,
        schema=schema,
        preprocessing_fn=_PREPROCESSING_FN,
        splits_config=transform_pb2.SplitsConfig(analyze=[TRAIN], transform=[]),
        materialize=False,
        custom_config={CODE_KEY: fingerprint(_PREPROCESSING)},
    )
    transform.add_upstream_node(data_gate)

    training: dict[str, Any] = {
        "examples": examples,
        "schema": schema,
        "transform_graph": transform.outputs["transform_graph"],
        "train_args": trainer_pb2.TrainArgs(splits=[TRAIN]),
        "eval_args": trainer_pb2.EvalArgs(splits=[VALIDATION]),
    }
    changed = differences(preset, get_preset(preset.name))
    overridden = [f"training.{name}" for name in OVERRIDES]
    custom_config = {
        "preset": preset.name,
        "set": {name: value for name, value in changed.items() if name not in overridden},
        **{name: getattr(preset.training, name) for name in OVERRIDES},
        "engine": engine,
        "seed": seed,
        "checkpoint_dir": checkpoint_dir,
        CODE_KEY: fingerprint(_TRAINING),
    }
    before_training: list[BaseComponent] = []
    if warm_start:
        # An input artifact: the cache has no training for a model that was pushed since.
        base_model = Baseline(serving_dir=serving_dir).with_id("BaseModel")
        training["base_model"] = base_model.outputs["baseline"]
        before_training.append(base_model)
    hyperparameters = None
    if tuning:
        tuner = Tuner(
            tuner_fn=_TUNER_FN,
            custom_config={**custom_config, **dataclasses.asdict(tuning)},
            **training,
        )
        hyperparameters = tuner.outputs["best_hyperparameters"]
        before_training.append(tuner)
    trainer = Trainer(
        run_fn=_RUN_FN, custom_config=custom_config, hyperparameters=hyperparameters, **training
    )
    model = trainer.outputs["model"]

    baseline = Baseline(model=model, serving_dir=serving_dir)
    evaluator = BaselineEvaluator(
        examples=examples,
        example_splits=[TEST],
        model=model,
        baseline_model=baseline.outputs["baseline"],
        eval_config=evaluation_config(gate),
    ).with_id("Evaluator")
    serving_validator = ServingValidator(
        model=model, examples=examples, split=TEST, batching_file=BATCHING_FILE
    )
    converter = None
    if exports:
        converter = Converter(
            model=model,
            examples=examples,
            formats=exports,
            split=TEST,
            representative_split=TRAIN,
        )
    pusher = AtomicPusher(
        model_blessing=evaluator.outputs["blessing"],
        infra_blessing=serving_validator.outputs["blessing"],
        push_destination=pusher_pb2.PushDestination(
            filesystem=pusher_pb2.PushDestination.Filesystem(base_directory=serving_dir)
        ),
        exports=converter.outputs["exports"] if converter else None,
    ).with_id("Pusher")

    components: list[BaseComponent] = [
        example_gen,
        schema_gen,
        statistics_gen,
        example_validator,
        data_gate,
        transform,
        *before_training,
        trainer,
        baseline,
        serving_validator,
        evaluator,
        *([converter] if converter else []),
        pusher,
    ]
    return pipeline.Pipeline(
        pipeline_name=pipeline_name,
        pipeline_root=pipeline_root,
        components=components,
        enable_cache=enable_cache,
        metadata_connection_config=metadata_connection_config,
        beam_pipeline_args=list(beam_pipeline_args),
    )


def evaluation_config(gate: Gate) -> tfma.EvalConfig:
    """Says what Evaluator measures, on which slices, and what it takes to be blessed.

    Args:
      gate: The thresholds.

    Returns:
      The gate's metrics over all examples, for each superclass and for each class, and the
      confusion matrix.
    """
    metrics = [
        *(_gate_metric(metric, gate) for metric in METRICS),
        tfma.MetricConfig(class_name="ExampleCount"),
        tfma.MetricConfig(class_name="MultiClassConfusionMatrixPlot"),
    ]
    return tfma.EvalConfig(
        model_specs=[
            tfma.ModelSpec(
                signature_name="serving_examples",
                label_key="label",
                prediction_key="probabilities",
            )
        ],
        slicing_specs=[
            tfma.SlicingSpec(),
            tfma.SlicingSpec(feature_keys=["superclass"]),
            tfma.SlicingSpec(feature_keys=["label"]),
        ],
        metrics_specs=[tfma.MetricsSpec(metrics=metrics)],
    )


def _gate_metric(metric: GateMetric, gate: Gate) -> tfma.MetricConfig:
    change = None
    if metric.compared:
        change = tfma.GenericChangeThreshold(
            direction=tfma.MetricDirection.HIGHER_IS_BETTER,
            absolute={"value": -gate.max_accuracy_drop},
        )
    return tfma.MetricConfig(
        class_name=metric.class_name,
        config=json.dumps({"name": metric.name, **metric.config}),
        # On the slices named alone: a plain `threshold` would hold each class to it, too.
        per_slice_thresholds=[
            config_pb2.PerSliceMetricThreshold(
                slicing_specs=[tfma.SlicingSpec(feature_keys=[metric.by] if metric.by else [])],
                threshold=tfma.MetricThreshold(
                    value_threshold=tfma.GenericValueThreshold(
                        lower_bound={"value": gate.floors[metric.name]}
                    ),
                    change_threshold=change,
                ),
            )
        ],
    )
