"""Containers of the job for Vertex AI, run as it runs them.

There is no launcher. Buckets are mounted at /gcs (here elsewhere); nobody makes folders in them.
Containers get gs:// URIs of artifacts and a path in /gcs for their output, run as the image's user,
and have no volume, no Kubernetes and next to no environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dataset.source import open_source
from tests.kubeflow.conftest import REPOSITORY, run_compiler

Json = dict[str, Any]
# The image's user, who may read everything, as image and packages belong to others here.
_USER = [
    *("setpriv", "--reuid=10001", "--regid=10001", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]


def _user() -> list[str]:
    """Command words that make a command run as the image's user, where this one may change it."""
    if os.getuid() or not shutil.which("setpriv"):
        return []
    return [] if subprocess.run([*_USER, "true"], capture_output=True).returncode else _USER


class Vertex:
    """A run of a job.

    Args:
      job: What kubeflow/runner.py wrote.
      folder: For the mount of the buckets and the containers' home.
    """

    def __init__(self, job: Json, folder: Path):
        self._spec = job["pipelineSpec"]
        self._root = job["runtimeConfig"]["gcsOutputDirectory"]
        self.folder = folder
        self.mount = folder / "gcs"
        self._home = folder / "home"
        for path in (self.mount / "bucket", self._home):
            path.mkdir(parents=True)
            path.chmod(0o777)

    def path(self, uri: str) -> Path:
        """Where an object is in the mount."""
        return self.mount / uri.removeprefix("gs://")

    def run(self, name: str) -> Json:
        """Runs the container of a task without input artifacts; returns its output artifacts."""
        task = self._spec["root"]["dag"]["tasks"][name]
        component = self._spec["components"][task["componentRef"]["name"]]
        executors = self._spec["deploymentSpec"]["executors"]
        container = executors[component["executorLabel"]]["container"]
        place = f"{self._root}/123/job/{name}_456"
        executor_input = {
            "inputs": {
                "parameterValues": {
                    key: self._value(source)
                    for key, source in task.get("inputs", {}).get("parameters", {}).items()
                },
            },
            "outputs": {
                "artifacts": {
                    key: {
                        "artifacts": [
                            {"name": "7", "uri": f"{place}/{key}", "type": kind["artifactType"]}
                        ]
                    }
                    for key, kind in component["outputDefinitions"]["artifacts"].items()
                },
                "outputFile": f"{self.path(place)}/executor_output.json",
            },
        }
        words = {"python": sys.executable}
        command = [
            words.get(word, word.replace("/app", str(REPOSITORY))) for word in container["command"]
        ]
        given = [word.replace("{{$}}", json.dumps(executor_input)) for word in container["args"]]
        process = subprocess.run(
            [*_user(), *command, *given],
            cwd=self._home,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self._home),
                "VIT_MIRROR_ROOT": str(self.folder),
                "CLUSTER_SPEC": '{"cluster": {"workerpool0": ["localhost:2222"]}}',
            },
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        output = json.loads(Path(executor_input["outputs"]["outputFile"]).read_text())
        return {key: found["artifacts"][0] for key, found in output["artifacts"].items()}

    def _value(self, source: Json) -> Any:
        if "runtimeValue" in source:
            return source["runtimeValue"]["constant"]
        parameters = self._spec["root"]["inputDefinitions"]["parameters"]
        value = parameters[source["componentInputParameter"]]["defaultValue"]
        return value.replace("/gcs/", f"{self.mount}/") if isinstance(value, str) else value


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def vertex(folder: Path, synthetic_folder: Path) -> Vertex:
    process = run_compiler(
        *("--vertex", "--root", "gs://bucket/vit", "--data", "/gcs/bucket/data"),
        *("--serving_dir", "/gcs/bucket/models", "--dataset_name", "synthetic"),
        *("--preset", "tiny", "--fingerprint_of", synthetic_folder),
        *("--output", folder / "job.json"),
    )
    assert process.returncode == 0, process.stderr
    vertex = Vertex(json.loads((folder / "job.json").read_text()), folder)
    data = vertex.path("gs://bucket/data")
    data.mkdir(mode=0o755)
    for path in synthetic_folder.iterdir():
        shutil.copyfile(path, data / path.name)
    return vertex


def test_containers_read_and_write_buckets_and_nothing_else(
    vertex: Vertex, synthetic_folder: Path
) -> None:
    examples = vertex.run("ExampleGen")["examples"]
    assert examples["uri"] == "gs://bucket/vit/123/job/ExampleGen_456/examples"
    data = open_source(str(synthetic_folder)).card.source
    assert examples["metadata"]["content_fingerprint"] == data.fingerprint
    files = {path.name for path in vertex.path(examples["uri"]).rglob("*") if path.is_file()}
    assert {"dataset.json", "data_tfrecord-00000-of-00001.gz"} <= files

    assert {path.name for path in vertex.folder.iterdir()} == {"gcs", "home", "job.json"}
    assert {path.name for path in vertex.path("gs://bucket").iterdir()} == {"data", "vit"}
