"""kubeflow/entrypoint.py without TFX; with it, in tests/e2e/test_kubeflow_pipeline.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.kubeflow.conftest import REPOSITORY

EXAMPLES = {"instanceSchema": "title: tfx.Examples\ntype: object\n"}
SPEC = {
    "artifacts": {"examples": {"artifactType": EXAMPLES}},
    "parameters": {"custom_config": {"parameterType": "STRING"}},
}


def executor_input(root: str = "minio://bucket/run", **parameters: Any) -> dict[str, Any]:
    """As the launcher of Kubeflow Pipelines 2 writes it."""

    def artifact(key: str, schema: dict[str, str], name: str = "") -> dict[str, Any]:
        return {"artifacts": [{"name": name or key, "uri": f"{root}/{key}", "type": schema}]}

    return {
        "inputs": {
            "parameterValues": parameters,
            "artifacts": {"examples": artifact("examples", {"instanceSchema": ""}, name="17")},
        },
        "outputs": {
            "artifacts": {
                "model": artifact("model", {"instanceSchema": "title: tfx.Model\ntype: object\n"}),
                "executor-logs": artifact("executor-logs", {"schemaTitle": "system.Artifact"}),
            },
            "outputFile": "/minio/bucket/run/output_metadata.json",
        },
    }


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("minio://mlpipeline/v2/a", "/m/minio/mlpipeline/v2/a"),
        ("s3://bucket/a/", "/m/s3/bucket/a"),
        ("gs://bucket/a", "/m/gcs/bucket/a"),
    ],
)
def test_mirror(entrypoint: ModuleType, uri: str, path: str):
    mirror = entrypoint.Mirror("/m")
    assert mirror.path(uri) == path
    assert mirror.uri(path) == uri.rstrip("/")
    assert entrypoint.Mirror().path(uri) == path.removeprefix("/m")


def test_what_is_in_no_mirror_stays(entrypoint: ModuleType):
    mirror = entrypoint.Mirror("/m")
    for text in ("/data/a", "relative", "", "/m/minio", "/m/miniox/a", "http://a/b"):
        assert mirror.path(text) == text
        assert mirror.uri(text) == text
    assert entrypoint.Mirror(None).path("gs://bucket/a") == "gs://bucket/a"


def test_tfx_gets_local_paths_and_types_and_its_own_outputs_alone(
    entrypoint: ModuleType, tmp_path: Path
):
    given = executor_input(input_base="gs://data/a", limit=20.0, custom_config='{"epochs": 2.0}')
    before = json.loads(json.dumps(given))
    (tmp_path / "minio/bucket/run").mkdir(parents=True)
    local = entrypoint.localize(given, SPEC, entrypoint.Mirror(str(tmp_path)))
    (examples,) = local["inputs"]["artifacts"]["examples"]["artifacts"]
    assert examples["uri"] == f"{tmp_path}/minio/bucket/run/examples"
    assert examples["type"] == EXAMPLES
    assert examples["name"] == "17"
    assert os.path.isdir(examples["uri"])  # although the launcher found no files
    assert list(local["outputs"]["artifacts"]) == ["model"]
    assert local["inputs"]["parameterValues"] == {
        "input_base": "gs://data/a",  # TensorFlow and Beam can read it
        "limit": 20.0,
        "custom_config": '{"epochs": 2}',
    }
    assert given == before


def test_vertex_has_no_mirrors(entrypoint: ModuleType):
    local = entrypoint.localize(executor_input("gs://bucket/run"), SPEC, entrypoint.Mirror(None))
    (model,) = local["outputs"]["artifacts"]["model"]["artifacts"]
    (examples,) = local["inputs"]["artifacts"]["examples"]["artifacts"]
    assert model["uri"] == "gs://bucket/run/model"
    assert examples["uri"] == "gs://bucket/run/examples"
    assert examples["type"] == EXAMPLES


def test_the_launcher_gets_uris_and_all_properties(entrypoint: ModuleType):
    mirror = entrypoint.Mirror("/")
    metadata = {
        "span": 3.0,
        "split_names": '["train"]',
        "blessed": 1.0,
        "by_split": {"train": True},
        "current_model": "/minio/bucket/run/model",
        "pushed_destination": "/data/models/1",
        "note": "see /minio/bucket",
        "version": None,
    }
    output = {
        "artifacts": {
            "model": {
                "artifacts": [
                    {"name": "model", "uri": "/minio/bucket/run/model", "metadata": metadata}
                ]
            }
        }
    }
    result = entrypoint.globalize(output, executor_input(), mirror)
    (model,) = result["artifacts"]["model"]["artifacts"]
    assert model["uri"] == "minio://bucket/run/model"
    del metadata["version"]  # the launcher refuses nulls
    assert model["metadata"] == {**metadata, "current_model": "minio://bucket/run/model"}


def run(
    folder: Path, given: dict[str, Any] | str, *python: str, executor: str = "a.b.Executor"
) -> subprocess.CompletedProcess[str]:
    """Runs a container's command with the mirrors in a folder."""
    text = given if isinstance(given, str) else json.dumps(given)
    return subprocess.run(
        [
            *(sys.executable, *python, str(REPOSITORY / "kubeflow/entrypoint.py")),
            *("--executor_class_path", executor),
            *("--json_serialized_invocation_args", text),
            *("--json_serialized_inputs_spec_args", json.dumps(SPEC)),
            "--direct_num_workers=1",
        ],
        env={**os.environ, "VIT_MIRROR_ROOT": str(folder)},
        capture_output=True,
        text=True,
        timeout=100,
    )


def refusal(folder: Path, given: dict[str, Any] | str, *python: str) -> str:
    """Checks that one line says why it failed and that no output is there; returns that line."""
    process = run(folder, given, *python)
    assert process.returncode == 1
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert not list(folder.rglob("output_metadata*"))
    prefix = "error: a.b.Executor failed: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


@pytest.fixture()
def pod(tmp_path: Path) -> Path:
    """The mirrors in a pod, with the folder that the launcher makes for outputs."""
    (tmp_path / "minio/bucket/run").mkdir(parents=True)
    return tmp_path


def test_an_image_without_the_project(pod: Path):
    given = executor_input()
    given["outputs"]["outputFile"] = f"{pod}/minio/bucket/run/output_metadata.json"
    stale = Path(given["outputs"]["outputFile"])
    stale.write_text("{}")  # of an attempt before
    line = refusal(pod, given, "-S")  # without site-packages
    assert line.startswith("the image lacks the package 'tfx': compile with an --image")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"input_base": "s3://bucket/cifar"},
            "parameter 'input_base' names s3://bucket/cifar: Kubeflow Pipelines brings artifacts",
        ),
        (
            {"push_destination": '{"filesystem": {"base_directory": "minio://bucket/m"}}'},
            "parameter 'push_destination' names minio://bucket/m: ",
        ),
        ({"custom_config": '{"a": "x"y"}'}, "parameter 'custom_config' is not JSON: "),
    ],
)
def test_places_out_of_reach(pod: Path, parameters: dict[str, Any], message: str):
    assert refusal(pod, executor_input(**parameters)).startswith(message)


def test_a_bucket_without_a_mirror(pod: Path):
    given = executor_input("minio://nowhere/run")
    given["inputs"]["artifacts"] = {}
    line = refusal(pod, given)
    assert line.startswith("output 'model' is to be written to minio://nowhere/run/model, and")
    assert not (pod / "minio/nowhere").exists()


def test_a_command_line_that_is_no_launchers(pod: Path):
    assert refusal(pod, "{{$}}").startswith("--json_serialized_invocation_args is not JSON: ")
    assert refusal(pod, "[]").startswith("--json_serialized_invocation_args is not a JSON object")
    process = subprocess.run(
        [sys.executable, str(REPOSITORY / "kubeflow/entrypoint.py"), "--help"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0 and "--executor_class_path" in process.stdout


def test_an_image_without_the_entrypoint(tmp_path: Path):
    process = subprocess.run(
        [sys.executable, "-u", str(tmp_path / "entrypoint.py")], capture_output=True, text=True
    )
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "No such file or directory" in process.stderr
