"""The double of Kubeflow Pipelines' launcher against what KFP's own Python code does."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from kfp.local import placeholder_utils

from dataset.format import fingerprint
from tests.kubeflow import launcher
from tests.kubeflow.cluster import Cluster
from tests.kubeflow.conftest import REPOSITORY, Compile

VALUES = {"STRING": "some text", "NUMBER_INTEGER": 123456789, "NUMBER_DOUBLE": 1e-7}
INPUT = "--json_serialized_invocation_args"


def executor_input(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """What a driver gives a task, with a value of its own kind for each pipeline parameter."""
    values = {}
    for key, source in spec["root"]["dag"]["tasks"][name]["inputs"].get("parameters", {}).items():
        if parameter := source.get("componentInputParameter"):
            kind = spec["root"]["inputDefinitions"]["parameters"][parameter]["parameterType"]
            values[key] = VALUES[kind]
        else:
            values[key] = source["runtimeValue"]["constant"]
    logs = {"uri": "minio://bucket/logs", "type": {"schemaTitle": "system.Artifact"}}
    return {
        "inputs": {"parameterValues": values},
        "outputs": {
            "artifacts": {launcher.LOGS: {"artifacts": [logs]}},
            "parameters": {},
            "outputFile": "/tmp/kfp_outputs/output_metadata.json",
        },
    }


def parameters(entrypoint: ModuleType, arguments: list[str]) -> dict[str, Any]:
    """What the entry point makes of a container's arguments, JSON read."""
    given = json.loads(arguments[arguments.index(INPUT) + 1])
    local = entrypoint.localize({"inputs": given["inputs"]}, {}, entrypoint.Mirror(None))
    return {
        name: json.loads(value) if str(value).startswith("{") else value
        for name, value in local["inputs"]["parameterValues"].items()
    }


def by_kfp(container: dict[str, Any], given: dict[str, Any]) -> list[str]:
    options = {"pipeline_resource_name": "", "task_resource_name": "", "pipeline_root": ""}
    if "unique_pipeline_id" in inspect.signature(placeholder_utils.replace_placeholders).parameters:
        options["unique_pipeline_id"] = ""
    return placeholder_utils.replace_placeholders(
        full_command=container["args"], executor_input_dict=given, **options
    )


@pytest.mark.parametrize("ml_metadata", [True, False])
def test_each_task_gets_from_the_double_what_it_gets_from_kfp(
    documents: list[dict[str, Any]], entrypoint: ModuleType, tmp_path: Path, ml_metadata: bool
):
    spec = documents[0]
    world = launcher.World(tmp_path, {}, {}, ml_metadata)
    left = 0
    for name, task in spec["root"]["dag"]["tasks"].items():
        if not task.get("inputs"):
            continue
        component = spec["components"][task["componentRef"]["name"]]
        executor = spec["deploymentSpec"]["executors"][component["executorLabel"]]
        container = executor["container"]
        expected = parameters(entrypoint, by_kfp(container, executor_input(spec, name)))
        assert not ml_metadata or "{{$" not in json.dumps(expected)
        for _ in range(20):  # each in another order
            pod = launcher.Launcher(world, name, 0, executor_input(spec, name))
            arguments = pod.arguments(container)
            left += "{{$" in "".join(arguments)
            assert parameters(entrypoint, arguments) == expected, name
    assert bool(left) == ml_metadata  # the double does leave placeholders, as launchers up to 2.5


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-7, "0.0000001"), (20.0, "20"), (0.1, "0.1"), (1e21, "1" + 21 * "0"), (7, "7"), (0, "0")],
)
def test_numbers_are_written_as_by_strconv(value: float, text: str):
    # FormatFloat(value, 'f', -1, 64): the fewest digits that are read as the same number.
    assert launcher._text(value) == text
    assert json.loads(launcher._text(value)) == value


def test_a_schedule_sees_that_its_data_have_changed(
    compiler: Compile, synthetic_folder: Path, tmp_path: Path
):
    package, data = tmp_path / "pipeline.yaml", tmp_path / "data"
    shutil.copytree(synthetic_folder, data)
    given = ("--dataset_name", "synthetic", "--preset", "tiny", "--data", data)
    process = compiler("--fingerprint_in_run", *given, "--output", package)
    assert process.returncode == 0, process.stderr
    spec, platform = yaml.safe_load_all(package.read_text())
    tasks = spec["root"]["dag"]["tasks"]
    wanted = ("DataFingerprint", "ExampleGen")  # the rest is tests/e2e/test_kubeflow_pipeline.py's
    spec["root"]["dag"]["tasks"] = {name: tasks[name] for name in wanted}
    package.write_text(yaml.safe_dump_all([spec, platform]))
    image = {"python": sys.executable, "/app": str(REPOSITORY)}
    variables = {name: os.environ[name] for name in ("PATH", "HOME")}
    cluster = Cluster(launcher.World(tmp_path / "cluster", image, variables))
    cluster.make_bucket("mlpipeline")

    def run() -> str:
        executions = cluster.run(package, {})
        assert all(each.state != "FAILED" for each in executions.values()), executions
        assert executions["DataFingerprint"].state == "COMPLETE"
        examples = executions["ExampleGen"].artifacts["examples"]
        assert examples["uri"].startswith("minio://mlpipeline/installation/vit/")
        written = executions["DataFingerprint"].output_parameters["fingerprint"]
        assert examples["metadata"]["content_fingerprint"] == written == fingerprint(data)
        return executions["ExampleGen"].state

    assert [run(), run()] == ["COMPLETE", "CACHED"]
    with (data / "test.bin").open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([19 - byte]))  # another of 20 superclasses
    assert run() == "COMPLETE"
