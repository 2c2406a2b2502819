import json
from typing import Any

import pytest
from google.protobuf import json_format
from tfx import v1 as tfx
from tfx.dsl.compiler.compiler import Compiler
from tfx.proto import transform_pb2
from tfx.proto.orchestration import pipeline_pb2
from tfx.utils import json_utils

from components.code import fingerprint
from pipeline.gate import TOP_1, TOP_5, Gate
from pipeline.graph import DataSource, Tuning, create_pipeline, evaluation_config
from trainer.preset import replace
from trainer.presets import get_preset

COMPONENTS = [
    "ExampleGen",
    "SchemaGen",
    "StatisticsGen",
    "ExampleValidator",
    "DataGate",
    "Transform",
    "Trainer",
    "Baseline",
    "ServingValidator",
    "Evaluator",
    "Pusher",
]


def build(**changes: Any) -> tfx.dsl.Pipeline:
    arguments: dict[str, Any] = {
        "pipeline_name": "vit",
        "pipeline_root": "/pipelines/vit",
        "data": DataSource(folder="/data", name="cifar-100", fingerprint="f00d", limit=1000),
        "preset": replace(get_preset("notebook"), epochs=3, batch_size=64, random_erasing=0.2),
        "engine": "auto",
        "seed": 7,
        "gate": Gate({TOP_1: 0.25, TOP_5: 0.5}, max_accuracy_drop=0.02),
        "serving_dir": "/serving/vit",
        "checkpoint_dir": "/checkpoints",
        "beam_pipeline_args": ["--direct_num_workers=1"],
    }
    return create_pipeline(**{**arguments, **changes})


def nodes(pipeline: tfx.dsl.Pipeline) -> dict[str, pipeline_pb2.PipelineNode]:
    compiled = Compiler().compile(pipeline)
    return {node.pipeline_node.node_info.id: node.pipeline_node for node in compiled.nodes}


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    return {component.id: component for component in build().components}


@pytest.fixture(scope="module")
def compiled() -> dict[str, pipeline_pb2.PipelineNode]:
    return nodes(build())


def test_components_and_their_names():
    assert [component.id for component in build().components] == COMPONENTS


def test_no_component_runs_before_those_it_depends_on(
    compiled: dict[str, pipeline_pb2.PipelineNode],
):
    order = list(compiled)
    assert sorted(order) == sorted(COMPONENTS)
    for name, node in compiled.items():
        assert all(order.index(upstream) < order.index(name) for upstream in node.upstream_nodes)


@pytest.mark.parametrize(
    ("component", "upstream"),
    [
        ("ExampleGen", []),
        ("SchemaGen", ["ExampleGen"]),
        ("StatisticsGen", ["ExampleGen", "SchemaGen"]),
        ("ExampleValidator", ["SchemaGen", "StatisticsGen"]),
        ("DataGate", ["ExampleGen", "ExampleValidator", "StatisticsGen"]),
        ("Transform", ["DataGate", "ExampleGen", "SchemaGen"]),
        ("Trainer", ["ExampleGen", "SchemaGen", "Transform"]),
        ("Baseline", ["Trainer"]),
        ("Evaluator", ["Baseline", "ExampleGen", "Trainer"]),
        ("ServingValidator", ["ExampleGen", "Trainer"]),
        # The model that is pushed is the one that was served.
        ("Pusher", ["Evaluator", "ServingValidator"]),
    ],
)
def test_edges(compiled: dict[str, pipeline_pb2.PipelineNode], component: str, upstream: list[str]):
    assert sorted(compiled[component].upstream_nodes) == upstream


def test_exports_are_converted_from_trainers_model_and_given_to_pusher():
    pipeline = build(exports=("tflite", "onnx"))
    converter = {component.id: component for component in pipeline.components}["Converter"]
    assert converter.exec_properties["formats"] == "tflite,onnx"
    assert converter.exec_properties["split"] == "test"
    assert converter.exec_properties["representative_split"] == "train"
    compiled = nodes(pipeline)
    assert list(compiled)[-1] == "Pusher"
    assert set(compiled) == {*COMPONENTS, "Converter"}
    assert sorted(compiled["Converter"].upstream_nodes) == ["ExampleGen", "Trainer"]
    upstream = ["Converter", "Evaluator", "ServingValidator"]
    assert sorted(compiled["Pusher"].upstream_nodes) == upstream


def test_no_resolver_which_kubeflow_pipelines_could_not_run(
    compiled: dict[str, pipeline_pb2.PipelineNode],
):
    kinds = {node.node_info.type.name for node in compiled.values()}
    assert len(kinds) == len(COMPONENTS)
    assert not [kind for kind in kinds if "resolver" in kind.lower() or "importer" in kind.lower()]


def test_transform_analyses_the_training_split_alone_and_materialises_nothing(
    components: dict[str, Any],
):
    properties = components["Transform"].exec_properties
    splits = json_format.Parse(properties["splits_config"], transform_pb2.SplitsConfig())
    assert list(splits.analyze) == ["train"]
    assert list(splits.transform) == []
    assert "transformed_examples" not in components["Transform"].outputs


def test_trainer_sees_train_and_validation_and_evaluator_test_alone(components: dict[str, Any]):
    properties = components["Trainer"].exec_properties
    assert json.loads(properties["train_args"])["splits"] == ["train"]
    assert json.loads(properties["eval_args"])["splits"] == ["validation"]
    splits = json_utils.loads(components["Evaluator"].exec_properties["example_splits"])
    assert splits == ["test"]


def test_settings_reach_their_components(components: dict[str, Any]):
    example_gen = components["ExampleGen"].exec_properties
    assert example_gen["input_base"] == "/data"
    assert example_gen["dataset_name"] == "cifar-100"
    assert example_gen["content_fingerprint"] == "f00d"
    assert example_gen["limit"] == 1000
    preset = get_preset("notebook")
    assert json_utils.loads(components["Trainer"].exec_properties["custom_config"]) == {
        "preset": "notebook",
        "set": {"augmentation.random_erasing": 0.2},
        "epochs": 3,
        "train_minutes": 0.0,
        "batch_size": 64,
        "learning_rate": preset.training.learning_rate,
        "weight_decay": preset.training.weight_decay,
        "engine": "auto",
        "seed": 7,
        "checkpoint_dir": "/checkpoints",
        "code": fingerprint("trainer"),
    }
    assert json_utils.loads(components["Transform"].exec_properties["custom_config"]) == {
        "code": fingerprint("trainer.preprocessing")
    }
    assert components["Baseline"].exec_properties["serving_dir"] == "/serving/vit"
    destination = json.loads(components["Pusher"].exec_properties["push_destination"])
    assert destination == {"filesystem": {"base_directory": "/serving/vit"}}
    validator = components["ServingValidator"].exec_properties
    assert validator["split"] == "test"
    assert "allowed_batch_sizes: 32" in validator["batching_parameters"]
    gate = components["DataGate"].exec_properties
    assert json_utils.loads(gate["expected_splits"]) == ["train", "validation", "test"]


def test_same_arguments_compile_to_the_same_pipeline():
    # As dictionaries: the executors are in a packed map, whose bytes have no fixed order.
    first, second = (json_format.MessageToDict(Compiler().compile(build())) for _ in range(2))
    assert set(first["deploymentConfig"]["executorSpecs"]) == set(COMPONENTS)
    assert first == second


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"seed": 8}, {"Trainer"}),
        ({"engine": "jax"}, {"Trainer"}),
        ({"preset": get_preset("notebook")}, {"Trainer"}),
        ({"data": DataSource(folder="/data", name="cifar-100", fingerprint="b")}, {"ExampleGen"}),
        ({"gate": Gate({TOP_1: 0.9, TOP_5: 0.9})}, {"Evaluator"}),
        ({"serving_dir": "/elsewhere"}, {"Baseline", "Pusher"}),
    ],
)
def test_a_setting_changes_the_cache_key_of_its_components_alone(
    compiled: dict[str, pipeline_pb2.PipelineNode], change: dict[str, Any], changed: set[str]
):
    others = nodes(build(**change))
    assert {
        name for name, node in compiled.items() if node.parameters != others[name].parameters
    } == changed


def test_a_search_for_hyperparameters_comes_before_training():
    pipeline = build(tuning=Tuning(trials=5, trial_fraction=0.25))
    names = [component.id for component in pipeline.components]
    assert names == [*COMPONENTS[:6], "Tuner", *COMPONENTS[6:]]
    tuner, trainer = pipeline.components[6:8]
    ours, theirs = (
        json_utils.loads(component.exec_properties["custom_config"])
        for component in (tuner, trainer)
    )
    assert ours == {**theirs, "trials": 5, "trial_fraction": 0.25}
    assert json.loads(tuner.exec_properties["train_args"])["splits"] == ["train"]
    assert json.loads(tuner.exec_properties["eval_args"])["splits"] == ["validation"]
    assert set(tuner.inputs) == {"examples", "schema", "transform_graph"}
    compiled = nodes(pipeline)
    (channel,) = compiled["Trainer"].inputs.inputs["hyperparameters"].channels
    assert (channel.producer_node_query.id, channel.output_key) == ("Tuner", "best_hyperparameters")


def test_a_warm_start_is_from_what_was_pushed_before_the_training():
    compiled = nodes(build(warm_start=True, tuning=Tuning(trials=2, trial_fraction=0.5)))
    assert list(compiled["BaseModel"].upstream_nodes) == []
    assert compiled["BaseModel"].parameters.parameters["serving_dir"].field_value.string_value == (
        "/serving/vit"
    )
    for name in ("Trainer", "Tuner"):
        # An input, and so part of the cache key.
        (channel,) = compiled[name].inputs.inputs["base_model"].channels
        assert (channel.producer_node_query.id, channel.output_key) == ("BaseModel", "baseline")
    # The candidate is still compared with what is served, itself left out.
    assert list(compiled["Baseline"].upstream_nodes) == ["Trainer"]


def test_all_our_components_have_their_code_in_their_cache_keys(components: dict[str, Any]):
    ours = [
        component
        for component in components.values()
        if type(component).__module__.startswith("components.")
    ]
    assert len(ours) == len(COMPONENTS) - 4  # StatisticsGen, ExampleValidator, Transform, Trainer
    assert all(len(component.exec_properties["code"]) == 16 for component in ours)


def test_thresholds_hold_for_the_whole_split_only():
    config = evaluation_config(Gate({TOP_1: 0.25, TOP_5: 0.5}, max_accuracy_drop=0.02))
    bounds = {}
    for metric in config.metrics_specs[0].metrics:
        assert not metric.HasField("threshold")
        for threshold in metric.per_slice_thresholds:
            (slicing,) = threshold.slicing_specs
            assert not slicing.feature_keys and not slicing.feature_values
            bounds[json.loads(metric.config)["name"]] = (
                threshold.threshold.value_threshold.lower_bound.value,
                threshold.threshold.change_threshold.absolute.value,
            )
    assert bounds == {"top_1_accuracy": (0.25, -0.02), "top_5_accuracy": (0.5, -0.02)}
