"""The compiled pipeline as Kubeflow Pipelines runs it, data to pushed model, without a cluster.

`tests/kubeflow/cluster.py` reads the package, and each container's command runs in a process of its
own, as in the image. The tests of this file are one story and run in order, once in an installation
with ML Metadata, and once in one without.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from dataset.format import fingerprint
from tests.kubeflow.cluster import Cluster
from tests.kubeflow.conftest import REPOSITORY, run_compiler
from tests.kubeflow.launcher import LOGS, Execution, World

pytestmark = pytest.mark.timeout(1800)  # on a busy machine; two minutes on an idle one

ROOT = "minio://mlpipeline/v2/artifacts"
DATA = ("ExampleGen", "SchemaGen", "StatisticsGen", "ExampleValidator", "DataGate", "Transform")

TRAINING = ("BaseModel", "Trainer")


class Installation:
    """A cluster with a bucket, a volume with data on it, and the compiled pipeline."""

    def __init__(self, folder: Path, data: Path, ml_metadata: bool):
        self.volume = folder / "volume"
        shutil.copytree(data, self.volume / "data")
        self.fingerprint = fingerprint(self.volume / "data")
        self.package = folder / "pipeline.yaml"
        process = run_compiler(
            *("--dataset_name", "synthetic", "--preset", "tiny", "--batch_size", 32),
            *("--warm_start", "--retries", 1),
            *("--volume_path", self.volume, "--data", self.volume / "data"),
            *(
                "--serving_dir",
                self.volume / "models",
                "--checkpoints",
                self.volume / "checkpoints",
            ),
            *("--root", ROOT, "--output", self.package),
        )
        assert process.returncode == 0, process.stderr
        image = {"python": sys.executable, "/app": str(REPOSITORY)}
        # Less than a shell has: containers get what the package says, and no more.
        variables = {name: os.environ[name] for name in ("PATH", "HOME")}
        self.world = World(folder / "cluster", image, variables, ml_metadata)
        self.cluster = Cluster(self.world)
        self.cluster.make_bucket("mlpipeline")

    def run(self, **parameters: Any) -> dict[str, Execution]:
        parameters = {"data_fingerprint": self.fingerprint, **parameters}
        print(f"\nrun with {parameters}")
        return self.cluster.run(self.package, parameters, ROOT)

    def versions(self) -> list[Path]:
        folder = self.volume / "models" / "synthetic_vit"
        return sorted(folder.iterdir(), key=lambda path: int(path.name)) if folder.exists() else []

    def files(self, artifact: dict[str, Any]) -> set[str]:
        folder = self.world.stored(artifact["uri"])
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=[True, False], ids=["ml-metadata", "no-ml-metadata"])
def installation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, synthetic_folder: Path
) -> Installation:
    return Installation(tmp_path_factory.mktemp("kubeflow"), synthetic_folder, request.param)


@pytest.fixture(scope="module")
def first(installation: Installation) -> dict[str, Execution]:
    return installation.run()


@pytest.fixture(scope="module")
def second(installation: Installation, first: dict[str, Execution]) -> dict[str, Execution]:
    # A longer training than was compiled in, and no demand that it be better for it. Its node is
    # taken away in the middle.
    installation.world.preempted["Trainer"] = "epoch 1/2 took"
    executions = installation.run(epochs=2, max_accuracy_drop=1)
    installation.world.preempted.clear()
    return executions


def identity(artifact: dict[str, Any]) -> str:
    """Without ML Metadata, the name is the same for all of a kind."""
    return artifact.get("artifactId") or artifact["name"]


def explain(executions: dict[str, Execution]) -> str:
    return "\n".join(
        f"{name}: {execution.error}{execution.log[-5000:]}"
        for name, execution in executions.items()
        if execution.state == "FAILED"
    )


def report(version: Path) -> dict[str, Any]:
    return json.loads((version / "assets.extra" / "training.json").read_text())


def test_every_component_runs(installation: Installation, first: dict[str, Execution]):
    assert {execution.state for execution in first.values()} == {"COMPLETE"}, explain(first)
    assert set(first) == {*DATA, *TRAINING, "Baseline", "Evaluator", "ServingValidator", "Pusher"}
    (version,) = installation.versions()
    assert (version / "saved_model.pb").exists()
    assert report(version)["preset"]["name"] == "tiny"
    assert report(version)["dataset"] == "synthetic"
    assert report(version)["preset"]["training"]["batch_size"] == 32
    assert len(report(version)["history"]) == 1
    assert report(version)["base_model"] is None
    assert "no model was pushed yet to start from: training from scratch" in first["Trainer"].log


def test_properties_pass_from_component_to_component(
    installation: Installation, first: dict[str, Execution]
):
    def metadata(task: str, key: str) -> dict[str, Any]:
        return first[task].artifacts[key]["metadata"]

    examples = metadata("ExampleGen", "examples")
    assert json.loads(examples["split_names"]) == ["train", "validation", "test"]
    assert examples["content_fingerprint"] == installation.fingerprint
    assert examples["dataset_name"] == "synthetic"
    model, blessing = first["Trainer"].artifacts["model"], metadata("Evaluator", "blessing")
    assert blessing["blessed"] == 1
    assert blessing["current_model"] == model["uri"]
    assert blessing["current_model_id"] == identity(model)
    assert "baseline_model" not in blessing
    assert metadata("ServingValidator", "blessing")["blessed"] == 1
    (version,) = installation.versions()
    assert (version / "assets.extra" / "tf_serving_warmup_requests").exists()
    pushed = metadata("Pusher", "pushed_model")
    assert pushed["pushed"] == 1
    assert pushed["pushed_version"] == version.name
    assert pushed["pushed_destination"] == str(version)


def test_another_user_can_read_what_is_pushed(
    installation: Installation, first: dict[str, Execution]
):
    # Containers run with a umask of 077 here.
    (version,) = installation.versions()
    for path in (version.parents[1], version.parent, version, *version.rglob("*")):
        needed = 0o005 if path.is_dir() else 0o004
        assert path.stat().st_mode & needed == needed, path


def test_artifacts_are_in_the_bucket(installation: Installation, first: dict[str, Execution]):
    for execution in first.values():
        for artifact in execution.artifacts.values():
            assert artifact["uri"].startswith(f"{ROOT}/vit/")
            assert str(installation.world.stored("")) not in json.dumps(artifact["metadata"])
            assert "/pods/" not in json.dumps(artifact["metadata"])
    examples = installation.files(first["ExampleGen"].artifacts["examples"])
    assert {"dataset.json", "Split-train/data_tfrecord-00000-of-00001.gz"} <= examples
    model = installation.files(first["Trainer"].artifacts["model"])
    assert "Format-Serving/saved_model.pb" in model
    assert "BLESSED" in installation.files(first["Evaluator"].artifacts["blessing"])
    assert installation.files(first["Baseline"].artifacts["baseline"]) == set()


def test_logs_are_streamed_and_kept(installation: Installation, first: dict[str, Execution]):
    log = installation.world.stored(first["Trainer"].artifacts[LOGS]["uri"])
    assert "epoch 1/1 took" in log.read_text()
    for execution in first.values():
        lines = execution.log.splitlines()  # TensorFlow's may hold "CUDA error: ", and mean none
        assert not [line for line in lines if line.startswith("error: ")]


def test_next_run_trains_anew_and_compares_with_the_pushed_model(
    installation: Installation, second: dict[str, Execution]
):
    assert all(execution.state != "FAILED" for execution in second.values()), explain(second)
    cached = {name for name, execution in second.items() if execution.state == "CACHED"}
    assert cached == set(DATA)
    earlier, later = installation.versions()
    assert len(report(earlier)["history"]) == 1
    assert len(report(later)["history"]) == 2
    # It has started where the first one ended.
    assert second["BaseModel"].artifacts["baseline"]["metadata"]["version"] == earlier.name
    assert report(later)["base_model"] == {
        "epochs": 1,
        "val_top_1_accuracy": report(earlier)["history"][-1]["val_top_1_accuracy"],
    }
    baseline = second["Baseline"].artifacts["baseline"]
    assert baseline["metadata"]["version"] == earlier.name
    assert "Format-Serving/saved_model.pb" in installation.files(baseline)
    blessing = second["Evaluator"].artifacts["blessing"]["metadata"]
    assert blessing["baseline_model"] == baseline["uri"]
    assert blessing["baseline_model_id"] == identity(baseline)
    assert blessing["current_model_id"] == identity(second["Trainer"].artifacts["model"])
    assert second["Pusher"].artifacts["pushed_model"]["metadata"]["pushed_version"] == later.name


def test_a_training_whose_node_goes_away_is_continued(
    installation: Installation, second: dict[str, Execution]
):
    trainer = second["Trainer"]
    assert trainer.tries == 2
    assert "continuing after epoch 1" in trainer.log
    assert "epoch 2/2 took" in trainer.log and "epoch 1/2 took" not in trainer.log
    assert [epoch["epoch"] for epoch in report(installation.versions()[-1])["history"]] == [1, 2]
    assert {execution.tries for name, execution in second.items() if name != "Trainer"} <= {0, 1}


def failed(installation: Installation, execution: Execution) -> str:
    """Checks that a container has failed and left nothing; returns the last line of its log."""
    assert execution.state == "FAILED"
    assert execution.exit_code == 1
    assert set(execution.artifacts) == {LOGS}
    folder = installation.world.stored(execution.artifacts[LOGS]["uri"]).parent
    assert all(path.name.startswith(LOGS) for path in folder.iterdir())
    return execution.log.splitlines()[-1]


def test_other_data_are_not_taken_from_the_cache_and_must_be_readable(
    installation: Installation, second: dict[str, Execution]
):
    (installation.volume / "data" / "test.bin").rename(installation.volume / "gone")
    executions = installation.run(data_fingerprint="0" * 64)
    (installation.volume / "gone").rename(installation.volume / "data" / "test.bin")
    assert {name: execution.state for name, execution in executions.items()} == {
        "BaseModel": "COMPLETE",  # it needs no data
        "ExampleGen": "FAILED",
    }
    assert failed(installation, executions["ExampleGen"]) == (
        f"error: components.example_gen.executor.Executor failed: {installation.volume}/data/"
        "test.bin does not exist; the data folder must hold train.bin, test.bin, "
        "fine_label_names.txt, coarse_label_names.txt."
    )


def test_an_executor_that_raises(installation: Installation, second: dict[str, Execution]):
    executions = installation.run(preset="tinny")
    assert set(executions) == {*DATA, *TRAINING}
    line = failed(installation, executions["Trainer"])
    assert line.startswith("error: tfx.components.trainer.executor.GenericExecutor failed: ")
    assert "tinny" in line
    assert "Traceback (most recent call last):" in executions["Trainer"].log
    assert executions["Trainer"].tries == 2  # as it was compiled to be
    assert len(installation.versions()) == 2


def test_a_folder_that_pusher_could_not_write_is_seen_first(
    installation: Installation, second: dict[str, Execution]
):
    file = installation.volume / "file"
    file.touch()
    executions = installation.run(seed=6, serving_dir=str(file / "models"))
    assert set(executions) == {*DATA, "BaseModel"}
    line = failed(installation, executions["BaseModel"])
    assert f"serving_dir is {file}/models, and {file} cannot be written to: " in line


def test_an_artifact_of_the_cache_whose_files_are_gone(
    installation: Installation, second: dict[str, Execution]
):
    examples = second["ExampleGen"].artifacts["examples"]
    files = len(installation.files(examples))
    shutil.rmtree(installation.world.stored(examples["uri"]))
    executions = installation.run(seed=5)
    assert {executions[name].state for name in DATA} == {"CACHED"}
    line = failed(installation, executions["Trainer"])
    uri = examples["uri"]
    assert f"input 'examples' was made with {files} files at {uri}, and no files came" in line
    assert "Compile with --no_cache" in line
    assert len(installation.versions()) == 2
