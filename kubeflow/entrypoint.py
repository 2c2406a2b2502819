"""The command of every container of the compiled pipeline: runs a TFX executor as KFP expects it.

TFX's own entry point does not know where the launcher of open-source Kubeflow Pipelines (KFP) puts
artifacts, nor what it leaves out. This one goes between: it

- gives TFX the local mirrors of `minio://`, `s3://` and `gs://` artifacts, which the launcher fills
  before this process runs and uploads afterwards, and their URIs to the launcher;
- tells TFX the types of input artifacts, which KFP does not pass on, and not of outputs that are
  none of TFX's (the launcher's own log);
- replaces the placeholders in parameters that the launcher has left: up to KFP 2.5 it replaces them
  in random order, and so only those that come after the executor input that they are in;
- refuses what no container can reach, inputs whose files are gone, and folders that the component
  could not write into in the end, before the seconds that importing TFX takes;
- exits at once when the component has finished, whatever threads and exit handlers of libraries are
  still there, or with a code other than 0 and the cause in the last line when it fails, without an
  executor output.

VIT_MIRROR_ROOT, by default `/`, is the folder of the mirrors, for running a container's command by
hand, on artifacts that were copied from a bucket.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

Json = dict[str, Any]

# As in LocalPathForURI of the launcher (backend/src/v2/component/launcher_v2.go).
MIRRORS = {"minio://": "minio", "s3://": "s3", "gs://": "gcs"}
ROOT_VARIABLE = "VIT_MIRROR_ROOT"
# Of an executor's exec_properties, which no file system of TensorFlow and Beam can open.
UNREACHABLE = ("minio://", "s3://")
# Parameters with folders that are no artifacts and that this component or a later one writes into.
WRITTEN = ("checkpoint_dir", "serving_dir")
# Of an artifact: how many files it has. A launcher says nothing where they are gone.
FILES = "vit_files"
_PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")
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
      EntrypointError: An output's bucket has no mirror, an input's files are gone, or a parameter
        names a place out of reach or one that cannot be written.
    """
    result: Json = json.loads(json.dumps(executor_input))
    inputs = result.setdefault("inputs", {})
    values = inputs.get("parameterValues", {})
    inputs["parameterValues"] = {
        name: _check_parameter(name, fill(name, value, values)) for name, value in values.items()
    }
    for name in WRITTEN:
        if str(values.get(name, "")).startswith("/"):
            _check_writable(name, values[name])
    declared = inputs_spec.get("artifacts", {})
    for name, artifact in _artifacts(inputs):
        if name in declared:  # KFP gives an empty schema
            artifact["type"] = declared[name]["artifactType"]
        # TFX makes its id of the name, and the executor output's references of that. Without ML
        # Metadata (KFP after 2.17), the name is its producer's output key, the same in every run.
        artifact["name"] = artifact.get("artifactId") or artifact.get("name", "")
        path = mirror.path(artifact["uri"])
        if path.startswith("/"):
            _check_files(name, artifact, path)
            # An artifact without files is a folder here, and nothing at all in an object store.
            os.makedirs(path, exist_ok=True)
        artifact["uri"] = path
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


def fill(name: str, value: Any, values: Json) -> Any:
    """Replaces the placeholders that a launcher has left in a parameter.

    Args:
      name: Of the parameter.
      value: Its value.
      values: All parameters of the component.

    Returns:
      The value, with those it refers to in their place, escaped where it is JSON.

    Raises:
      EntrypointError: A placeholder is of another kind, or of a parameter that there is not.
    """
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        if match[1] not in values:
            return match[0]
        text = json.dumps(values[match[1]])
        if not isinstance(values[match[1]], str):
            return text
        return text[1:-1] if _is_json(value) else str(values[match[1]])

    # In one go: what a value has in it is not replaced again.
    filled = _PLACEHOLDER.sub(replacement, value)
    if "{{$" in filled:
        raise EntrypointError(
            f"parameter {name!r} has a placeholder in it that nothing has replaced: {filled}"
        )
    return filled


def _is_json(value: str) -> bool:
    return value.lstrip()[:1] == "{" and value.lstrip()[:3] != "{{$"


def _check_writable(name: str, folder: str) -> None:
    """Writes into a folder, or where it will be made, and takes that away again."""
    place = folder
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".probe-"):
            pass
    except OSError as error:
        status = os.stat(place) if os.path.exists(place) else os.lstat(place)  # a link to nothing
        raise EntrypointError(
            f"{name} is {folder}, and {place} cannot be written to: {error.strerror}. This is user "
            f"{os.getuid()} with the groups {sorted({os.getgid(), *os.getgroups()})}; it belongs "
            f"to user {status.st_uid} and group {status.st_gid}, mode {status.st_mode & 0o7777:o}. "
            "Make it writable for one of these groups, as kubeflow/manifests/loader.yaml does."
        ) from error


def _check_files(name: str, artifact: Json, path: str) -> None:
    """Refuses an artifact that has lost its files, such as one from the cache."""
    expected = int(artifact.get("metadata", {}).get(FILES, 0))
    found = _count_files(path)
    if found < expected:
        raise EntrypointError(
            f"input {name!r} was made with {_count(expected)} at {artifact['uri']}, and "
            f"{_count(found)} came from there: removed, it seems, while Kubeflow Pipelines' cache "
            "still knows it. Compile with --no_cache to have it made anew."
        )


def _count(files: int) -> str:
    return f"{files or 'no'} file{'' if files == 1 else 's'}"


def _count_files(folder: str) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _check_parameter(name: str, value: Any) -> Any:
    """Refuses places out of reach; returns the value, with whole numbers in JSON as such."""
    if not isinstance(value, str):
        return value
    try:
        document = json.loads(value, parse_float=_number) if _is_json(value) else value
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
      The same with the URIs that KFP gave, in the metadata, too, with the number of files, and
      without properties that have no value, which the launcher refuses.
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
        path = mirror.path(artifact["uri"])
        if path.startswith("/"):
            artifact["metadata"][FILES] = float(_count_files(path))
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


def _leave(code: int) -> NoReturn:
    """Ends the process, though not the interpreter.

    What libraries do at its end can abort it after all work is done, their threads can keep the
    container alive, and either could write behind the cause of a failure.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> NoReturn:
    """Runs the executor that the command line names.

    Exits with code 0 if it has finished, 2 for a bad command line, else 1.
    """
    parser = argparse.ArgumentParser(description="Runs a component of the pipeline.")
    parser.add_argument("--executor_class_path", required=True, metavar="MODULE.CLASS")
    for flag, name in (("invocation_args", "invocation"), ("inputs_spec_args", "inputs_spec")):
        parser.add_argument(f"--json_serialized_{flag}", dest=name, required=True, metavar="JSON")
    arguments, beam_arguments = parser.parse_known_args()
    # Model servers read what is pushed as another user; a later task may be another one, too, of
    # the same group.
    os.umask(0o002)
    try:
        _run(arguments, beam_arguments)
    except Exception as error:
        if not isinstance(error, EntrypointError):
            traceback.print_exc()
        component = arguments.executor_class_path
        sys.stdout.flush()
        print(f"error: {component} failed: {_describe(error)}", file=sys.stderr, flush=True)
        _leave(1)
    _leave(0)


if __name__ == "__main__":
    main()
