"""benchmarks/gpu.py, rehearsed on the CPU with the smallest preset."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset import synthetic
from tests.support import patience
from tests.support.networks import build_model
from trainer import weights
from trainer.presets import get_preset

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("notebook's own code, 256", "compact_long, 128")


def gpu(command: str, folder: Path, seconds: int, *more: str) -> str:
    """Runs a command of the benchmark; returns what it printed."""
    folders = ["--data", str(folder / "data"), "--out", str(folder / "out")]
    options = ["--rehearse", *folders, "--seconds", str(seconds), *more]
    process = patience.run(
        [sys.executable, "-m", "benchmarks.gpu", command, *options],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cpu_seconds=400,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("gpu")
    synthetic.generate(work / "data", train=400, test=100)
    measure = ("--programs", *PROGRAMS, "--images", "64", "--candidate_seconds", "2")
    (work / "first.txt").write_text(gpu("measure", work, 200, *measure))
    (work / "again.txt").write_text(gpu("measure", work, 200, *measure))
    (work / "train.txt").write_text(gpu("train", work, 45))
    return work


def test_rates_and_candidates_are_measured_once(folder: Path) -> None:
    lines = (folder / "out" / "rates.jsonl").read_text().splitlines()
    rates = {result["program"]: result for result in map(json.loads, lines)}
    assert len(lines) == 2 and rates.keys() == set(PROGRAMS)
    for result in rates.values():
        steps_per_second = 1000 / result["step_ms"]
        np.testing.assert_allclose(64 * steps_per_second, result["images_per_second"], rtol=0.02)
        assert np.isfinite(result["loss"])
    (candidate,) = map(json.loads, (folder / "out" / "candidates.jsonl").read_text().splitlines())
    assert candidate["program"] == "compact_long, 128" and candidate["epochs"] >= 1
    again = (folder / "again.txt").read_text()
    assert "images/s" in again and "compiled" not in again


def test_training_ends_in_time_with_the_weights_that_were_measured(folder: Path) -> None:
    result = json.loads((folder / "out" / "training-first-start.json").read_text())
    assert result["program"] == "compact_long, 128" and result["seconds_since_start"] < 90
    assert len(result["history"]) == result["preset"]["training"]["epochs"]
    network = build_model(get_preset("tiny"))
    network.set_weights(weights.unpack((folder / "out" / "training-first-start.npz").read_bytes()))
    records = np.fromfile(folder / "data" / "test.bin", np.uint8).reshape(100, -1)
    images = records[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    deviation = np.sqrt(result["normalization"]["variance"])
    logits = network.predict(
        ((images - result["normalization"]["mean"]) / deviation).astype(np.float32), verbose=0
    )
    hits = (np.argmax(logits, axis=1) == records[:, 1]).mean()
    np.testing.assert_allclose(hits, result["history"][-1]["test_top_1_accuracy"], atol=0.021)
