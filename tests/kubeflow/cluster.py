"""Runs a compiled pipeline as open-source Kubeflow Pipelines does, without a cluster.

What the API server, the drivers and the launchers of Kubeflow Pipelines do with a pipeline package
is done here after their Go sources (backend/src/v2/driver, component, cacheutils), on folders in
place of buckets and processes in place of pods. Nothing but the package is read: a task gets what
its specification says, and what a task leaves behind comes from its executor output alone. What
the package must not need (importers, conditions, loops, lifecycle hooks) is refused.

There are two releases of it: with ML Metadata as 2.5 has it, and without, as in the release after
2.17 (kubeflow/pipelines PR #13986).

Each pod has mirrors and temporary files of its own, and a umask that lets nobody else read what it
makes. The volume claim is the only place that pods share.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import yaml

from tests.kubeflow.launcher import (
    LOGS,
    Execution,
    Json,
    KubeflowError,
    Launcher,
    World,
    listed,
)

# Of the installation (kfp-launcher's defaultPipelineRoot): a package's own is not read by any.
DEFAULT_ROOT = "minio://mlpipeline/installation"
_PARALLEL = 2


class Cluster:
    """An installation of Kubeflow Pipelines: buckets, metadata and cache.

    Args:
      world: What its containers find.
    """

    def __init__(self, world: World):
        self.world = world
        (world.folder / "buckets").mkdir(parents=True)
        self.cache: dict[str, Execution] = {}

    def make_bucket(self, name: str) -> None:
        """Makes an empty bucket."""
        self.world.stored(f"://{name}").mkdir()

    def run(
        self, package: Path, parameters: Json, pipeline_root: str | None = None
    ) -> dict[str, Execution]:
        """Runs a pipeline.

        Args:
          package: The compiled pipeline.
          parameters: Of the run.
          pipeline_root: Of the run; by default the installation's.

        Returns:
          Task -> its execution, of those that were run.
        """
        spec, platform = yaml.safe_load_all(package.read_text())
        root = pipeline_root or DEFAULT_ROOT
        run = _Run(self, spec, platform, parameters, f"{root}/{spec['pipelineInfo']['name']}")
        return run.execute()


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
            "cachingOptions", "componentRef", "dependentTasks", "inputs", "retryPolicy", "taskInfo",
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
            if task["cachingOptions"]["enableCache"] and key in self._cluster.cache:
                found = self._cluster.cache[key]
                return dataclasses.replace(
                    found, state="CACHED", exit_code=None, tries=0, seconds=0
                )
            for attempt in range(1 + task.get("retryPolicy", {}).get("maxRetryCount", 0)):
                executor_input = json.loads(json.dumps({"inputs": inputs, "outputs": outputs}))
                launcher = Launcher(self._cluster.world, name, attempt, executor_input)
                execution = launcher.execute(container)
                if execution.state == "COMPLETE":
                    break
        except KubeflowError as error:
            return Execution("FAILED", error=str(error))
        if execution.state == "COMPLETE" and task["cachingOptions"]["enableCache"]:
            self._cluster.cache[key] = execution
        return execution

    def _driver_inputs(self, name: str, task: Json, component: Json) -> Json:
        """As resolveInputs of driver/resolve.go."""
        definitions = component.get("inputDefinitions", {})
        values = {}
        for key, source in task.get("inputs", {}).get("parameters", {}).items():
            value = self._value(source)
            _check_type(key, value, definitions["parameters"][key]["parameterType"])
            values[key] = value
        missing = set(definitions.get("parameters", {})) - set(values)
        if missing:
            raise KubeflowError(f"{name}: no value for non-optional parameters {sorted(missing)}")
        artifacts = {}
        for key, source in task.get("inputs", {}).get("artifacts", {}).items():
            producer = source["taskOutputArtifact"]
            found = self._executions[producer["producerTask"]].artifacts
            artifacts[key] = {"artifacts": [found[producer["outputArtifactKey"]]]}
        return {"parameterValues": values, "artifacts": artifacts}

    def _value(self, source: Json) -> Any:
        if "componentInputParameter" in source:
            return self._parameters[source["componentInputParameter"]]
        if "taskOutputParameter" in source:
            producer = source["taskOutputParameter"]
            found = self._executions[producer["producerTask"]].output_parameters
            return found[producer["outputParameterKey"]]
        return source["runtimeValue"]["constant"]

    def _provision_outputs(self, name: str, component: Json) -> Json:
        """As provisionOutputs of driver/driver.go, with logs published.

        Outputs have a name, and their folder the executor output, since 2.16 only.
        """
        definitions = component.get("outputDefinitions", {})
        parameters = {
            key: {"outputFile": f"/tmp/kfp/outputs/{key}"}
            for key in definitions.get("parameters", {})
        }
        declared = {
            **definitions.get("artifacts", {}),
            LOGS: {"artifactType": {"schemaTitle": "system.Artifact"}},
        }
        task_root = f"{self._root}/{name}/{uuid.uuid4()}"
        artifacts = {
            key: {
                "artifacts": [
                    {
                        **({} if self._cluster.world.ml_metadata else {"name": key}),
                        "uri": f"{task_root}/{key}",
                        "type": artifact["artifactType"],
                        "metadata": artifact.get("metadata", {}),
                    }
                ]
            }
            for key, artifact in declared.items()
        }
        output_file = "/tmp/kfp_outputs/output_metadata.json"
        if not self._cluster.world.ml_metadata:
            output_file = f"{task_root}/output_metadata.json"
        return {"artifacts": artifacts, "parameters": parameters, "outputFile": output_file}


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
    inputs = task.get("inputs", {})
    producers = {
        producer["producerTask"]
        for source in (
            *inputs.get("artifacts", {}).values(),
            *inputs.get("parameters", {}).values(),
        )
        for kind, producer in source.items()
        if kind in ("taskOutputArtifact", "taskOutputParameter")
    }
    return producers | set(task.get("dependentTasks", []))


def _fingerprint(inputs: Json, outputs: Json, container: Json, kubernetes: Json) -> str:
    """As GenerateCacheKey of cacheutils/cache.go."""
    what = [
        {key: a.get("artifactId") or a["name"] for key, a in listed(inputs).items()},
        inputs["parameterValues"],
        {key: (a.get("name"), a["type"], a["metadata"]) for key, a in listed(outputs).items()},
        sorted(outputs["parameters"]),
        container["image"],
        container["command"] + container["args"],
        sorted(mount["constant"] for mount in kubernetes.get("pvcMount", [])),
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
