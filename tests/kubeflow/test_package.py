"""What kubeflow/runner.py writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from kfp import components
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from tests.kubeflow.conftest import FLAGS, REPOSITORY, Compile
from trainer.presets import get_preset

TRAINING = {"Trainer", "Tuner"}
ON_VOLUME = {"ExampleGen", *TRAINING, "Baseline", "Pusher"}


@pytest.fixture(scope="session")
def spec(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[0]


@pytest.fixture(scope="session")
def tasks(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["root"]["dag"]["tasks"]


@pytest.fixture(scope="session")
def containers(spec: dict[str, Any]) -> dict[str, Any]:
    executors = spec["deploymentSpec"]["executors"]
    assert all(list(executor) == ["container"] for executor in executors.values())
    return {name.removesuffix("_executor"): e["container"] for name, e in executors.items()}


@pytest.fixture(scope="session")
def platform(documents: list[dict[str, Any]]) -> dict[str, Any]:
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removesuffix("_executor"): config for name, config in executors.items()}


def unknown_fields(message: Message, document: dict[str, Any]) -> set[str]:
    """Fields of a document that a proto does not have; raises for fields of a wrong type."""
    json_format.ParseDict(document, message, ignore_unknown_fields=True)
    names = {field.json_name for field in message.DESCRIPTOR.fields}
    known = {name: value for name, value in document.items() if name in names}
    json_format.ParseDict(known, type(message)())  # nothing unknown further down
    return set(document) - names


def test_kfp_accepts_it(package: Path, documents: list[dict[str, Any]]):
    loaded = components.load_component_from_file(str(package))
    assert loaded.name == "vit"
    json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(documents[1], pipeline_spec_pb2.PlatformSpec())
    deployment = pipeline_spec_pb2.PipelineDeploymentConfig()
    json_format.ParseDict(documents[0]["deploymentSpec"], deployment)
    assert documents[0]["schemaVersion"] == "2.1.0"
    assert documents[0]["defaultPipelineRoot"] == "minio://mlpipeline/v2/artifacts"


def test_platform_is_what_kfp_kubernetes_has_protos_for(platform: dict[str, Any]):
    proto = kubernetes_executor_config_pb2.KubernetesExecutorConfig
    unknown = set()
    for config in platform.values():
        unknown |= unknown_fields(proto(), config)
    if "tolerations" in proto.DESCRIPTOR.fields_by_name:
        assert unknown == set()
    else:  # kfp-kubernetes 1.0, beside TFX 1.16
        assert unknown <= {"tolerations", "emptyDirMounts", "imagePullPolicy", "imagePullSecret"}


def test_every_component_is_a_container_without_hooks(
    tasks: dict[str, Any], containers: dict[str, Any], platform: dict[str, Any]
):
    assert set(tasks) == set(containers) == set(platform)
    assert {"ExampleGen", "Trainer", "Evaluator", "Pusher"} < set(tasks)
    for name, container in containers.items():
        assert set(container) == {"args", "command", "image", "resources"}
        assert container["image"] == (
            "registry.example.org/vit-gpu:1.0"
            if name in TRAINING
            else "registry.example.org/vit:1.0@sha256:0123"
        )
        assert container["command"] == ["python", "-u", "/app/kubeflow/entrypoint.py"]


def test_a_file_that_compiling_again_does_not_change(
    package: Path, compiler: Compile, tmp_path: Path
):
    again = tmp_path / "again.yaml"
    process = compiler(*FLAGS, "--output", again, PYTHONHASHSEED="2")
    assert process.returncode == 0, process.stderr
    assert again.read_bytes() == package.read_bytes()


def test_parameters_and_their_defaults(spec: dict[str, Any]):
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    tiny = get_preset("tiny").training
    assert {name: value.get("defaultValue") for name, value in parameters.items()} == {
        "data": "/data/cifar-100",
        "dataset_name": "cifar-100",
        "data_fingerprint": None,
        "limit": 0,
        "serving_dir": "/data/serving_models/cifar100_vit",
        "checkpoint_dir": "/data/checkpoints",
        "preset": "tiny",
        "epochs": tiny.epochs,
        "train_minutes": 0.0,
        "batch_size": tiny.batch_size,
        "learning_rate": tiny.learning_rate,
        "weight_decay": tiny.weight_decay,
        "engine": "auto",
        "seed": 7,
        "min_top_1_accuracy": 0.0,
        "min_top_5_accuracy": 0.0,
        "max_accuracy_drop": 2.0,  # auto
    }
    optional = {name for name, value in parameters.items() if value.get("isOptional")}
    assert set(parameters) - optional == {"data_fingerprint"}


def test_every_parameter_is_an_input_of_a_component_and_in_its_cache_key(
    spec: dict[str, Any], tasks: dict[str, Any]
):
    used = {}
    for name, task in tasks.items():
        component = spec["components"][task["componentRef"]["name"]]
        declared = component.get("inputDefinitions", {}).get("parameters", {})
        assert set(task.get("inputs", {}).get("parameters", {})) == set(declared)
        for key, source in task.get("inputs", {}).get("parameters", {}).items():
            if parameter := source.get("componentInputParameter"):
                kinds = spec["root"]["inputDefinitions"]["parameters"]
                assert declared[key]["parameterType"] == kinds[parameter]["parameterType"]
                used.setdefault(name, set()).add(parameter)
    training = {
        "checkpoint_dir", "preset", "epochs", "train_minutes", "batch_size", "learning_rate",
        "weight_decay", "engine", "seed",
    }  # fmt: skip
    assert used == {
        "ExampleGen": {"data", "dataset_name", "data_fingerprint", "limit"},
        # Before a training, it is seen whether its model could be pushed.
        "Tuner": {*training, "serving_dir"},
        "Trainer": {*training, "serving_dir"},
        "Baseline": {"serving_dir"},
        "Evaluator": {"min_top_1_accuracy", "min_top_5_accuracy", "max_accuracy_drop"},
        "Pusher": {"serving_dir"},
    }


def constant(task: dict[str, Any], key: str, values: dict[str, Any]) -> Any:
    """A JSON property after the launcher has replaced its placeholders."""
    text = task["inputs"]["parameters"][key]["runtimeValue"]["constant"]
    for name, value in values.items():
        text = text.replace(f"{{{{$.inputs.parameters['{name}']}}}}", str(value))
    return json.loads(text)


def test_parameters_become_parts_of_properties(tasks: dict[str, Any]):
    values = {
        "preset": "notebook", "epochs": 3, "train_minutes": 2.5, "batch_size": 64,
        "learning_rate": 0.01, "weight_decay": 0, "engine": "jax", "seed": 1,
        "checkpoint_dir": "/c", "set": {},
    }  # fmt: skip
    config = constant(tasks["Trainer"], "custom_config", values)
    assert config.pop("code")
    assert config == values
    config = constant(tasks["Tuner"], "custom_config", values)
    assert config.pop("code")
    assert config == {**values, "trials": 3, "trial_fraction": 0.2}
    destination = constant(tasks["Pusher"], "push_destination", {"serving_dir": "/m"})
    assert destination == {"filesystem": {"base_directory": "/m"}}
    gate = {"min_top_1_accuracy": 0.5, "min_top_5_accuracy": 0.75, "max_accuracy_drop": 0.25}
    bounds = {}
    for metric in constant(tasks["Evaluator"], "eval_config", gate)["metrics_specs"][0]["metrics"]:
        for threshold in metric.get("per_slice_thresholds", []):
            bounds[json.loads(metric["config"])["name"]] = (
                threshold["threshold"]["value_threshold"]["lower_bound"],
                threshold["threshold"]["change_threshold"]["absolute"],
            )
    assert bounds == {"top_1_accuracy": (0.5, -0.25), "top_5_accuracy": (0.75, -0.25)}


def test_exports_go_from_the_converter_to_the_pusher(tasks: dict[str, Any]):
    formats = tasks["Converter"]["inputs"]["parameters"]["formats"]
    assert formats == {"runtimeValue": {"constant": "tflite,onnx"}}
    exports = tasks["Pusher"]["inputs"]["artifacts"]["exports"]["taskOutputArtifact"]
    assert exports == {"producerTask": "Converter", "outputArtifactKey": "exports"}


def test_what_depends_on_the_pushed_models_is_not_cached(tasks: dict[str, Any]):
    cached = {name for name, task in tasks.items() if task["cachingOptions"]["enableCache"]}
    assert set(tasks) - cached == {"Baseline", "Evaluator", "Pusher"}


def test_resources(containers: dict[str, Any], platform: dict[str, Any]):
    accelerator = {"type": "nvidia.com/gpu", "count": "2"}
    assert containers["Trainer"]["resources"] == {
        "cpuLimit": 8.0, "memoryLimit": 32.5, "accelerator": accelerator,
    }  # fmt: skip
    assert containers["Tuner"]["resources"] == {
        "cpuLimit": 4.0, "memoryLimit": 16.0, "accelerator": accelerator,
    }  # fmt: skip
    assert containers["Pusher"]["resources"] == {"cpuLimit": 0.5, "memoryLimit": 2.0}
    shared_memory = {
        "volumeName": "shared-memory",
        "mountPath": "/dev/shm",
        "medium": "Memory",
        "sizeLimit": "8Gi",
    }
    for name, container in containers.items():
        assert container["resources"]["cpuLimit"] > 0
        assert container["resources"]["memoryLimit"] >= 2  # TFX's imports take 1.5 GB
        assert ("accelerator" in container["resources"]) == (name in TRAINING)
        assert platform[name]["emptyDirMounts"] == [
            {"volumeName": "temporary", "mountPath": "/tmp"},
            *([shared_memory] if name in TRAINING else []),
        ]


def test_trainings_are_tried_again_for_as_long_as_they_take(tasks: dict[str, Any]):
    policies = {name: task["retryPolicy"] for name, task in tasks.items() if "retryPolicy" in task}
    assert set(policies) == TRAINING
    for policy in policies.values():
        message = json_format.ParseDict(policy, pipeline_spec_pb2.PipelineTaskSpec.RetryPolicy())
        assert message.max_retry_count == 5
        assert message.backoff_duration.seconds == 60
        assert message.backoff_factor == 2
        # Argo ends a try that runs at its end, and makes none after it.
        assert message.backoff_max_duration.seconds >= 30 * 24 * 3600


def test_nodes_secrets_and_volumes(platform: dict[str, Any]):
    spot = {"key": "spot", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    large = {"key": "large", "operator": "Exists", "effect": "NoExecute"}
    tolerations = {"Trainer": [spot, gpu], "Tuner": [spot, gpu], "Evaluator": [spot, large]}
    for name, config in platform.items():
        assert config["imagePullPolicy"] == "IfNotPresent"
        assert config["imagePullSecret"] == [{"secretName": "regcred"}, {"secretName": "other"}]
        assert config["secretAsEnv"] == [
            {
                "secretName": "mlpipeline-minio-artifact",
                "keyToEnv": [
                    {"secretKey": "accesskey", "envVar": "AWS_ACCESS_KEY_ID"},
                    {"secretKey": "secretkey", "envVar": "AWS_SECRET_ACCESS_KEY"},
                ],
            }
        ]
        labels = {"zone": "a"} | ({"accelerator": "l4"} if name == "Trainer" else {})
        assert config["nodeSelector"] == {"labels": labels}
        assert config["tolerations"] == tolerations.get(name, [spot])
        assert ("pvcMount" in config) == (name in ON_VOLUME)
    assert platform["Trainer"]["pvcMount"] == [{"constant": "vit-data", "mountPath": "/data"}]


def test_tfx_compiles_it_for_vertex(tmp_path: Path, synthetic_folder: Path):
    # In one: the `tfx` command, flags from the environment, Vertex's job, a fingerprint.
    output = tmp_path / "job.json"
    flags = (
        f"--vertex --root gs://bucket/vit --output {output} --dataset_name synthetic "
        "--data gs://bucket/data --serving_dir gs://bucket/models "
        f"--fingerprint_of {synthetic_folder} --gpus 1 --gpu_resource NVIDIA_TESLA_T4 --no_cache"
    )
    process = subprocess.run(
        [
            Path(sys.executable).parent / "tfx",
            *("pipeline", "compile", "--engine", "vertex"),
            *("--pipeline_path", "kubeflow/runner.py"),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "VIT_KUBEFLOW_ARGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert process.returncode == 0, process.stderr
    assert "Pipeline vit compiled successfully." in process.stdout
    job = json.loads(output.read_text())
    assert job["runtimeConfig"]["gcsOutputDirectory"] == "gs://bucket/vit"
    json_format.ParseDict(job, pipeline_spec_pb2.PipelineJob())
    spec = job["pipelineSpec"]
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert len(parameters["data_fingerprint"]["defaultValue"]) == 64
    assert parameters["serving_dir"]["defaultValue"].endswith("/synthetic_vit")
    executors = spec["deploymentSpec"]["executors"]
    accelerator = executors["Trainer_executor"]["container"]["resources"]["accelerator"]
    assert accelerator == {"type": "NVIDIA_TESLA_T4", "count": "1"}
    for task in spec["root"]["dag"]["tasks"].values():
        assert task["cachingOptions"] == {"enableCache": False}


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--resources Trayner=1:2", 2, "--resources names 'Trayner': there are Baseline, "),
        ("--fingerprint_of /nowhere", 1, "/nowhere"),
        ("--output /proc/pipeline.yaml", 2, "cannot write /proc/pipeline.yaml"),
    ],
)
def test_failures(compiler: Compile, flags: str, code: int, message: str):
    process = compiler(*flags.split())
    assert process.returncode == code
    assert message in process.stderr.splitlines()[-1]
    assert process.stderr.startswith("error: ")
