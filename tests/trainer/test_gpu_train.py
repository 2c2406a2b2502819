"""Training with JAX on data that lie on the device, and its model in TensorFlow."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_transform as tft
import tensorflow_transform.beam as tft_beam

from benchmarks import export_trained
from components.dataset import format as binary
from components.dataset import synthetic
from trainer import export, preprocessing, trained
from trainer.input import FEATURES
from trainer.preset import Preset
from trainer.presets import get_preset

ROOT = Path(__file__).resolve().parents[2]
TRAIN, TEST = 700, 50

# Runs in its own process, because a process has one backend. Prints one JSON line.
SCRIPT = """
import json, shutil, sys
from pathlib import Path
from benchmarks import gpu_train
from trainer.on_jax.training import Split
from components.dataset.format import read_records
from trainer.trained import preset_from

fields, out = sys.argv[1:]
preset, out = preset_from(json.loads(fields)), Path(out)
data = tuple(Split(*read_records(out / "data" / f"{name}.bin")[:2]) for name in ("train", "test"))

def copy(line):
    # What an interruption at that moment would leave.
    if line.startswith("epoch 3/"):
        shutil.copytree(out / "whole", out / "resumed")

gpu_train.train(preset, data, out / "whole", seed=3, checkpoint_every=2, report=copy)
left = sorted(path.name for path in (out / "resumed").iterdir())
errors, lines = [], []
for folder, seed in (("resumed", 4), ("resumed", 3), ("whole", 3)):
    try:
        gpu_train.train(
            preset, data, out / folder, seed=seed, checkpoint_every=2, report=lines.append
        )
    except ValueError as error:
        errors.append(str(error))
loaded = [name for name in ("tensorflow", "tensorflow_transform", "tfx") if name in sys.modules]
print(json.dumps({"left": left, "errors": errors, "lines": lines, "loaded": loaded}))
"""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What the process has left and printed."""

    folder: Path
    preset: Preset
    test_images: np.ndarray
    test_labels: np.ndarray
    printed: dict[str, Any]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    work = tmp_path_factory.mktemp("gpu_train")
    # Ten classes, each a colour with noise: learnable in a few epochs.
    draw = np.random.default_rng(0)
    colours = draw.integers(40, 216, size=(10, 1, 1, 3))
    labels = draw.integers(10, size=TRAIN + TEST)
    images = colours[labels] + draw.integers(-30, 31, size=(TRAIN + TEST, 32, 32, 3))
    images = images.astype(np.uint8)
    data = synthetic.generate(work / "data", train=1, test=1)  # for the names
    for name, part in ((binary.TRAIN_FILE, slice(TRAIN)), (binary.TEST_FILE, slice(TRAIN, None))):
        binary.write_records(data / name, images[part], labels[part], labels[part] // 5)
    preset = dataclasses.replace(
        get_preset("tiny"),
        transformer_layers=1,
        epochs=4,
        learning_rate=5e-3,
        random_rotation=0.0,
        random_zoom=0.0,
        cutmix=0.5,
        label_smoothing=0.1,
        ema_momentum=0.5,
    )
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            json.dumps(dataclasses.asdict(preset)),
            str(work),
        ],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert process.returncode == 0, process.stderr
    printed = json.loads(process.stdout.splitlines()[-1])
    return Trained(work, preset, images[TRAIN:], labels[TRAIN:], printed)


def _logits(folder: Path, images: np.ndarray) -> np.ndarray:
    network, report = trained.load(folder)
    mean, variance = (np.array(report["normalization"][name]) for name in ("mean", "variance"))
    normalized = (images - mean) / np.sqrt(variance)
    return network.predict(normalized.astype(np.float32), verbose=0)


def test_learns_without_tensorflow(result: Trained) -> None:
    assert result.printed["loaded"] == []
    _, report = trained.load(result.folder / "whole")
    losses = [epoch["loss"] for epoch in report["history"]]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]
    assert report["history"][-1]["test_top_1_accuracy"] > 0.5
    assert report["train_examples"] == TRAIN


def test_tensorflow_gives_the_same_answers(result: Trained) -> None:
    logits = _logits(result.folder / "whole", result.test_images)
    order = np.argsort(-logits, axis=1)
    hits = order[:, :5] == result.test_labels[:, None]
    _, report = trained.load(result.folder / "whole")
    last = report["history"][-1]
    np.testing.assert_allclose(hits[:, 0].mean(), last["test_top_1_accuracy"], atol=0.021)
    np.testing.assert_allclose(hits.any(axis=1).mean(), last["test_top_5_accuracy"], atol=0.021)
    assert trained.preset_from(report["preset"]) == result.preset


def test_goes_on_from_a_checkpoint_to_the_same_model(result: Trained) -> None:
    assert result.printed["left"] == ["epoch-000002.json", "epoch-000002.weights.h5"]
    assert [line[:9] for line in result.printed["lines"]] == ["epoch 3/4", "epoch 4/4"]
    other_seed, finished = result.printed["errors"]
    assert "a checkpoint of another training" in other_seed
    assert "has a finished training" in finished
    files = sorted(path.name for path in (result.folder / "resumed").iterdir())
    assert files == ["model.weights.h5", "training.json"]
    whole, resumed = (
        _logits(result.folder / name, result.test_images) for name in ("whole", "resumed")
    )
    np.testing.assert_allclose(resumed, whole, atol=1e-3)


def test_what_is_not_a_trained_model_is_refused(result: Trained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no training\.json"):
        trained.load(tmp_path)
    shutil.copytree(result.folder / "whole", tmp_path / "other")
    report = json.loads((tmp_path / "other" / "training.json").read_text())
    report["preset"]["transformer_layers"] = 2
    (tmp_path / "other" / "training.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="does not fit the preset"):
        trained.load(tmp_path / "other")
    with pytest.raises(ValueError, match="of another version"):
        trained.preset_from({**report["preset"], "depth": 3})


@pytest.fixture(scope="module")
def transform_graph(result: Trained) -> str:
    """Of the data that the model was trained on."""
    images, labels, _ = binary.read_records(result.folder / "data" / binary.TRAIN_FILE)
    rows = [{"image": x.tobytes(), "fine_label": int(n)} for x, n in zip(images, labels)]
    metadata = tft.DatasetMetadata.from_feature_spec(FEATURES)
    with beam.Pipeline() as pipeline, tft_beam.Context(temp_dir=str(result.folder / "tmp")):
        graph = (pipeline | beam.Create(rows), metadata) | tft_beam.AnalyzeDataset(
            preprocessing.preprocessing_fn
        )
        _ = graph | tft_beam.WriteTransformFn(str(result.folder / "graph"))
    return str(result.folder / "graph")


def test_export_serves_the_trained_model(
    result: Trained, transform_graph: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = result.folder / "model"
    arguments = ["--trained", str(result.folder / "whole"), "--data", str(result.folder / "data")]
    arguments += ["--out", str(out), "--transform_graph", transform_graph]
    assert export_trained.main(arguments) == 0
    printed = capsys.readouterr().out
    served = tf.saved_model.load(str(out)).signatures["serving_default"]
    answers = served(tf.constant(result.test_images))
    logits = _logits(result.folder / "whole", result.test_images)
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(answers["probabilities"].numpy(), expected, atol=1e-3)
    top_1 = (answers["top_5_ids"].numpy()[:, 0] == result.test_labels).mean()
    assert f"top-1 {top_1:.4f}" in printed
    card = json.loads((out / "assets.extra" / "dataset.json").read_text())
    assert card["superclasses"][:11] == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, None]
    assert export_trained.main(arguments) == 1
    assert "exists already" in capsys.readouterr().err


def test_export_refuses_a_transform_graph_of_other_data(
    result: Trained, transform_graph: str
) -> None:
    _, report = trained.load(result.folder / "whole")
    transform_output = tft.TFTransformOutput(transform_graph)
    export_trained.check_normalization(report, transform_output)
    report["normalization"]["mean"][1] += 2.0
    with pytest.raises(export.ExportError, match="give the graph of a run on the same data"):
        export_trained.check_normalization(report, transform_output)
