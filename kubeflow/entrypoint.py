"""The command of every container of the compiled pipeline: runs a TFX executor as KFP expects it.

TFX's own entry point does not know where the launcher of open-source Kubeflow Pipelines (KFP) puts
artifacts, nor what it leaves out. This one goes between: it

- gives TFX the local mirrors of `minio://`, `s3://` and `gs://` artifacts, which the launcher fills
  before this process runs and uploads afterwards, and their URIs to the launcher;
- tells TFX the types of input artifacts, which KFP does not pass on, and not of outputs that are
  none of TFX's (the launcher's own log);
- refuses what no container can reach, before the seconds that importing TFX takes;
- exits with a code other than 0 and the cause in the last line when the component fails, without an
  executor output.

VIT_MIRROR_ROOT, by default `/`, is the folder of the mirrors, for running a container's command by
hand, on artifacts that were copied from a bucket.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

Json = dict[str, Any]

# As in LocalPathForURI of the launcher (backend/src/v2/component/launcher_v2.go).
MIRRORS = {"minio://": "minio", "s3://": "s3", "gs://": "gcs"}
ROOT_VARIABLE = "VIT_MIRROR_ROOT"
# Of an executor's exec_properties, which no file system of TensorFlow and Beam can open.
UNREACHABLE = ("minio://", "s3://")
_PACKAGES = ("components", "dataset", "pipeline", "serving", "trainer")


class EntrypointError(RuntimeError):
    """The container cannot do what it is asked for; the message says why."""


class Mirror:
    """Translates between artifacts' URIs and where the launcher mirrors them.

    Args:
      root: Folder of the mirrors; None if there are none.
    """

    def __init__(self, root: str | None = "/"):
        self._folders = (
            {scheme: os.path.join(root, name) for scheme, name in MIRRORS.items()} if root else {}
        )

    def path(self, uri: str) -> str:
        """The local path of an artifact; the same for what has no mirror, such as a path."""
        for scheme, folder in self._folders.items():
            if uri.startswith(scheme):
                return os.path.join(folder, uri.removeprefix(scheme).rstrip("/"))
        return uri

    def uri(self, path: str) -> str:
        """The URI of a path in a mirror; the same for any other string."""
        for scheme, folder in self._folders.items():
            if path.startswith(f"{folder}/"):
                return scheme + path.removeprefix(f"{folder}/")
        return path


def localize(executor_input: Json, inputs_spec: Json, mirror: Mirror) -> Json:
    """Makes of KFP's ExecutorInput one that TFX can use.

    Args:
      executor_input: ExecutorInput, in JSON's names.
      inputs_spec: The component's ComponentInputsSpec.
      mirror: Where artifacts are.

    Returns:
      The same with local paths, all types, and without outputs that are not of a TFX type.

    Raises:
      EntrypointError: An output's bucket has no mirror, or a parameter names a place out of reach.
    """
    result: Json = json.loads(json.dumps(executor_input))
    inputs = result.setdefault("inputs", {})
    for name, value in inputs.get("parameterValues", {}).items():
        inputs["parameterValues"][name] = _check_parameter(name, value)
    declared = inputs_spec.get("artifacts", {})
    for name, artifact in _artifacts(inputs):
        if name in declared:  # KFP gives an empty schema
            artifact["type"] = declared[name]["artifactType"]
        artifact["uri"] = mirror.path(artifact["uri"])
        # An artifact without files is a folder here, and nothing at all in an object store.
        if artifact["uri"].startswith("/"):
            os.makedirs(artifact["uri"], exist_ok=True)
    outputs = result.setdefault("outputs", {})
    outputs["artifacts"] = {
        name: artifacts
        for name, artifacts in outputs.get("artifacts", {}).items()
        if not any(_is_foreign(artifact) for artifact in artifacts["artifacts"])
    }
    for name, artifact in _artifacts(outputs):
        uri, path = artifact["uri"], mirror.path(artifact["uri"])
        # Kubeflow's launcher makes the folders below it, too; Vertex AI mounts the bucket alone.
        bucket = mirror.path("/".join(uri.split("/")[:3]))
        if path != uri and not os.path.isdir(bucket):
            raise EntrypointError(
                f"output {name!r} is to be written to {uri}, and there is no {bucket}: the "
                "launcher of Kubeflow Pipelines makes it. Does the pipeline root name a bucket "
                "that exists?"
            )
        artifact["uri"] = path
        if path.startswith("/"):  # as TFX's other orchestrators do
            os.makedirs(path, exist_ok=True)
    return result


def _is_foreign(artifact: Json) -> bool:
    """Whether it is of a type of KFP's own, such as the launcher's log is."""
    schema = artifact.get("type", {})
    title = schema.get("schemaTitle", schema.get("instanceSchema", ""))
    return title.removeprefix("title: ").startswith("system.")


def _artifacts(part: Json) -> Iterator[tuple[str, Json]]:
    for name, artifacts in part.get("artifacts", {}).items():
        for artifact in artifacts.get("artifacts", []):
            yield name, artifact


def _check_parameter(name: str, value: Any) -> Any:
    """Refuses places out of reach; returns the value, with whole numbers in JSON as such."""
    if not isinstance(value, str):
        return value
    try:
        document = json.loads(value, parse_float=_number) if value.lstrip()[:1] == "{" else value
    except ValueError as error:
        raise EntrypointError(
            f"parameter {name!r} is not JSON: {error}. A run's parameters must not have quotes, "
            f"braces or backslashes in them. It is: {value}"
        ) from error
    for text in _strings(document):
        if text.startswith(UNREACHABLE):
            raise EntrypointError(
                f"parameter {name!r} names {text}: Kubeflow Pipelines brings artifacts from there, "
                "and nothing else. Use a path on a mounted volume, or gs://."
            )
    return value if isinstance(document, str) else json.dumps(document)


def _number(text: str) -> int | float:
    """As a parameter of a pipeline, 20 may come as 20.0."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _strings(document: Any) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    elif isinstance(document, dict):
        for value in document.values():
            yield from _strings(value)
    elif isinstance(document, list):
        for value in document:
            yield from _strings(value)


def globalize(executor_output: Json, executor_input: Json, mirror: Mirror) -> Json:
    """Makes of TFX's ExecutorOutput one that the launcher can publish.

    Args:
      executor_output: ExecutorOutput, in JSON's names.
      executor_input: What KFP gave.
      mirror: Where artifacts are.

    Returns:
      The same with the URIs that KFP gave, in the metadata, too, and without properties that have
      no value, which the launcher refuses.
    """
    given = dict(_artifacts(executor_input.get("outputs", {})))
    result: Json = json.loads(json.dumps(executor_output))
    for name, artifact in _artifacts(result):
        artifact["uri"] = given[name]["uri"]
        artifact["metadata"] = {
            key: mirror.uri(value) if isinstance(value, str) else value
            for key, value in artifact.get("metadata", {}).items()
            if value is not None
        }
    return result


def _run(arguments: argparse.Namespace, beam_arguments: list[str]) -> None:
    executor_input = _load("--json_serialized_invocation_args", arguments.invocation)
    inputs_spec = _load("--json_serialized_inputs_spec_args", arguments.inputs_spec)
    output_file = executor_input["outputs"]["outputFile"]
    # Vertex AI has no launcher: TFX itself reads and writes in the bucket.
    on_vertex = output_file.startswith("gs://")
    mirror = Mirror(None if on_vertex else os.environ.get(ROOT_VARIABLE, "/"))
    local = localize(executor_input, inputs_spec, mirror)
    partial = f"{output_file}.partial"
    if not on_vertex:
        for path in (output_file, partial):  # of an attempt that failed
            if os.path.exists(path):
                os.remove(path)
        os.makedirs(os.path.dirname(output_file), exist_ok=True)
        local["outputs"]["outputFile"] = partial
    try:
        from tfx.orchestration.kubeflow.v2.container import kubeflow_v2_run_executor

        import components  # noqa: F401
    except ImportError as error:
        raise EntrypointError(
            f"the image lacks the package {error.name!r}: compile with an --image that was built "
            "from kubeflow/Dockerfile."
        ) from error
    namespace = argparse.Namespace(
        executor_class_path=arguments.executor_class_path,
        json_serialized_invocation_args=json.dumps(local),
        json_serialized_inputs_spec_args=json.dumps(inputs_spec),
    )
    kubeflow_v2_run_executor.main((namespace, beam_arguments))
    if on_vertex:
        return
    with open(partial) as file:
        output = globalize(json.load(file), executor_input, mirror)
    with open(partial, "w") as file:
        json.dump(output, file)
    os.replace(partial, output_file)


def _load(flag: str, text: str) -> Json:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise EntrypointError(f"{flag} is not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise EntrypointError(f"{flag} is not a JSON object: {text}.")
    return document


def _describe(error: BaseException) -> str:
    """The cause in one line: our own errors explain themselves, others need their type."""
    own: BaseException | None = error
    while own and type(own).__module__.partition(".")[0] not in (*_PACKAGES, __name__):
        own = own.__cause__ or own.__context__
    text = " ".join(str(own or error).split()) or "no message"
    return text if own else f"{type(error).__name__}: {text}"


def main() -> NoReturn:
    """Runs the executor that the command line names.

    Raises:
      SystemExit: With code 0 if it has finished, 2 for a bad command line, else 1.
    """
    parser = argparse.ArgumentParser(description="Runs a component of the pipeline.")
    parser.add_argument("--executor_class_path", required=True, metavar="MODULE.CLASS")
    for flag, name in (("invocation_args", "invocation"), ("inputs_spec_args", "inputs_spec")):
        parser.add_argument(f"--json_serialized_{flag}", dest=name, required=True, metavar="JSON")
    arguments, beam_arguments = parser.parse_known_args()
    try:
        _run(arguments, beam_arguments)
    except Exception as error:
        if not isinstance(error, EntrypointError):
            traceback.print_exc()
        component = arguments.executor_class_path
        sys.stdout.flush()
        print(f"error: {component} failed: {_describe(error)}", file=sys.stderr, flush=True)
        # Not through the interpreter's end: threads of libraries must neither keep the container
        # alive nor write behind the cause.
        os._exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
