"""kubeflow/deploy.py with what kubeflow/runner.py really compiles."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_compiled_pipeline_is_run(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    double = load(Path(__file__).with_name("api_double.py"))
    deploy = load(ROOT / "kubeflow" / "deploy.py")
    with double.Cluster() as cluster:
        given = ["run", str(package), "--endpoint", cluster.url, "--interval", "0.05"]
        # It was compiled without a fingerprint of the data: each run has to give one.
        with pytest.raises(SystemExit) as stop:
            deploy.main([*given, "--param", "epochs=3"])
        assert stop.value.code == 2
        assert "--param data_fingerprint=" in capsys.readouterr().err
        cluster.states = [("SUCCEEDED", {"Trainer": "SUCCEEDED", "Trainer-driver": "SUCCEEDED"})]
        parameters = ["epochs=3", "learning_rate=1e-3", "data_fingerprint=0123"]
        with pytest.raises(SystemExit) as stop:
            deploy.main([*given, *(f"--param={text}" for text in parameters)])
        assert stop.value.code == 0
        assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[-2:-1]] == [
            "Trainer"
        ]
        (run,) = cluster.sent("POST", "/apis/v2beta1/runs")
        assert run["runtime_config"] == {
            "parameters": {"epochs": 3, "learning_rate": 0.001, "data_fingerprint": "0123"},
            "pipeline_root": "minio://mlpipeline/v2/artifacts",
        }
