"""kubeflow/deploy.py against a stand-in for a cluster that speaks real HTTP (api_double.py)."""

from __future__ import annotations

import importlib.util
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "kubeflow" / "deploy.py"
PARAMETERS = {
    "epochs": {"parameterType": "NUMBER_INTEGER", "defaultValue": 2},
    "learning_rate": {"parameterType": "NUMBER_DOUBLE", "isOptional": True},
    "augment": {"parameterType": "BOOLEAN", "defaultValue": True},
    "data": {"parameterType": "STRING"},
}
Result = tuple[int, str, str]
Call = Callable[..., Result]


def load(path: Path) -> ModuleType:
    """A script that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


double = load(Path(__file__).with_name("api_double.py"))
deploy = load(SCRIPT)


@pytest.fixture
def cluster() -> Iterator[Any]:
    with double.Cluster() as running:
        yield running


@pytest.fixture
def package(tmp_path: Path) -> Path:
    spec = {
        "pipelineInfo": {"name": "vit"},
        "schemaVersion": "2.1.0",
        "defaultPipelineRoot": "gs://package/root",
        "root": {
            "dag": {"tasks": {"Trainer": {}, "Pusher": {}}},
            "inputDefinitions": {"parameters": PARAMETERS},
        },
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump_all([spec, {"platforms": {}}]))
    return path


@pytest.fixture
def call(cluster: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")

    def run(command: str, *arguments: object, endpoint: str | None = None) -> Result:
        fixed = [command, "--endpoint", endpoint or cluster.url]
        if command in ("run", "wait"):
            fixed += ["--interval", "0.05"]
        with pytest.raises(SystemExit) as stopped:
            deploy.main([*fixed, *map(str, arguments)])
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return run


def test_a_package_is_uploaded_run_and_waited_for(cluster: Any, call: Call, package: Path) -> None:
    backend = {"root": "RUNNING", "root-driver": "SUCCEEDED", "executor": "RUNNING"}
    cluster.states = [
        ("PENDING", {}),
        ("RUNNING", {**backend, "Trainer-driver": "SUCCEEDED", "Trainer": "RUNNING"}),
        ("RUNNING", {**backend, "Trainer": "RUNNING"}),
        ("SUCCEEDED", {**backend, "Trainer": "SUCCEEDED", "Pusher": "SUCCEEDED"}),
    ]
    code, out, err = call(
        "run",
        *(package, "--param", "data=/data/cifar-100", "--param", "epochs=20"),
        *("--param", "learning_rate=1", "--param", "augment=false", "--name", "first"),
        *("--pipeline_root", "s3://bucket/vit"),
    )
    assert (code, err) == (0, "")
    (run,) = cluster.sent("POST", "/apis/v2beta1/runs")
    assert run["pipeline_version_reference"] == {
        "pipeline_id": "p0",
        "pipeline_version_id": cluster.versions["p0"][-1]["pipeline_version_id"],
    }
    assert run["runtime_config"] == {
        "parameters": {
            "data": "/data/cifar-100",
            "epochs": 20,
            "learning_rate": 1,
            "augment": False,
        },
        "pipeline_root": "s3://bucket/vit",
    }
    assert (run["display_name"], run["service_account"]) == ("first", "vit-pipeline")
    assert cluster.experiments[run["experiment_id"]]["display_name"] == "vit"
    (upload,) = cluster.sent("POST", "/apis/v2beta1/pipelines/upload")
    assert upload["uploadfile"] == package.read_bytes()
    progress = re.findall(r"^\d\d:\d\d:\d\d  (.*?)$", out, flags=re.M)
    assert [" ".join(line.split()) for line in progress] == [
        "Trainer running",
        "Trainer succeeded 65 s",
        "Pusher succeeded 65 s",
    ]
    assert out.endswith("run r0: succeeded\n")


def test_a_known_package_is_not_uploaded_again_and_a_changed_one_is_a_new_version(
    cluster: Any, call: Call, package: Path
) -> None:
    assert call("upload", package)[0] == 0
    for suffix in ("# one\n", "# two\n"):
        package.write_text(package.read_text() + suffix)
        assert call("upload", package)[0] == 0
    before = [version["display_name"] for version in cluster.versions["p0"]]
    assert len(before) == len(set(before)) == 4  # on two pages
    code, out, _ = call("upload", package)
    assert code == 0 and "there already" in out
    assert [version["display_name"] for version in cluster.versions["p0"]] == before
    assert list(cluster.pipelines) == ["p0"]


def test_a_recurring_run_is_made(cluster: Any, call: Call, package: Path) -> None:
    given = (package, "--param", "data=/d")
    code, out, _ = call("schedule", *given, "--cron", "0 0 3 * * 1", "--name", "weekly")
    assert (code, out.splitlines()[-1]) == (0, "recurring run weekly: j0")
    (made,) = cluster.recurring
    assert made["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}}
    assert made["mode"] == "ENABLE" and made["no_catchup"]
    assert made["runtime_config"] == {
        "parameters": {"data": "/d"},
        "pipeline_root": "gs://package/root",
    }
    assert made["service_account"] == "vit-pipeline"
    assert call("schedule", *given, "--every", 3600)[0] == 0
    periodic = cluster.recurring[1]["trigger"]["periodic_schedule"]
    assert int(periodic["interval_second"]) == 3600


@pytest.mark.parametrize(
    ("flags", "root"),
    [
        ([], "gs://package/root"),
        (["--pipeline_root", "s3://other/root"], "s3://other/root"),
        (["--pipeline_root", ""], None),
    ],
)
def test_the_packages_root_is_sent_since_no_backend_reads_it(
    cluster: Any, call: Call, package: Path, flags: list[str], root: str | None
) -> None:
    assert call("run", package, "--param", "data=/d", *flags)[0] == 0
    (run,) = cluster.sent("POST", "/apis/v2beta1/runs")
    assert (run["runtime_config"].get("pipeline_root") or None) == root


@pytest.mark.parametrize("version", ["2.0.5", "2.2.0", "v2.1.3"])
def test_an_installation_that_is_too_old_is_refused(
    cluster: Any, call: Call, package: Path, version: str
) -> None:
    cluster.version = version
    code, _, err = call("run", package, "--param", "data=/d")
    assert code == 3 and f"is Kubeflow Pipelines {version}" in err and "2.3 or newer" in err
    assert not cluster.pipelines and not cluster.runs


@pytest.mark.parametrize("version", ["2.3.0", "2.17.0", "v3.0.0-rc.1"])
def test_an_installation_that_is_new_enough_is_used(
    cluster: Any, call: Call, package: Path, version: str
) -> None:
    cluster.version = version
    code, out, _ = call("upload", package)
    assert code == 0 and "or newer" not in out


def test_an_installation_that_does_not_say_its_version_is_used(
    cluster: Any, call: Call, package: Path
) -> None:
    cluster.version = "unknown"
    code, out, _ = call("upload", package)
    assert code == 0 and "says its version is 'unknown': 2.3 or newer is needed" in out


def test_several_users_have_pipelines_of_one_name_each(
    cluster: Any, call: Call, package: Path
) -> None:
    cluster.multi_user = True
    for namespace in ("ann", "ben", "ann"):
        code, _, err = call("run", package, "--param", "data=/d", "--namespace", namespace)
        assert (code, err) == (0, "")
    assert [made["namespace"] for made in cluster.pipelines.values()] == ["ann", "ben"]
    assert [made["namespace"] for made in cluster.experiments.values()] == ["ann", "ben"]
    runs = [run["pipeline_version_reference"]["pipeline_id"] for run in cluster.runs.values()]
    assert runs == ["p0", "p1", "p0"]


def test_where_there_are_several_users_a_namespace_is_asked_for(
    cluster: Any, call: Call, package: Path
) -> None:
    cluster.multi_user = True
    code, _, err = call("upload", package)
    assert code == 2 and "--namespace" in err
    assert not cluster.pipelines


def test_progress_is_shown_where_there_is_no_ml_metadata(
    cluster: Any, call: Call, package: Path
) -> None:
    cluster.without_mlmd = True
    cluster.messages = {"Pusher": "the model\n is not blessed"}
    cluster.states = [
        ("RUNNING", {"root": "RUNNING", "Trainer": "RUNTIME_STATE_UNSPECIFIED"}),
        ("FAILED", {"root": "FAILED", "Trainer": "CACHED", "Pusher": "FAILED"}),
    ]
    code, out, err = call("run", package, "--param", "data=/d")
    assert code == 1
    lines = [" ".join(line.split()[1:]) for line in out.splitlines() if line[2:3] == ":"]
    assert lines == ["Trainer cached 65 s", "Pusher failed 65 s the model is not blessed"]
    assert err.startswith("error: run r0: failed\nit broke\nPusher: the model is not blessed\n")


@pytest.mark.parametrize(
    ("version", "told"), [("2.3.0", False), ("2.4.0", True), ("2.16.1", True), ("2.17.0", False)]
)
def test_a_schedule_is_told_where_its_service_account_is_ignored(
    cluster: Any, call: Call, package: Path, version: str, told: bool
) -> None:
    cluster.version = version
    code, out, _ = call("schedule", package, "--param", "data=/d", "--every", 60)
    assert code == 0
    assert ("ignores the service account of schedules" in out) == told


def kubeconfig(path: Path, server: str) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {}}],
    }
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_failed_task_is_named_with_the_end_of_its_log(
    cluster: Any,
    call: Call,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "config", cluster.url)))
    cluster.states = [("FAILED", {"Trainer": "FAILED"})]
    log = "".join(f"line {number}\n" for number in range(100)) + "ValueError: no such preset\n"
    labels = {"pipeline/runid": "r0"}

    def node(name: str) -> dict[str, str]:
        return {"workflows.argoproj.io/node-name": f"vit-x7.{name}"}

    cluster.pods = {
        "vit-x7-impl-1": (labels, node("root.Trainer.executor"), "Failed", log),
        "vit-x7-impl-2": (labels, node("root.Pusher.executor"), "Succeeded", "fine\n"),
        "other-impl-3": ({"pipeline/runid": "r9"}, {}, "Failed", "of another run\n"),
    }
    code, out, err = call("run", package, "--param", "data=/d")
    assert code == 1
    assert re.search(r"Trainer +failed  65 s", out)
    assert err.startswith("error: run r0: failed\nit broke\n-- Trainer failed; the end of vit-x7-")
    assert err.endswith("line 99\nValueError: no such preset\n")
    assert len(re.findall("^line ", err, flags=re.M)) == 39
    assert "fine" not in err and "another" not in err
    # `wait` knows the run's id alone.
    assert "-- Trainer failed" in call("wait", "r0")[2]


def test_a_container_that_was_killed_is_said_to_be(
    cluster: Any,
    call: Call,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "config", cluster.url)))
    cluster.states = [("FAILED", {})]

    def end(**terminated: Any) -> dict[str, Any]:
        container = {
            **{"name": "main", "image": "i", "imageID": "i", "ready": False, "restartCount": 0},
            "state": {"terminated": terminated},
        }
        return {"containerStatuses": [container]}

    cluster.ended = {
        "out-of-memory": end(exitCode=137, reason="OOMKilled"),
        "evicted": {"reason": "Evicted", "message": "The node was low on resource: memory."},
        "by-itself": end(exitCode=1, reason="Error"),
    }
    cluster.pods = {
        name: ({"pipeline/runid": "r0"}, {}, "Failed", f"log of {name}\n") for name in cluster.ended
    }
    assert call("run", package, "--param", "data=/d", "--no_wait")[0] == 0
    err = call("wait", "r0")[2]
    assert re.findall("^-- (.*)$", err, flags=re.M) == [
        "a task failed (OOMKilled, exit code 137); the end of out-of-memory's log:",
        "a task failed (Evicted: The node was low on resource: memory.); the end of evicted's log:",
        "a task failed; the end of by-itself's log:",
    ]


def test_without_kubernetes_the_command_for_the_logs_is_given(
    cluster: Any, call: Call, package: Path
) -> None:
    cluster.states = [("FAILED", {})]
    code, _, err = call("run", package, "--param", "data=/d")
    assert code == 1
    assert "it broke" in err
    assert "kubectl logs -n kubeflow -l pipeline/runid=r0 -c main" in err


def test_waiting_ends_and_can_be_taken_up_again(cluster: Any, call: Call, package: Path) -> None:
    cluster.states = [("RUNNING", {})]
    code, _, err = call("run", package, "--param", "data=/d", "--timeout", 0.3)
    assert code == 4 and "wait r0" in err
    cluster.states = [("RUNNING", {"Trainer": "RUNNING"}), ("SUCCEEDED", {"Trainer": "SUCCEEDED"})]
    code, out, _ = call("wait", "r0")
    assert code == 0 and "Trainer" in out


def test_no_wait_comes_back_at_once(cluster: Any, call: Call, package: Path) -> None:
    code, out, _ = call("run", package, "--param", "data=/d", "--no_wait")
    # The API's address is not the interface's.
    assert code == 0 and out.splitlines()[-1] == "run r0"
    given = ("--no_wait", "--ui_endpoint", "https://ui.example.org/pipeline/")
    out = call("run", package, "--param", "data=/d", *given)[1]
    assert out.splitlines()[-1] == "run r1: https://ui.example.org/pipeline/#/runs/details/r1"
    assert not cluster.sent("GET", "/apis/v2beta1/runs/r0")


def test_a_moment_without_an_answer_ends_no_wait(cluster: Any, call: Call, package: Path) -> None:
    assert call("run", package, "--param", "data=/d", "--no_wait")[0] == 0
    cluster.silent = 6  # more than the client's own four attempts
    assert call("wait", "r0")[0] == 0
    assert len(cluster.sent("GET", "/apis/v2beta1/runs/r0")) == 7


def test_long_silence_ends_it(
    cluster: Any, call: Call, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("run", package, "--param", "data=/d", "--no_wait")[0] == 0
    monkeypatch.setattr("pipeline.kubeflow.api._PATIENCE", 0.1)
    cluster.silent = 1000
    code, _, err = call("wait", "r0")
    assert code == 3 and "does not answer" in err and "The run r0 goes on." in err


def test_the_token_is_sent(
    cluster: Any,
    call: Call,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster.token = "secret"
    (tmp_path / "token").write_text("secret\n")
    assert call("upload", package, "--token_file", tmp_path / "token")[0] == 0
    assert call("upload", package, "--token", "secret", "--namespace", "team")[0] == 0
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "secret")
    assert call("upload", package)[0] == 0
    code, _, err = call("upload", package, "--token", "wrong")
    assert code == 3
    assert "answered 401" in err and "--token_file" in err and "no user identity" in err


@pytest.mark.parametrize(
    ("status", "advice"),
    [(403, "deployer.yaml"), (404, "not Kubeflow Pipelines 2"), (500, "ml-pipeline")],
)
def test_a_refusal_says_what_to_do(
    cluster: Any, call: Call, package: Path, status: int, advice: str
) -> None:
    cluster.status = status
    code, _, err = call("run", package, "--param", "data=/d")
    assert code == 3
    assert f"answered {status}" in err and advice in err
    assert not cluster.runs


def test_an_endpoint_that_is_not_there_is_named(call: Call, package: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        code, _, err = call("upload", package, endpoint=endpoint)
    assert code == 3
    assert f"{endpoint} does not answer" in err and "port-forward" in err


def test_an_endpoint_that_never_answers_is_given_up(
    call: Call, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.kubeflow.api._REQUEST_TIMEOUT", (0.1, 0.1))
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = f"http://127.0.0.1:{mute.getsockname()[1]}"
        code, _, err = call("upload", package, endpoint=endpoint)
    assert code == 3 and "does not answer" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--param", "data=/d", "--param", "epoch=2"], "augment, data, epochs, learning_rate"),
        (["--param", "data=/d", "--param", "epochs"], "NAME=VALUE"),
        (["--param", "data=/d", "--param", "epochs=two"], "NUMBER_INTEGER"),
        (["--param", "data=/d", "--param", "epochs=true"], "NUMBER_INTEGER"),
        (["--param", "data=/d", "--param", "augment=1"], "BOOLEAN"),
        ([], "--param data="),
        (["--param", "data=/d", "--token_file", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(
    cluster: Any, call: Call, package: Path, arguments: list[str], named: str
) -> None:
    code, _, err = call("run", package, *arguments)
    assert code == 2 and named in err
    assert not cluster.requests


@pytest.mark.parametrize("content", [None, "", "a: [", "a: 1\n", "- 1\n"])
def test_what_is_no_package_is_refused(
    cluster: Any, call: Call, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "other.yaml"
    if content is not None:
        path.write_text(content)
    code, _, err = call("upload", path)
    assert code == 2 and "other.yaml is no pipeline package" in err
    assert not cluster.requests


@pytest.mark.parametrize("endpoint", ["localhost:8888", "ftp://host"])
def test_an_endpoint_has_a_scheme(call: Call, package: Path, endpoint: str) -> None:
    code, _, err = call("upload", package, endpoint=endpoint)
    assert code == 2 and endpoint in err


def test_help_is_at_hand_without_the_client() -> None:
    program = (
        "import runpy, sys\n"
        "sys.argv[1:] = ['run', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print(stop.code, sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--service_account" in out
    last = out.splitlines()[-1]
    assert last.startswith("0 [") and "'yaml'" in last
    assert not {"kfp", "kubernetes", "tensorflow", "tfx"} & set(re.findall(r"'(\w+)'", last))
