"""kubeflow/entrypoint.py without TFX; with it, in tests/e2e/test_kubeflow_pipeline.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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


def test_without_ml_metadata_the_id_of_an_artifact_is_not_its_name(
    entrypoint: ModuleType, pod: Path
):
    given = executor_input()
    given["inputs"]["artifacts"]["examples"]["artifacts"][0] |= {
        "name": "examples",
        "artifactId": "8a2e",
        "type": {"schemaTitle": "system.Dataset"},
    }
    local = entrypoint.localize(given, SPEC, entrypoint.Mirror(str(pod)))
    (examples,) = local["inputs"]["artifacts"]["examples"]["artifacts"]
    assert (examples["name"], examples["type"]) == ("8a2e", EXAMPLES)


@pytest.mark.parametrize(
    ("value", "filled"),
    [
        ("{{$.inputs.parameters['preset']}}", 'a "b" \\ é'),
        ("{{$.inputs.parameters['preset']}}/{{$.inputs.parameters['epochs']}}", 'a "b" \\ é/3.0'),
        (
            '{"preset": "{{$.inputs.parameters[\'preset\']}}", '
            "\"rate\": -{{$.inputs.parameters['rate']}}, \"n\": {{$.inputs.parameters['epochs']}}}",
            {"preset": 'a "b" \\ é', "rate": -1e-7, "n": 3},
        ),
        ('{"a": 1}', {"a": 1}),
        ("plain", "plain"),
    ],
)
def test_placeholders_that_the_launcher_has_left(
    entrypoint: ModuleType, pod: Path, value: str, filled: Any
):
    given = executor_input(value=value, preset='a "b" \\ é', epochs=3.0, rate=1e-7)
    local = entrypoint.localize(given, SPEC, entrypoint.Mirror(str(pod)))
    result = local["inputs"]["parameterValues"]["value"]
    assert (result if isinstance(filled, str) else json.loads(result)) == filled


def test_what_is_put_in_place_of_a_placeholder_is_not_replaced_again(entrypoint: ModuleType):
    values = {"a": "{{$.inputs.parameters['b']}}", "b": "x"}
    with pytest.raises(entrypoint.EntrypointError, match=r"'c' has a placeholder .*\['b'\]"):
        entrypoint.fill("c", "{{$.inputs.parameters['a']}}", values)


def test_the_number_of_files_goes_with_an_artifact(entrypoint: ModuleType, tmp_path: Path):
    mirror = entrypoint.Mirror(str(tmp_path))
    model = tmp_path / "minio/bucket/run/model"
    (model / "variables").mkdir(parents=True)
    for name in ("saved_model.pb", "variables/index"):
        (model / name).touch()
    artifact = {"name": "model", "uri": str(model)}
    output = {"artifacts": {"model": {"artifacts": [artifact]}}}
    result = entrypoint.globalize(output, executor_input(), mirror)
    (model,) = result["artifacts"]["model"]["artifacts"]
    assert model == {**artifact, "uri": "minio://bucket/run/model", "metadata": {"vit_files": 2.0}}


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
    assert model["metadata"] == {
        **metadata,
        "current_model": "minio://bucket/run/model",
        "vit_files": 0.0,
    }


def run(
    folder: Path,
    given: dict[str, Any] | str,
    *python: str,
    executor: str = "a.b.Executor",
    prefix: Sequence[str] = (),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs a container's command, with the mirrors in a folder."""
    text = given if isinstance(given, str) else json.dumps(given)
    return subprocess.run(
        [
            *prefix,
            *(sys.executable, *python, str(REPOSITORY / "kubeflow/entrypoint.py")),
            *("--executor_class_path", executor),
            *("--json_serialized_invocation_args", text),
            *("--json_serialized_inputs_spec_args", json.dumps(SPEC)),
            "--direct_num_workers=1",
        ],
        env={**os.environ, "VIT_MIRROR_ROOT": str(folder), **variables},
        capture_output=True,
        text=True,
        timeout=300,
        umask=0o077,
    )


def refusal(
    folder: Path, given: dict[str, Any] | str, *python: str, prefix: Sequence[str] = ()
) -> str:
    """Checks that one line says why it failed and that no output is there; returns that line."""
    process = run(folder, given, *python, prefix=prefix)
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
        (
            {"custom_config": '{"a": "{{$.inputs.parameters[\'nothing\']}}"}'},
            "parameter 'custom_config' has a placeholder in it that nothing has replaced: ",
        ),
        ({"data": "{{$.pipeline_job_name}}"}, "parameter 'data' has a placeholder in it"),
    ],
)
def test_parameters_that_cannot_be_right(pod: Path, parameters: dict[str, Any], message: str):
    assert refusal(pod, executor_input(**parameters)).startswith(message)


@pytest.mark.parametrize("name", ["checkpoint_dir", "serving_dir"])
def test_a_folder_that_cannot_be_written(pod: Path, name: str):
    folder = pod / "volume"
    folder.mkdir(mode=0o555)
    # Root may write everywhere, in containers too, unless it has lost its powers.
    drop = ("setpriv", "--inh-caps=-all", "--bounding-set=-all") if os.geteuid() == 0 else ()
    line = refusal(pod, executor_input(**{name: f"{folder}/vit/models"}), prefix=drop)
    assert line == (
        f"{name} is {folder}/vit/models, and {folder} cannot be written to: Permission denied. "
        f"This is user {os.getuid()} with the groups {sorted({os.getgid(), *os.getgroups()})}; it "
        f"belongs to user {os.getuid()} and group {folder.stat().st_gid}, mode 555. Make it "
        "writable for one of these groups, as kubeflow/manifests/loader.yaml does."
    )


def test_a_folder_that_can_be_written_stays_as_it_is(entrypoint: ModuleType, pod: Path):
    for folder in (f"{pod}/volume/models", "gs://bucket/models", "models"):
        given = executor_input(serving_dir=folder)
        entrypoint.localize(given, SPEC, entrypoint.Mirror(str(pod)))
    assert sorted(path.name for path in pod.iterdir()) == ["minio"]


@pytest.mark.parametrize(("present", "found"), [(0, "no files"), (1, "1 file")])
def test_an_input_whose_files_are_gone(pod: Path, present: int, found: str):
    given = executor_input()
    given["inputs"]["artifacts"]["examples"]["artifacts"][0]["metadata"] = {"vit_files": 2.0}
    if present:
        (pod / "minio/bucket/run/examples").mkdir()
        (pod / "minio/bucket/run/examples/one").touch()
    assert refusal(pod, given) == (
        "input 'examples' was made with 2 files at minio://bucket/run/examples, and "
        f"{found} came from there: removed, it seems, while Kubeflow Pipelines' cache still knows "
        "it. Compile with --no_cache to have it made anew."
    )


LINGERING = """
import atexit, os, threading, time
from tfx.dsl.components.base import base_executor

class Executor(base_executor.BaseExecutor):
    def Do(self, inputs, outputs, properties):
        with open(os.path.join(outputs["model"][0].uri, "file"), "w") as file:
            file.write("done")
        print("done", end="")
        atexit.register(os.abort)
        threading.Thread(target=time.sleep, args=(600,)).start()
"""


# What Kubernetes makes of readOnlyRootFilesystem, of dropped capabilities, and of the volume
# that the package has at /tmp.
READ_ONLY = """
mount --make-rprivate / && mount -o remount,bind,ro / && mount -t tmpfs tmpfs /tmp || exit 99
exec setpriv --inh-caps=-all --bounding-set=-all "$@"
"""


def test_a_read_only_root_file_system():
    unshare = ("unshare", "--mount", "sh", "-c", READ_ONLY, "sh")
    try:
        possible = subprocess.run([*unshare, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible or not os.path.ismount("/dev/shm"):
        pytest.skip("needs the right to mount, and /dev/shm for what pods have on other volumes")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        pod = Path(folder)
        (pod / "minio/bucket/run").mkdir(parents=True)
        (pod / "lingering.py").write_text(LINGERING)
        given = executor_input()
        given["outputs"]["outputFile"] = "/tmp/kfp_outputs/output_metadata.json"
        variables = {"PYTHONPATH": folder, "TMPDIR": "/tmp"}
        process = run(pod, given, executor="lingering.Executor", prefix=unshare, **variables)
        assert process.returncode == 0, process.stderr
        assert (pod / "minio/bucket/run/model/file").read_text() == "done"


def test_what_lingers_when_a_component_has_finished_neither_undoes_nor_delays_that(pod: Path):
    (pod / "lingering.py").write_text(LINGERING)
    given = executor_input()
    output_file = pod / "minio/bucket/run/output_metadata.json"
    given["outputs"]["outputFile"] = str(output_file)
    process = run(pod, given, executor="lingering.Executor", PYTHONPATH=str(pod))
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("done")
    (model,) = json.loads(output_file.read_text())["artifacts"]["model"]["artifacts"]
    assert model["uri"] == "minio://bucket/run/model"
    assert model["metadata"]["vit_files"] == 1
    written = pod / "minio/bucket/run/model/file"
    assert written.stat().st_mode & 0o777 == 0o664


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
