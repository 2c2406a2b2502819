"""What follows from the one line of a metric of the gate."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.gate import TOP_1, TOP_5, resolve_floors
from tests.support import patience

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("components", "dataset", "kubeflow", "pipeline", "serving", "trainer")
LINE = (
    'GateMetric("class_recall", "recall of each class", "SparseCategoricalAccuracy", '
    'floor=0.125, compared=False, by="a_label"),'
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with another metric, in the middle."""
    folder = tmp_path_factory.mktemp("project")
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, folder / name)
    file = folder / "pipeline" / "gate.py"
    before, _, after = file.read_text().partition("    GateMetric(TOP_5")
    file.write_text(f"{before}    {LINE}\n    GateMetric(TOP_5{after}")
    return folder


def run(project: Path, *command: str) -> str:
    process = patience.run(
        [sys.executable, *command],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        cpu_seconds=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def thresholds(package: Path, values: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Metric -> its threshold on a slice, with the parameters replaced as a launcher does."""
    spec = next(yaml.safe_load_all(package.read_text()))
    inputs = spec["root"]["dag"]["tasks"]["Evaluator"]["inputs"]["parameters"]
    text = inputs["eval_config"]["runtimeValue"]["constant"]
    for name, value in values.items():
        text = text.replace(f"{{{{$.inputs.parameters['{name}']}}}}", str(value))
    return {
        json.loads(metric["config"])["name"]: metric["per_slice_thresholds"][0]
        for metric in json.loads(text)["metrics_specs"][0]["metrics"]
        if "per_slice_thresholds" in metric
    }


def test_a_metric_is_one_line_and_every_pipeline_parameter_reaches_its_own(project: Path):
    package = project / "pipeline.yaml"
    run(project, "kubeflow/runner.py", "--min_top_1_accuracy", "0.5", "--output", str(package))
    spec = next(yaml.safe_load_all(package.read_text()))
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    defaults = {
        name: parameters[f"min_{name}"]["defaultValue"] for name in (TOP_1, "class_recall", TOP_5)
    }
    assert defaults == {TOP_1: 0.5, "class_recall": 0.125, TOP_5: 0.5}
    found = thresholds(
        package,
        {"min_top_1_accuracy": 0.1, "min_class_recall": 0.2, "min_top_5_accuracy": 0.3}
        | {"max_accuracy_drop": 0.4},
    )
    bounds = {name: each["threshold"]["value_threshold"] for name, each in found.items()}
    assert bounds == {
        TOP_1: {"lower_bound": 0.1},
        "class_recall": {"lower_bound": 0.2},
        TOP_5: {"lower_bound": 0.3},
    }
    drops = {
        name: each["threshold"]["change_threshold"]["absolute"]
        for name, each in found.items()
        if "change_threshold" in each["threshold"]
    }
    assert drops == {TOP_1: -0.4, TOP_5: -0.4}
    slices = {name: each["slicing_specs"] for name, each in found.items()}
    assert slices == {TOP_1: [{}], "class_recall": [{"feature_keys": ["a_label"]}], TOP_5: [{}]}


def test_a_metric_has_a_flag(project: Path):
    text = run(project, "-m", "pipeline.local_runner", "--help")
    assert "--min_class_recall X" in text
    assert "recall of each class on the test split is at least this" in " ".join(text.split())


def test_floors():
    assert resolve_floors({}, {}, 100) == {TOP_1: 0.0, TOP_5: 0.0}
    preset = {TOP_1: 0.1, TOP_5: 0.2}
    assert resolve_floors(preset, {TOP_1: None, TOP_5: 0.9}, 100) == {TOP_1: 0.1, TOP_5: 0.9}
    # A top-1 hit is a top-5 hit.
    assert resolve_floors(preset, {TOP_1: 0.3}, 100) == {TOP_1: 0.3, TOP_5: 0.3}
    with pytest.raises(ValueError, match=r"min_top_5_accuracy 0.2 is below .* at least 0.3"):
        resolve_floors(preset, {TOP_1: 0.3, TOP_5: 0.2}, 100)
    with pytest.raises(ValueError, match=r"floors for \['top_3'\]"):
        resolve_floors({"top_3": 0.1}, {}, 100)


@pytest.mark.parametrize(
    ("classes", "top_1", "top_5"),
    [
        (100, 0.05, 0.20),
        (3, 0.3603, 0.3603),  # chance is a third, and all answers are among the best five
        (10, 0.1364, 0.5789),
        (10_000, 0.0405, 0.1583),
    ],
)
def test_floors_of_other_numbers_of_classes_are_as_far_above_chance(
    classes: int, top_1: float, top_5: float
):
    floors = resolve_floors({TOP_1: 0.05, TOP_5: 0.20}, {}, classes)
    assert floors == {TOP_1: pytest.approx(top_1, abs=1e-4), TOP_5: pytest.approx(top_5, abs=1e-4)}


def test_what_was_asked_for_is_not_carried_over():
    assert resolve_floors({TOP_1: 0.05}, {TOP_1: 0.5}, 3)[TOP_1] == 0.5
