"""kubeflow/run_docker.py where there is no engine; with one it takes the image, and minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    places = ("data", "serving_dir", "checkpoint_dir")
    parameters = {name: {"parameterType": "STRING"} for name in places}
    spec = {
        "pipelineInfo": {"name": "vit"},
        "root": {"dag": {"tasks": {}}, "inputDefinitions": {"parameters": parameters}},
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.bin").touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("data", "parameter", "named"),
    [
        ("data", "data=x", "DOCKER_HOST=unix:"),
        ("empty", "data=x", "train.bin"),
        ("data", "nonsense=1", "checkpoint_dir, data, serving_dir"),
    ],
)
def test_what_is_missing_is_said(folder: Path, data: str, parameter: str, named: str) -> None:
    script = ROOT / "kubeflow" / "run_docker.py"
    given = ["--data", folder / data, "--param", parameter, "--root", folder / "root"]
    result = subprocess.run(
        [sys.executable, script, folder / "pipeline.yaml", *given],
        env={**os.environ, "DOCKER_HOST": f"unix://{folder}/none.sock"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    # The older line's kfp has no such runner.
    assert named in result.stderr or "kfp 2.16 or newer" in result.stderr
    assert not (folder / "root").exists()
