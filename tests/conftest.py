"""Fixtures for all tests: where the data are, and how to run the project's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dataset import synthetic
from tests.support import patience

# Servers of these tests are on this machine, whatever proxy leads to others.
os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1,localhost"]))

REPOSITORY = Path(__file__).resolve().parent.parent
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def synthetic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic set in the binary layout: 2,000 training and 500 test images."""
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    return synthetic.generate(folder, seed=1, train=2000, test=500)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real CIFAR-100: the archive or folder that CIFAR100_DATA names."""
    path = os.environ.get("CIFAR100_DATA")
    if not path:
        pytest.skip("CIFAR100_DATA does not name the real data")
    return Path(path)


@pytest.fixture(scope="session")
def run_module() -> Command:
    """Runs `python -m MODULE ARGUMENT...` as a user would; `patience` watches the process."""

    def run(
        module: str,
        *arguments: object,
        cwd: Path = REPOSITORY,
        env: dict[str, str] | None = None,
        cpu_seconds: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        command: Sequence[str] = [sys.executable, "-m", module, *map(str, arguments)]
        return patience.run(
            command, cpu_seconds=cpu_seconds, cwd=cwd, env={**os.environ, **(env or {})}
        )

    return run
