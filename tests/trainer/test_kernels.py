"""How many kernels a training step has on a GPU, as XLA compiles it for one that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience

ROOT = Path(__file__).resolve().parents[2]
# Each a few more than there are (results/kernels.json): a step's time on a GPU is their number.
CEILINGS = {"compact_long:128": 330, "compact_wide:256": 540, "notebook:256": 850}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with JAX's compiler for CUDA, which needs a newer Python than one TFX line."""
    folder = tmp_path_factory.mktemp("kernels") / "venv"
    find = ". tools/choose_python.sh; find_python 3.12 | cut -f2"
    found = subprocess.run(["sh", "-c", find], cwd=ROOT, capture_output=True, text=True).stdout
    if not found.strip():
        # On 3.13, this version's compiler ends by a segmentation fault.
        pytest.skip("there is no Python 3.12 for JAX's compiler for CUDA here")
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "-q", "--python", found.strip(), str(folder)], check=True)
    install = [uv, "pip", "install", "-q", "--no-deps", "--python", str(folder)]
    process = subprocess.run(
        [*install, "-r", str(ROOT / "requirements" / "kernels.txt")], capture_output=True, text=True
    )
    if process.returncode:
        pytest.skip(f"JAX's CUDA plugin cannot be installed here: {process.stderr.strip()[-300:]}")
    return folder / "bin" / "python"


def test_kernels_of_a_step_stay_few(python: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    process = patience.run(
        [python, "-m", "benchmarks.kernels", *CEILINGS, "--out", tmp_path / "kernels.json"],
        cwd=ROOT,
        env=environment,
        cpu_seconds=550,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    counted = {
        result["program"]: result for result in json.loads((tmp_path / "kernels.json").read_text())
    }
    assert counted.keys() == CEILINGS.keys()
    for program, ceiling in CEILINGS.items():
        kernels = counted[program]["kernels"]
        # Fewer than half would be a count of something else than the step.
        assert ceiling / 2 < kernels <= ceiling, (program, counted[program]["parts"])
        assert sum(counted[program]["parts"].values()) == kernels
