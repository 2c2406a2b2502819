"""Which engine trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience
from trainer import engines

ROOT = Path(__file__).resolve().parents[2]
CHOICE = "from trainer import engines; print(engines.choose('{}'), engines.accelerators())"


def choose(name: str, path: Path) -> subprocess.CompletedProcess[str]:
    """What is chosen in a process that imports from a folder first."""
    return patience.run(
        [sys.executable, "-c", CHOICE.format(name)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(path)},
        cpu_seconds=60,
    )


def write_jax(folder: Path, program: str) -> None:
    """A module `jax` and, beside it, what says that it has a plug-in for accelerators."""
    (folder / "jax.py").write_text(program)
    (folder / "jax_plugins").mkdir()


def test_what_is_asked_for_is_taken(tmp_path: Path):
    assert choose("jax", tmp_path).stdout == "jax 0\n"
    assert choose("tensorflow", tmp_path).stdout == "tensorflow 0\n"
    with pytest.raises(ValueError, match="engine is 'torch': it must be one of auto, tensorflow"):
        engines.choose("torch")


@pytest.mark.parametrize(
    ("platform", "chosen"), [("gpu", "jax 2\n"), ("tpu", "jax 2\n"), ("cpu", "tensorflow 0\n")]
)
def test_auto_is_jax_where_that_sees_an_accelerator(platform: str, chosen: str, tmp_path: Path):
    device = f"type('Device', (), {json.dumps({'platform': platform, 'device_kind': 'A'})})"
    write_jax(tmp_path, f"local_devices = lambda: [{device}] * 2\n")
    assert choose("auto", tmp_path).stdout == chosen


def test_auto_without_a_plug_in_does_not_ask_jax(tmp_path: Path):
    (tmp_path / "jax.py").write_text("raise SystemExit('asked')\n")
    result = choose("auto", tmp_path)
    assert (result.stdout, result.stderr) == ("tensorflow 0\n", "")


def test_auto_where_jax_is_broken(tmp_path: Path):
    write_jax(tmp_path, "raise ImportError('no CUDA')\n")
    result = choose("auto", tmp_path)
    assert result.stdout == "tensorflow 0\n"
    assert result.stderr == "  JAX cannot be used: ImportError: no CUDA\n"


def test_jax_has_to_be_installed():
    # -S: nothing but Python's own modules.
    result = patience.run(
        [sys.executable, "-S", "-c", CHOICE.format("jax")],
        cwd=ROOT,
        cpu_seconds=60,
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "engine jax needs the package jax, which is not installed: `make setup GPU=1`" in last
