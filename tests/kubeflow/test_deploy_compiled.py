"""kubeflow/deploy.py with what kubeflow/runner.py really compiles."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import components
from kfp.pipeline_spec import pipeline_spec_pb2

from dataset.source import open_source
from tests.kubeflow.conftest import Compile

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


double = load(Path(__file__).with_name("api_double.py"))
deploy = load(ROOT / "kubeflow" / "deploy.py")


def call(*arguments: object) -> int:
    """Runs deploy.py; returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        deploy.main(list(map(str, arguments)))
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory: pytest.TempPathFactory, compiler: Compile) -> Path:
    """The pipeline compiled for a schedule."""
    path = tmp_path_factory.mktemp("scheduled") / "pipeline.yaml"
    process = compiler("--fingerprint_in_run", "--preset", "tiny", "--output", path)
    assert process.returncode == 0, process.stderr
    return path


@pytest.fixture(scope="module")
def spec(scheduled: Path) -> dict[str, Any]:
    return next(iter(yaml.safe_load_all(scheduled.read_text())))


def test_the_compiled_pipeline_is_run(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with double.Cluster() as cluster:
        given = ["run", package, "--endpoint", cluster.url, "--interval", "0.05"]
        # It was compiled without a fingerprint of the data: each run has to give one.
        assert call(*given, "--param", "epochs=3") == 2
        assert "--param data_fingerprint=" in capsys.readouterr().err
        cluster.states = [("SUCCEEDED", {"Trainer": "SUCCEEDED", "Trainer-driver": "SUCCEEDED"})]
        parameters = ["epochs=3", "learning_rate=1e-3", "data_fingerprint=0123"]
        assert call(*given, *(f"--param={text}" for text in parameters)) == 0
        assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[-2:-1]] == [
            "Trainer"
        ]
        (run,) = cluster.sent("POST", "/apis/v2beta1/runs")
        assert run["runtime_config"] == {
            "parameters": {"epochs": 3, "learning_rate": 0.001, "data_fingerprint": "0123"},
            "pipeline_root": "minio://mlpipeline/v2/artifacts",
        }


def test_a_schedule_whose_runs_would_all_be_cached_is_refused(
    package: Path, scheduled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with double.Cluster() as cluster:
        when = ("--endpoint", cluster.url, "--cron", "0 0 3 * * 1")
        assert call("schedule", package, *when, "--param", "data_fingerprint=0123") == 2
        assert "Compile it with kubeflow/runner.py --fingerprint_in_run" in capsys.readouterr().err
        assert not cluster.requests
        assert call("schedule", scheduled, *when) == 0
        (made,) = cluster.recurring
        assert made["runtime_config"].get("parameters", {}) == {}


def test_the_fingerprint_is_taken_in_the_run_and_is_in_the_cache_key(
    scheduled: Path, spec: dict[str, Any], synthetic_folder: Path, tmp_path: Path
) -> None:
    components.load_component_from_file(str(scheduled))
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    assert "data_fingerprint" not in spec["root"]["inputDefinitions"]["parameters"]
    tasks = spec["root"]["dag"]["tasks"]
    # What KFP's cache key of ExampleGen has in it, beside the rest: the task's output.
    assert tasks["ExampleGen"]["inputs"]["parameters"]["content_fingerprint"] == {
        "taskOutputParameter": {
            "producerTask": "DataFingerprint",
            "outputParameterKey": "fingerprint",
        }
    }
    assert "DataFingerprint" in tasks["ExampleGen"]["dependentTasks"]
    assert tasks["ExampleGen"]["cachingOptions"] == {"enableCache": True}
    assert tasks["DataFingerprint"]["cachingOptions"] == {"enableCache": False}
    platform = list(yaml.safe_load_all(scheduled.read_text()))[1]
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors["DataFingerprint_executor"]["pvcMount"]

    container = spec["deploymentSpec"]["executors"]["DataFingerprint_executor"]["container"]
    inputs = tasks["DataFingerprint"]["inputs"]["parameters"]
    output = tmp_path / "outputs" / "fingerprint"

    def run(data: object) -> subprocess.CompletedProcess[str]:
        values = {
            "{{$.inputs.parameters['data']}}": str(data),
            "{{$.inputs.parameters['options']}}": inputs["options"]["runtimeValue"]["constant"],
            "{{$.outputs.parameters['fingerprint'].output_file}}": str(output),
        }
        script = container["command"][-1].replace("/app", str(ROOT))
        return subprocess.run(
            [sys.executable, *container["command"][1:-1], script]
            + [values[argument] for argument in container["args"]],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )

    process = run(synthetic_folder)
    assert (process.returncode, process.stderr) == (0, "")
    assert output.read_text() == open_source(str(synthetic_folder)).card.source.fingerprint
    output.unlink()
    process = run("/nowhere")
    assert process.returncode == 1
    assert process.stderr.startswith("error: /nowhere is no data set that is read here")
    assert not output.exists()


def test_what_is_compiled_in_is_ascii(spec: dict[str, Any]) -> None:
    constants = re.findall(r'"constant": ("(?:[^"\\]|\\.)*")', json.dumps(spec))
    assert any("max_batch_size" in constant for constant in constants)
    assert [text for text in map(json.loads, constants) if not text.isascii()] == []
