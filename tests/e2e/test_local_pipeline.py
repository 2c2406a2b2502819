"""The pipeline as a user runs it: TFX's command line, on a small data set, in processes.

The tests of this file are one story and run in order: each run builds on the metadata, the cache
and the pushed models of those before it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf
from PIL import Image

from dataset import format as dataset_format
from dataset.card import CARD_FILE, from_json
from pipeline.run_lock import lock_holder
from tests.support import patience

# The processes are watched one by one, by what they do rather than by the clock.
pytestmark = pytest.mark.timeout(0)

REPOSITORY = Path(__file__).resolve().parents[2]
COMPONENTS = (
    "ExampleGen", "SchemaGen", "StatisticsGen", "ExampleValidator", "DataGate",
    "Transform", "Trainer", "Baseline", "ServingValidator", "Evaluator", "Pusher",
)  # fmt: skip


def environment() -> dict[str, str]:
    """The user's environment; importing JAX, as Keras does here, sets the log level in ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TF_CPP")}


class Project:
    """A user's place: a home, a work folder, data, and the `tfx` command."""

    def __init__(self, folder: Path, data: Path):
        self.data = folder / "my_data"
        shutil.copytree(data, self.data)
        self.work_dir = folder / "work"
        self.log = folder / "run.log"
        self.home = folder / "home"
        self.home.mkdir()

    @property
    def root(self) -> Path:
        return self.work_dir / "pipelines" / "vit"

    def tfx(self, *arguments: str, flags: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "tfx"), *arguments, "--engine", "local"]
        variables = {
            "HOME": str(self.home),
            "VIT_PIPELINE_ARGS": f"--data {self.data} --work_dir {self.work_dir} --preset tiny "
            f"--batch_size 32 {flags}",
        }
        return patience.run(
            command, cpu_seconds=600, cwd=REPOSITORY, env={**environment(), **variables}
        )

    def start(self, flags: str) -> subprocess.Popen[str]:
        """Starts a run in the background, as its own process that prints into `log`."""
        arguments = f"--data {self.data} --work_dir {self.work_dir} --preset tiny --batch_size 32"
        with open(self.log, "w") as log:
            return patience.start(
                [sys.executable, "-m", "pipeline.local_runner", *arguments.split(), *flags.split()],
                cwd=REPOSITORY,
                stdout=log,
            )

    def run(self, flags: str = "") -> subprocess.CompletedProcess[str]:
        return self.tfx("run", "create", "--pipeline_name", "vit", flags=flags)

    def versions(self, model: str = "synthetic_vit") -> list[Path]:
        folder = self.work_dir / "serving_models" / model
        return sorted(folder.iterdir(), key=lambda path: int(path.name)) if folder.is_dir() else []

    def run_ids(self) -> list[str]:
        listing = self.tfx("run", "list", "--pipeline_name", "vit").stdout
        return re.findall(r"\d{4}-\d\d-\d\dT[\d:.]+", listing)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, synthetic_folder: Path) -> Project:
    return Project(tmp_path_factory.mktemp("project"), synthetic_folder)


def _states(output: str) -> dict[str, str]:
    """Component -> what is printed behind it: a time, or `cached`."""
    lines = re.findall(r"^(?:\[ ?\d+/\d+\]|       ) (\w+) +(cached|[\d.]+ s)$", output, re.M)
    return dict(lines)


def _wait_for_epoch(project: Project, process: subprocess.Popen[str]) -> str:
    """Waits until the first epoch is done; returns the id of the run that is in progress."""
    done = re.compile(r"epoch 1/\d+ took")  # slow epochs have lines before their end
    patience.wait_until(
        lambda: bool(done.search(project.log.read_text())), process, cpu_seconds=600
    )
    holder = lock_holder(str(project.root))
    assert holder is not None and holder.process == process.pid
    return holder.run_id


def test_pipeline_create_list_and_compile(project: Project):
    path = ("--pipeline_path", "pipeline/local_runner.py")
    created = project.tfx("pipeline", "create", *path)
    assert created.returncode == 0, created.stderr
    assert 'Pipeline "vit" created successfully.' in created.stdout
    again = project.tfx("pipeline", "create", *path)
    assert again.returncode != 0 and "already exists" in again.stderr
    assert 'Pipeline "vit" updated successfully.' in project.tfx("pipeline", "update", *path).stdout
    assert "Pipeline compiled successfully." in project.tfx("pipeline", "compile", *path).stdout
    assert "\nvit\n" in project.tfx("pipeline", "list").stdout
    # None of these has run anything.
    assert not (project.root / "metadata.sqlite").exists()
    assert "No runs." in project.tfx("run", "list", "--pipeline_name", "vit").stdout


def test_the_first_run_pushes_a_model(project: Project):
    result = project.run("--epochs 2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(_states(result.stdout)) == list(COMPONENTS)
    assert "cached" not in result.stdout
    # Quiet: what is printed is ours, line by line, and no framework's.
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) < 50

    summary = result.stdout[result.stdout.index("== Summary") :]
    assert "preset tiny on synthetic data" in summary
    assert "these are no results on real ones" in summary
    assert re.search(
        r"epoch +2 +loss \d\.\d{3} +validation top-1 0\.\d{3} +top-5 0\.\d{3}", summary
    )
    assert f"trained with TensorFlow {tf.__version__} on " in summary
    assert re.search(r"test top-1 0\.\d{4} +top-5 0\.\d{4} +\(500 images\)", summary)
    assert re.search(
        r"BLESSED: reached every threshold; answers as trained when it is served \(an image in "
        r"\d+\.\d ms, p99 \d+\.\d ms\)",
        summary,
    )
    (version,) = project.versions()
    assert f"pushed to {version}" in summary
    assert "vit-predict --model" in summary


def test_the_pushed_model_carries_what_it_was_made_from(project: Project):
    (version,) = project.versions()
    training = json.loads((version / "assets.extra" / "training.json").read_text())
    assert training["dataset"] == "synthetic"
    assert training["preset"]["name"] == "tiny"
    assert training["trainable_parameters"] == 63_172
    assert training["train_examples"] == 1800
    assert [epoch["epoch"] for epoch in training["history"]] == [1, 2]
    assert all(0 <= epoch["val_top_5_accuracy"] <= 1 for epoch in training["history"])
    card = from_json((version / "assets.extra" / CARD_FILE).read_text(), "it")
    names = dataset_format.read_label_names(project.data)
    assert card.classes == names.fine
    assert card.superclasses is not None and card.superclasses.names == names.coarse
    # And what a model server wants: each signature at each batch size of serving/config.
    warmup = tf.data.TFRecordDataset(
        str(version / "assets.extra" / "tf_serving_warmup_requests")
    ).as_numpy_iterator()
    assert len(list(warmup)) == 3 * 6


def test_the_pushed_model_answers_with_class_names(project: Project, tmp_path: Path, run_module):
    images, _, _ = dataset_format.read_records(project.data / "test.bin")
    Image.fromarray(images[0]).save(tmp_path / "small.png")
    Image.fromarray(images[1]).resize((200, 120)).save(tmp_path / "large.jpg")
    model = project.versions()[0].parent
    result = run_module("serving.predict", "--model", model, "--json", tmp_path)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(answer["image"]).name for answer in answers] == ["large.jpg", "small.png"]
    names = dataset_format.read_label_names(project.data)
    _, fine, coarse = dataset_format.read_records(project.data / "train.bin")
    superclass = {names.fine[f]: names.coarse[c] for f, c in zip(fine, coarse, strict=True)}
    for answer in answers:
        classes = answer["classes"]
        assert [names.fine[item["id"]] for item in classes] == [item["name"] for item in classes]
        assert [superclass[item["name"]] for item in classes] == [
            item["superclass"] for item in classes
        ]
        probabilities = [item["probability"] for item in classes]
        assert probabilities == sorted(probabilities, reverse=True) and probabilities[0] <= 1


def test_run_list_and_status_show_it(project: Project):
    (run_id,) = project.run_ids()
    listing = project.tfx("run", "list", "--pipeline_name", "vit").stdout
    assert "COMPLETE" in listing
    status = project.tfx("run", "status", "--pipeline_name", "vit", "--run_id", run_id).stdout
    assert f"{run_id}: COMPLETE" in status
    assert re.findall(r"^\| (\w+) +\| COMPLETE", status, re.M) == list(COMPONENTS)
    unknown = project.tfx("run", "status", "--pipeline_name", "vit", "--run_id", "none")
    assert unknown.returncode != 0
    assert "there is no run 'none'; the runs are: " + run_id in unknown.stderr


def test_unchanged_everything_is_taken_from_the_cache(project: Project):
    before = project.versions()
    result = project.run("--epochs 2")
    assert result.returncode == 0, result.stderr
    assert _states(result.stdout) == dict.fromkeys(COMPONENTS, "cached")
    assert project.versions() == before


def test_a_model_below_the_threshold_is_not_pushed(project: Project):
    before = project.versions()
    result = project.run("--epochs 2 --min_top_5_accuracy 0.99")
    assert result.returncode == 0, result.stderr
    assert _states(result.stdout)["Trainer"] == "cached"
    assert re.search(
        r"NOT BLESSED, not pushed:\n +top_5_accuracy is 0\.\d+, the threshold 0\.9900",
        result.stdout,
    )
    assert project.versions() == before


def test_a_model_worse_than_the_baseline_is_not_pushed(project: Project):
    before = project.versions()
    # A learning rate that teaches nothing, against the model of the first run.
    result = project.run("--epochs 1 --learning_rate 1e-12 --max_accuracy_drop 0")
    assert result.returncode == 0, result.stderr
    assert re.search(r"top-1 0\.\d{4}   top-5 0\.\d{4}   \(baseline\)", result.stdout)
    assert re.search(
        r"top_5_accuracy is 0\.\d+ below the baseline's \(allowed: 0\.0000\)", result.stdout
    )
    assert project.versions() == before


def test_run_terminate_interrupts_a_training(project: Project):
    # Longer than it takes the command to start.
    with project.start("--epochs 100000") as process:
        run_id = _wait_for_epoch(project, process)
        terminated = project.tfx("run", "terminate", "--run_id", run_id)
        assert terminated.returncode == 0, terminated.stderr
        assert f"Run {run_id} interrupted." in terminated.stdout
        _, stderr = patience.wait(process, cpu_seconds=120)
        assert process.returncode == 130 and "goes on from" in stderr
    status = project.tfx("run", "status", "--pipeline_name", "vit", "--run_id", run_id).stdout
    assert f"{run_id}: INTERRUPTED" in status
    assert re.search(r"Trainer +\| INTERRUPTED", status)


def test_an_interrupted_training_continues(project: Project):
    (base,) = project.versions()
    flags = "--epochs 40 --seed 3 --max_accuracy_drop 1 --warm_start"
    with project.start(flags) as process:
        _wait_for_epoch(project, process)
        process.send_signal(signal.SIGINT)
        patience.wait(process, cpu_seconds=120)
        assert process.returncode == 130
    leftover = max((project.root / "Trainer" / "model_run").iterdir(), key=lambda x: int(x.name))
    result = project.run(f"{flags} --no_cache")
    assert result.returncode == 0, result.stderr
    assert "epoch 1/40" not in result.stdout and "epoch 40/40" in result.stdout
    assert "40 epochs" in result.stdout
    # And it was no training from scratch.
    assert _states(result.stdout).keys() - {*COMPONENTS} == {"BaseModel"}
    assert "starting from the model pushed last: 2 epochs of training" in result.stdout
    assert f"started from version {base.name}, after 2 epochs: validation top-1" in result.stdout
    assert not leftover.exists()


def test_changed_data_run_again_with_tuning_and_exports(project: Project):
    before = project.versions()
    records = project.data / "train.bin"
    content = bytearray(records.read_bytes())
    content[100] ^= 1  # one pixel
    records.write_bytes(content)
    result = project.run("--limit 300 --max_accuracy_drop 1 --tune 2 --export onnx")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    states = _states(result.stdout)
    assert states["ExampleGen"] != "cached"
    # Hyperparameters are searched for on what is then trained on.
    added = ["Tuner", "Converter"]
    assert [name for name in states if name not in added] == [*COMPONENTS]
    assert states.keys() - {*COMPONENTS} == {*added} and list(states)[6] == "Tuner"
    assert "tuning: before that, 2 trials of 1 epoch\n" in result.stdout
    assert "  trial 1/2: learning_rate 0.001  weight_decay 0.001" in result.stdout
    assert re.search(r"trial 2/2 took \d+ s: validation top-1 0\.\d{4}", result.stdout)
    assert re.search(r"tuned in 2 trials: validation top-1 0\.\d{3}", result.stdout)
    (version,) = project.versions("synthetic_subset_vit")
    training = json.loads((version / "assets.extra" / "training.json").read_text())
    found = ["learning_rate", "weight_decay", "transformer_layers", "augmentation"]
    assert list(training["tuned"]) == found
    settings = training["preset"]["training"]
    assert settings["learning_rate"] == training["tuned"]["learning_rate"]
    exports = version / "assets.extra" / "exports"
    made = sorted(path.name for path in exports.iterdir())
    assert made == ["labels.txt", "model.onnx", "report.json"]
    assert "(agreement with it on 300 test images" in result.stdout
    assert re.search(r"  model\.onnx +0\.\d MB +100\.0% +\d+\.\d ms", result.stdout)
    assert "preset tiny on a subset of synthetic data" in result.stdout
    assert "(300 images)" in result.stdout
    # Beside the model of all the data, not in its place.
    assert len(project.versions("synthetic_subset_vit")) == 1
    assert project.versions() == before


def test_bad_data_stop_before_transform_with_split_feature_and_value(project: Project):
    folder = project.data.with_name("bad_data")
    shutil.copytree(project.data, folder)
    records = folder / "train.bin"
    content = bytearray(records.read_bytes())
    content[1] = 173  # the fine label of the first record
    records.write_bytes(content)
    result = project.run(f"--data {folder}")
    assert result.returncode != 0
    assert "173" in result.stderr and "train.bin" in result.stderr
    assert "ExampleGen" not in result.stdout


def test_run_delete_forgets_the_run_and_removes_its_artifacts(project: Project):
    newest, *others = project.run_ids()
    examples = sorted((project.root / "ExampleGen" / "examples").iterdir())
    pushed = project.versions()
    deleted = project.tfx("run", "delete", "--run_id", newest)
    assert deleted.returncode == 0, deleted.stderr
    assert f"Run {newest} deleted" in deleted.stdout
    assert project.run_ids() == others
    # The examples of the deleted run are gone, those that other runs use are not, nor is a model
    # that is served.
    assert sorted((project.root / "ExampleGen" / "examples").iterdir()) == examples[:-1]
    assert project.versions() == pushed
    again = project.tfx("run", "delete", "--run_id", newest)
    assert again.returncode != 0 and f"there is no run '{newest}'" in again.stderr


def test_pipeline_delete(project: Project):
    deleted = project.tfx("pipeline", "delete", "--pipeline_name", "vit")
    assert deleted.returncode == 0 and "deleted successfully" in deleted.stdout
    gone = project.run()
    assert gone.returncode != 0 and 'Pipeline "vit" does not exist.' in gone.stderr
