"""The compiled pipeline, and kubeflow/'s scripts as modules."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = [
    *("--image", "registry.example.org/vit:1.0@sha256:0123"),
    *("--trainer_image", "registry.example.org/vit-gpu:1.0"),
    *("--image_pull_secrets", "regcred,other"),
    *("--root", "minio://mlpipeline/v2/artifacts"),
    *("--preset", "tiny", "--seed", "7", "--tune", "3", "--export", "tflite,onnx"),
    *("--gpus", "2", "--shared_memory", "8Gi", "--retries", "5"),
    *("--resources", "Trainer=8:32.5,Pusher=0.5:2"),
    *("--node_selector", "zone=a,Trainer:accelerator=l4"),
    *("--tolerations", "spot=yes:NoSchedule,Evaluator:large:NoExecute"),
    *("--object_store_secret", "mlpipeline-minio-artifact"),
]

Compile = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def entrypoint() -> ModuleType:
    """kubeflow/entrypoint.py, which is run by its path otherwise."""
    path = REPOSITORY / "kubeflow" / "entrypoint.py"
    spec = importlib.util.spec_from_file_location("entrypoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_compiler(*flags: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `python kubeflow/runner.py FLAGS`."""
    return subprocess.run(
        [sys.executable, "kubeflow/runner.py", *map(str, flags)],
        cwd=REPOSITORY,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="session")
def compiler() -> Compile:
    """Runs kubeflow/runner.py as a user would."""
    return run_compiler


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline compiled with FLAGS."""
    path = tmp_path_factory.mktemp("package") / "pipeline.yaml"
    process = run_compiler(*FLAGS, "--output", path, PYTHONHASHSEED="1")
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"wrote {path}\n"
    return path


@pytest.fixture(scope="session")
def documents(package: Path) -> list[dict[str, Any]]:
    """Both documents of the package: PipelineSpec and PlatformSpec."""
    return list(yaml.safe_load_all(package.read_text()))
