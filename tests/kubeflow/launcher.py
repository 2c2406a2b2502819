"""The launcher of Kubeflow Pipelines: runs a task's container; see `tests.kubeflow.cluster`."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Json = dict[str, Any]

SCHEMES = {"minio://": "minio", "s3://": "s3", "gs://": "gcs"}
ROOT_VARIABLE = "VIT_MIRROR_ROOT"
LOGS = "executor-logs"


class KubeflowError(RuntimeError):
    """What a driver or a launcher of Kubeflow Pipelines would refuse."""


@dataclass
class Execution:
    """A task of a run.

    Attributes:
      state: COMPLETE, CACHED or FAILED; tasks behind a failed one have no execution at all.
      exit_code: Of the container; None if it did not run.
      tries: How often the container was started.
      seconds: How long the container took, the last time.
      log: What the container printed, the last time.
      error: What the driver or the launcher had to say.
      artifacts: Output key -> what is in ML Metadata.
      parameters: What the container got.
      output_parameters: What it has written, all text.
    """

    state: str
    exit_code: int | None = None
    tries: int = 0
    seconds: float = 0.0
    log: str = ""
    error: str = ""
    artifacts: dict[str, Json] = field(default_factory=dict)
    parameters: Json = field(default_factory=dict)
    output_parameters: dict[str, str] = field(default_factory=dict)


@dataclass
class World:
    """What containers find outside of their pods.

    Attributes:
      folder: Where everything goes; each bucket is a folder in `folder/buckets`.
      image: Commands and folders of the image -> what stands for them here.
      variables: The containers' environment.
      ml_metadata: Whether the installation has ML Metadata.
      preempted: Task -> what its log has in it when its node is taken away, at the first try.
    """

    folder: Path
    image: Mapping[str, str]
    variables: Mapping[str, str]
    ml_metadata: bool = True
    preempted: dict[str, str] = field(default_factory=dict)
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def stored(self, uri: str) -> Path:
        """Where an object of a bucket is."""
        return self.folder / "buckets" / uri.partition("://")[2]

    def next_id(self) -> str:
        """An artifact's id."""
        if not self.ml_metadata:
            return str(uuid.uuid4())
        with self._lock:
            return str(next(self._ids))


class Launcher:
    """As component/launcher_v2.go."""

    def __init__(self, world: World, task: str, attempt: int, executor_input: Json):
        self._world = world
        self._task = task
        self._attempt = attempt
        self._pod = world.folder / "pods" / str(uuid.uuid4())
        (self._pod / "tmp").mkdir(parents=True)
        self._input = executor_input
        outputs = executor_input["outputs"]
        for output in (outputs, *outputs["parameters"].values()):
            output["outputFile"] = str(self._local(output["outputFile"]))
        if not world.ml_metadata:  # since 2.16.1
            listed(outputs)[LOGS]["uri"] += f"-{attempt}"

    def _local(self, uri: str) -> Path:
        if uri.startswith("/tmp/"):
            return self._pod / uri[1:]
        for scheme, folder in SCHEMES.items():
            if uri.startswith(scheme):
                return self._pod / folder / uri.removeprefix(scheme)
        raise KubeflowError(f"unsupported storage scheme: {uri}")

    def execute(self, container: Json) -> Execution:
        outputs = listed(self._input["outputs"])
        for artifact in (*listed(self._input["inputs"]).values(), *outputs.values()):
            bucket = artifact["uri"].partition("://")[2].split("/")[0]
            if not (self._world.stored(f"://{bucket}")).is_dir():
                raise KubeflowError(f'Failed to open bucket "{bucket}"')
        inputs = {}
        for artifact in listed(self._input["inputs"]).values():
            source, local = self._world.stored(artifact["uri"]), self._local(artifact["uri"])
            if source.is_dir():  # an artifact without files is nowhere in an object store
                shutil.copytree(source, local)
                inputs[local] = _digest(local)
        for artifact in outputs.values():
            self._local(artifact["uri"]).parent.mkdir(parents=True, exist_ok=True)

        files = {
            key: Path(output["outputFile"])
            for key, output in self._input["outputs"]["parameters"].items()
        }
        for file in files.values():
            file.parent.mkdir(parents=True, exist_ok=True)

        execution = Execution("FAILED", parameters=self._input["inputs"]["parameterValues"])
        execution.tries = self._attempt + 1
        log = self._local(outputs[LOGS]["uri"])
        began = time.monotonic()
        with log.open("w") as file:
            container_process = subprocess.Popen(
                [self._word(word) for word in container["command"]] + self.arguments(container),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self._pod,
                env={
                    **self._world.variables,
                    ROOT_VARIABLE: str(self._pod),
                    "TMPDIR": str(self._pod / "tmp"),
                },
                umask=0o077,
            )
        self._preempt(container_process, log)
        execution.exit_code = container_process.wait()
        execution.seconds = time.monotonic() - began
        execution.log = log.read_text()
        changed = [str(local) for local, digest in inputs.items() if _digest(local) != digest]
        assert not changed, f"inputs were written to: {changed}"
        if execution.exit_code:
            execution.artifacts = {LOGS: self._record(LOGS, outputs[LOGS])}
            return execution
        found = self._executor_output()
        for name, artifact in outputs.items():
            merged = {**artifact, "metadata": dict(artifact["metadata"])}
            if name in found:
                merged["uri"] = found[name]["uri"]
                merged["metadata"].update(found[name].get("metadata", {}))
            execution.artifacts[name] = self._record(name, merged)
        execution.output_parameters = {key: file.read_text() for key, file in files.items()}
        execution.state = "COMPLETE"
        shutil.rmtree(self._pod)
        return execution

    def _preempt(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """Kills the container where its node is to be taken away."""
        sign = self._world.preempted.get(self._task)
        while sign and not self._attempt and process.poll() is None:
            if sign in log.read_text():
                process.kill()
            time.sleep(0.05)

    def _word(self, word: str) -> str:
        for place, here in self._world.image.items():
            if word == place or word.startswith(f"{place}/"):
                return here + word.removeprefix(place)
        return word

    def arguments(self, container: Json) -> list[str]:
        """A container's arguments, as compileCmdAndArgs makes them.

        Placeholders are replaced in the random order of a map. Up to 2.5, the executor input is one
        of them: those in it are replaced that come after it.
        """
        placeholders = {"{{$}}": json.dumps(self._input)}
        for name, value in self._input["inputs"]["parameterValues"].items():
            placeholders[f"{{{{$.inputs.parameters['{name}']}}}}"] = _text(value)
        for name, output in self._input["outputs"]["parameters"].items():
            placeholder = f"{{{{$.outputs.parameters['{name}'].output_file}}}}"
            placeholders[placeholder] = output["outputFile"]
        order = list(placeholders)
        random.shuffle(order)
        if not self._world.ml_metadata:
            order.sort(key=lambda placeholder: placeholder != "{{$}}")
        arguments = []
        for text in container["args"]:
            for placeholder in order:
                text = text.replace(placeholder, placeholders[placeholder])
            arguments.append(text)
        return arguments

    def _executor_output(self) -> dict[str, Json]:
        path = Path(self._input["outputs"]["outputFile"])
        return listed(json.loads(path.read_text())) if path.exists() else {}

    def _record(self, key: str, artifact: Json) -> Json:
        """Uploads an artifact and makes what its consumers will be told of it."""
        source, target = self._local(artifact["uri"]), self._world.stored(artifact["uri"])
        if not self._world.ml_metadata and not source.exists():
            raise KubeflowError(f"declared output artifact {key!r} is missing at {str(source)!r}")
        paths = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
        for path in paths:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        recorded = {"uri": artifact["uri"], "metadata": artifact["metadata"]}
        if not self._world.ml_metadata:
            kind = artifact["type"].get("schemaTitle") or artifact["type"]["instanceSchema"]
            identity = {"name": key, "artifactId": self._world.next_id()}
            return {**recorded, **identity, "type": {"schemaTitle": kind}}
        # What ML Metadata has of it: no type, and the id for a name.
        metadata = {name: _mlmd_value(name, value) for name, value in artifact["metadata"].items()}
        recorded["metadata"] = {"display_name": key, "store_session_info": "{}", **metadata}
        return {**recorded, "name": self._world.next_id(), "type": {"instanceSchema": ""}}


def _text(value: Any) -> str:
    """As getPlaceholders writes a parameter's value: numbers without an exponent."""
    if isinstance(value, str):
        return value
    return np.format_float_positional(float(value), trim="-")


def listed(part: Json) -> dict[str, Json]:
    """The artifacts of inputs or outputs, of which each has one."""
    return {name: found["artifacts"][0] for name, found in part.get("artifacts", {}).items()}


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
