"""Runs a compiled pipeline as open-source Kubeflow Pipelines does, without a cluster.

What the API server, the drivers and the launchers of Kubeflow Pipelines do with a pipeline package
is done here after their Go sources (backend/src/v2/driver, component, cacheutils), on folders in
place of buckets and processes in place of pods. Nothing but the package is read: a task gets what
its specification says, and what a task leaves behind comes from its executor output alone. What
the package must not need (importers, conditions, loops, lifecycle hooks) is refused.

Each pod has mirrors of its own. The volume claim is the only place that pods share.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]

SCHEMES = {"minio://": "minio", "s3://": "s3", "gs://": "gcs"}
ROOT_VARIABLE = "VIT_MIRROR_ROOT"
LOGS = "executor-logs"
_PARALLEL = 2


class KubeflowError(RuntimeError):
    """What a driver or a launcher of Kubeflow Pipelines would refuse."""


@dataclass
class Execution:
    """A task of a run.

    Attributes:
      state: COMPLETE, CACHED or FAILED; tasks behind a failed one have no execution at all.
      exit_code: Of the container; None if it did not run.
      seconds: How long the container took.
      log: What the container printed.
      error: What the driver or the launcher had to say.
      artifacts: Output key -> what is in ML Metadata.
      parameters: What the container got.
    """

    state: str
    exit_code: int | None = None
    seconds: float = 0.0
    log: str = ""
    error: str = ""
    artifacts: dict[str, Json] = field(default_factory=dict)
    parameters: Json = field(default_factory=dict)


class Cluster:
    """An installation of Kubeflow Pipelines: buckets, metadata and cache, in a folder.

    Args:
      folder: Where everything goes; each bucket is a folder in `folder/buckets`.
      image: Command words of the image -> what stands for them here.
      variables: The containers' environment.
    """

    def __init__(self, folder: Path, image: Mapping[str, str], variables: Mapping[str, str]):
        self._folder = folder
        self._image = image
        self._variables = variables
        self._buckets = folder / "buckets"
        self._buckets.mkdir(parents=True)
        self._ids = itertools.count(1)
        self._cache: dict[str, Execution] = {}
        self._lock = threading.Lock()

    def make_bucket(self, name: str) -> None:
        """Makes an empty bucket."""
        (self._buckets / name).mkdir()

    def stored(self, uri: str) -> Path:
        """Where an object of a bucket is."""
        return self._buckets / uri.partition("://")[2]

    def run(
        self, package: Path, parameters: Json, pipeline_root: str | None = None
    ) -> dict[str, Execution]:
        """Runs a pipeline.

        Args:
          package: The compiled pipeline.
          parameters: Of the run.
          pipeline_root: Of the run; by default the package's.

        Returns:
          Task -> its execution, of those that were run.
        """
        spec, platform = yaml.safe_load_all(package.read_text())
        root = pipeline_root or spec["defaultPipelineRoot"]
        run = _Run(self, spec, platform, parameters, f"{root}/{spec['pipelineInfo']['name']}")
        return run.execute()

    def next_id(self) -> str:
        """An artifact's id in ML Metadata."""
        with self._lock:
            return str(next(self._ids))


class _Run:
    def __init__(self, cluster: Cluster, spec: Json, platform: Json, given: Json, root: str):
        assert spec["schemaVersion"] == "2.1.0"
        self._cluster = cluster
        self._spec = spec
        self._kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        self._root = f"{root}/{uuid.uuid4()}"
        self._parameters = _run_parameters(spec["root"]["inputDefinitions"]["parameters"], given)
        self._tasks: Json = spec["root"]["dag"]["tasks"]
        self._executions: dict[str, Execution] = {}

    def execute(self) -> dict[str, Execution]:
        waiting = {name: _upstream(task) for name, task in self._tasks.items()}
        done = concurrent.futures.FIRST_COMPLETED
        with concurrent.futures.ThreadPoolExecutor(_PARALLEL) as pool:
            running: dict[concurrent.futures.Future[Execution], str] = {}
            while True:
                ready = [
                    name
                    for name, upstream in waiting.items()
                    if all(self._succeeded(task) for task in upstream)
                ]
                for name in ready:
                    del waiting[name]
                    running[pool.submit(self._task, name)] = name
                if not running:
                    return self._executions
                for future in concurrent.futures.wait(running, return_when=done).done:
                    name, execution = running.pop(future), future.result()
                    self._executions[name] = execution
                    print(
                        f"  {name:<18}{execution.state:<10}{execution.seconds:5.0f} s", flush=True
                    )

    def _succeeded(self, name: str) -> bool:
        return name in self._executions and self._executions[name].state != "FAILED"

    def _task(self, name: str) -> Execution:
        task = self._tasks[name]
        unknown = set(task) - {
            "cachingOptions", "componentRef", "dependentTasks", "inputs", "taskInfo",
        }  # fmt: skip
        assert not unknown, f"{name} has {unknown}, which this cluster cannot do"
        component = self._spec["components"][task["componentRef"]["name"]]
        label = component["executorLabel"]
        container = self._spec["deploymentSpec"]["executors"][label]["container"]
        assert "lifecycle" not in container, f"{name} has a hook that Kubeflow Pipelines ignores"
        try:
            inputs = self._driver_inputs(name, task, component)
            outputs = self._provision_outputs(name, component)
            key = _fingerprint(inputs, outputs, container, self._kubernetes[label])
            if task["cachingOptions"]["enableCache"] and key in self._cluster._cache:
                found = self._cluster._cache[key]
                return Execution("CACHED", artifacts=found.artifacts, parameters=found.parameters)
            pod = self._cluster._folder / "pods" / outputs["outputFile"].split("/")[-2]
            launcher = _Launcher(self._cluster, pod, {"inputs": inputs, "outputs": outputs})
            execution = launcher.execute(container)
        except KubeflowError as error:
            return Execution("FAILED", error=str(error))
        if execution.state == "COMPLETE" and task["cachingOptions"]["enableCache"]:
            self._cluster._cache[key] = execution
        return execution

    def _driver_inputs(self, name: str, task: Json, component: Json) -> Json:
        """As resolveInputs of driver/resolve.go."""
        definitions = component.get("inputDefinitions", {})
        values = {}
        for key, source in task.get("inputs", {}).get("parameters", {}).items():
            value = (
                self._parameters[source["componentInputParameter"]]
                if "componentInputParameter" in source
                else source["runtimeValue"]["constant"]
            )
            _check_type(key, value, definitions["parameters"][key]["parameterType"])
            values[key] = value
        missing = set(definitions.get("parameters", {})) - set(values)
        if missing:
            raise KubeflowError(f"{name}: no value for non-optional parameters {sorted(missing)}")
        artifacts = {}
        for key, source in task.get("inputs", {}).get("artifacts", {}).items():
            producer = source["taskOutputArtifact"]
            found = self._executions[producer["producerTask"]].artifacts
            artifact = found[producer["outputArtifactKey"]]
            # What ML Metadata has of it: no type, and the id for a name.
            artifacts[key] = {"artifacts": [{**artifact, "type": {"instanceSchema": ""}}]}
        return {"parameterValues": values, "artifacts": artifacts}

    def _provision_outputs(self, name: str, component: Json) -> Json:
        """As provisionOutputs of driver/driver.go, with logs published."""
        definitions = component.get("outputDefinitions", {})
        assert "parameters" not in definitions
        declared = {
            **definitions.get("artifacts", {}),
            LOGS: {"artifactType": {"schemaTitle": "system.Artifact"}},
        }
        task_root = f"{self._root}/{name}/{uuid.uuid4()}"
        artifacts = {
            key: {
                "artifacts": [
                    {
                        "name": key,
                        "uri": f"{task_root}/{key}",
                        "type": artifact["artifactType"],
                        "metadata": artifact.get("metadata", {}),
                    }
                ]
            }
            for key, artifact in declared.items()
        }
        return {"artifacts": artifacts, "outputFile": f"{task_root}/output_metadata.json"}


class _Launcher:
    """As component/launcher_v2.go."""

    def __init__(self, cluster: Cluster, pod: Path, executor_input: Json):
        self._cluster = cluster
        self._pod = pod
        self._input = executor_input
        output_file = self._local(executor_input["outputs"]["outputFile"])
        self._input["outputs"]["outputFile"] = str(output_file)

    def _local(self, uri: str) -> Path:
        for scheme, folder in SCHEMES.items():
            if uri.startswith(scheme):
                return self._pod / folder / uri.removeprefix(scheme)
        raise KubeflowError(f"unsupported storage scheme: {uri}")

    def execute(self, container: Json) -> Execution:
        outputs = _list(self._input["outputs"])
        for artifact in (*_list(self._input["inputs"]).values(), *outputs.values()):
            bucket = artifact["uri"].partition("://")[2].split("/")[0]
            if not (self._cluster._buckets / bucket).is_dir():
                raise KubeflowError(f'Failed to open bucket "{bucket}"')
        inputs = {}
        for artifact in _list(self._input["inputs"]).values():
            source, local = self._cluster.stored(artifact["uri"]), self._local(artifact["uri"])
            if source.is_dir():  # an artifact without files is nowhere in an object store
                shutil.copytree(source, local)
                inputs[local] = _digest(local)
        for artifact in outputs.values():
            self._local(artifact["uri"]).parent.mkdir(parents=True, exist_ok=True)

        execution = Execution("FAILED", parameters=self._input["inputs"]["parameterValues"])
        log = self._local(outputs[LOGS]["uri"])
        began = time.monotonic()
        with log.open("w") as file:
            execution.exit_code = subprocess.run(
                [self._word(word) for word in container["command"]]
                + [self._substitute(word) for word in container["args"]],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self._pod,
                env={**self._cluster._variables, ROOT_VARIABLE: str(self._pod)},
            ).returncode
        execution.seconds = time.monotonic() - began
        execution.log = log.read_text()
        changed = [str(local) for local, digest in inputs.items() if _digest(local) != digest]
        assert not changed, f"inputs were written to: {changed}"
        if execution.exit_code:
            execution.artifacts = {LOGS: self._record(outputs[LOGS])}
            return execution
        found = self._executor_output()
        for name, artifact in outputs.items():
            merged = {**artifact, "metadata": dict(artifact["metadata"])}
            if name in found:
                merged["uri"] = found[name]["uri"]
                merged["metadata"].update(found[name].get("metadata", {}))
            execution.artifacts[name] = self._record(merged)
        execution.state = "COMPLETE"
        shutil.rmtree(self._pod)
        return execution

    def _word(self, word: str) -> str:
        return self._cluster._image.get(word, word)

    def _substitute(self, argument: str) -> str:
        """As compileCmdAndArgs: first the whole input, then the placeholders in it, too."""
        text = argument.replace("{{$}}", json.dumps(self._input))
        for name, value in self._input["inputs"]["parameterValues"].items():
            shown = f"{value:f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            text = text.replace(f"{{{{$.inputs.parameters['{name}']}}}}", shown)
        assert "{{$" not in text, f"a placeholder was left: {text}"
        return text

    def _executor_output(self) -> dict[str, Json]:
        path = Path(self._input["outputs"]["outputFile"])
        return _list(json.loads(path.read_text())) if path.exists() else {}

    def _record(self, artifact: Json) -> Json:
        """Uploads an artifact and gives it to ML Metadata."""
        source, target = self._local(artifact["uri"]), self._cluster.stored(artifact["uri"])
        paths = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
        for path in paths:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        metadata = {key: _mlmd_value(key, value) for key, value in artifact["metadata"].items()}
        metadata = {"display_name": artifact["name"], "store_session_info": "{}", **metadata}
        return {"name": self._cluster.next_id(), "uri": artifact["uri"], "metadata": metadata}


def _list(part: Json) -> dict[str, Json]:
    return {name: found["artifacts"][0] for name, found in part.get("artifacts", {}).items()}


def _run_parameters(definitions: Json, given: Json) -> Json:
    unknown = set(given) - set(definitions)
    if unknown:
        raise KubeflowError(f"the pipeline has no parameters {sorted(unknown)}")
    values = {
        name: given.get(name, definition.get("defaultValue"))
        for name, definition in definitions.items()
    }
    missing = sorted(name for name, value in values.items() if value is None)
    if missing:
        raise KubeflowError(f"the run has no value for {missing}")
    return values


def _check_type(name: str, value: Any, kind: str) -> None:
    kinds = {"STRING": str, "NUMBER_INTEGER": int | float, "NUMBER_DOUBLE": int | float}
    if not isinstance(value, kinds[kind]) or isinstance(value, bool):
        raise KubeflowError(f'input parameter "{name}" type mismatch: expect {kind}, got {value!r}')


def _upstream(task: Json) -> set[str]:
    artifacts = task.get("inputs", {}).get("artifacts", {}).values()
    producers = {artifact["taskOutputArtifact"]["producerTask"] for artifact in artifacts}
    return producers | set(task.get("dependentTasks", []))


def _fingerprint(inputs: Json, outputs: Json, container: Json, kubernetes: Json) -> str:
    """As GenerateCacheKey of cacheutils/cache.go."""
    what = [
        {key: artifact["name"] for key, artifact in _list(inputs).items()},
        inputs["parameterValues"],
        {key: (a["name"], a["type"], a["metadata"]) for key, a in _list(outputs).items()},
        container["image"],
        container["command"] + container["args"],
        sorted(mount["constant"] for mount in kubernetes.get("pvcMount", [])),
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _mlmd_value(name: str, value: Any) -> Any:
    """What becomes of a property that is written to ML Metadata and read again."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return {"list": value}
    if isinstance(value, dict):
        return {"struct": value}
    raise KubeflowError(f"unknown/unsupported value type of {name!r}: {value!r}")


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(os.fsencode(path.relative_to(folder)) + b"\0")
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()
