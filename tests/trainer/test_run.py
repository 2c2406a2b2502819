"""run_fn from examples on disk to a SavedModel, interrupted, resumed and on several devices."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_transform as tft
from tfx.components.trainer.fn_args_utils import FnArgs

from dataset.card import CARD_FILE, from_json
from tests.trainer.training import CARD, NAMES, TRAIN, VALIDATION, Inputs, arguments, report, train
from trainer import export, known_answers, presets, run, weights
from trainer.callbacks import NonFiniteLossError
from trainer.export import WEIGHTS_FILE
from trainer.preset import replace

ROOT = Path(__file__).resolve().parents[2]
METRICS = {"loss", "top_1_accuracy", "top_5_accuracy"}


def logged_steps(folder: Path) -> dict[str, list[int]]:
    """Tag -> the steps for which TensorBoard's logs have a value."""
    steps: dict[str, list[int]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                steps.setdefault(value.tag, []).append(event.step)
    return steps


def test_training_report(finished: Path, inputs: Inputs):
    result = report(finished)
    history = result.pop("history")
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    names = {"epoch", "seconds", *METRICS, *(f"val_{name}" for name in METRICS)}
    assert all(set(epoch) == names for epoch in history)
    preset = result.pop("preset")
    assert preset["name"] == "tiny" and preset["architecture"]["patch_size"] == 8
    asked = {"epochs": 2, "batch_size": 64, "learning_rate": 2e-3}
    assert asked.items() <= preset["training"].items()
    normalization = result.pop("normalization")
    mean, variance = export.channel_statistics(
        tft.TFTransformOutput(str(inputs.folder / "transform"))
    )
    np.testing.assert_allclose(normalization["mean"], mean)
    np.testing.assert_allclose(normalization["variance"], variance)
    assert result.pop("versions")["tensorflow"] == tf.__version__
    assert result == {
        "dataset": "synthetic",
        "limit": None,
        "subset": False,
        "train_examples": TRAIN,
        "tuned": None,
        "base_model": None,
        "seed": 7,
        "engine": "tensorflow",
        "precision": "float32",
        "device": "cpu",
        "devices": 1,
        "trainable_parameters": 63_172,
    }


def test_served_model_is_the_trained_one(finished: Path, inputs: Inputs):
    """Its answers give the last epoch's validation metrics."""
    served = tf.saved_model.load(str(finished / "model" / "Format-Serving"))
    outputs = served.signatures["serving_default"](tf.constant(inputs.validation_images))
    probabilities, labels = outputs["probabilities"].numpy(), inputs.validation_labels
    last = report(finished)["history"][-1]
    loss = -np.log(probabilities[np.arange(VALIDATION), labels]).mean()
    np.testing.assert_allclose(loss, last["val_loss"], rtol=1e-4)
    hits = outputs["top_5_ids"].numpy() == labels[:, None]
    np.testing.assert_allclose(hits[:, 0].mean(), last["val_top_1_accuracy"], atol=1e-6)
    np.testing.assert_allclose(hits.any(axis=1).mean(), last["val_top_5_accuracy"], atol=1e-6)


def test_known_answers_are_those_of_the_served_model(finished: Path, inputs: Inputs):
    model = finished / "model" / "Format-Serving"
    known = json.loads((model / "assets.extra" / known_answers.KNOWN_ANSWERS_FILE).read_text())
    images = inputs.validation_images[:32]
    assert [base64.b64decode(image) for image in known["images"]] == [x.tobytes() for x in images]
    outputs = tf.saved_model.load(str(model)).signatures["serving_default"](tf.constant(images))
    np.testing.assert_allclose(known["probabilities"], outputs["probabilities"], atol=1e-6)


def test_class_names_are_those_of_the_data(finished: Path, inputs: Inputs):
    model = finished / "model" / "Format-Serving"
    assert from_json((model / "assets.extra" / CARD_FILE).read_text(), "it") == CARD
    outputs = tf.saved_model.load(str(model)).signatures["serving_default"](
        tf.constant(inputs.validation_images)
    )
    for names, ids in zip(outputs["top_5_names"].numpy(), outputs["top_5_ids"].numpy()):
        assert [name.decode() for name in names] == [NAMES[index] for index in ids]


@pytest.mark.parametrize("part", ["train", "validation"])
def test_tensorboard_logs(finished: Path, part: str):
    steps = logged_steps(finished / "model_run" / part)
    assert {f"epoch_{name}": [0, 1] for name in METRICS}.items() <= steps.items()


def test_nothing_but_the_results_is_left(finished: Path):
    assert os.listdir(finished / "checkpoints") == []
    assert os.listdir(finished / "model") == ["Format-Serving"]


def kept_history(folder: Path) -> list[dict[str, float]]:
    """That of the newest checkpoint."""
    with np.load(max(folder.glob("epoch-*.npz"))) as arrays:
        return json.loads(str(arrays["history"]))


def test_a_failed_export_does_not_cost_the_training(finished: Path, inputs: Inputs, tmp_path: Path):
    (tmp_path / "model").write_text("in the way of the folder")
    with pytest.raises(export.ExportError):
        train(inputs, tmp_path)
    (key,) = os.listdir(tmp_path / "checkpoints")
    kept = kept_history(tmp_path / "checkpoints" / key)
    # The same seed, the same numbers; to the tolerance of sums in another order.
    for ours, theirs in zip(kept, report(finished)["history"], strict=True):
        for name in ("loss", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4)

    (tmp_path / "model").unlink()
    # Other hyperparameters do not take up the checkpoint...
    other = train(inputs, tmp_path / "other", seed=8, checkpoint_dir=str(tmp_path / "checkpoints"))
    assert [epoch["epoch"] for epoch in other["history"]] == [1, 2]
    assert abs(other["history"][0]["loss"] - kept[0]["loss"]) > 1e-3
    assert os.listdir(tmp_path / "checkpoints") == [key]
    # ...and the same ones find nothing left to train.
    shutil.rmtree(tmp_path / "model_run")  # in a pipeline it is another run's
    result = train(inputs, tmp_path)
    assert result["history"] == kept
    assert logged_steps(tmp_path / "model_run" / "validation")["epoch_loss"] == [0, 1]
    assert os.listdir(tmp_path / "checkpoints") == []
    served = tf.saved_model.load(str(tmp_path / "model" / "Format-Serving"))
    outputs = served.signatures["serving_default"](tf.constant(inputs.validation_images))
    hits = outputs["top_5_ids"].numpy() == inputs.validation_labels[:, None]
    np.testing.assert_allclose(hits.any(axis=1).mean(), kept[-1]["val_top_5_accuracy"], atol=1e-6)


# run_fn in a process of its own, as TFX's Trainer calls it.
PROGRAM = """
import json, sys, types
from trainer import run
run.run_fn(types.SimpleNamespace(**json.loads(sys.argv[1])))
"""


def start(program: str, fields: dict[str, Any]) -> subprocess.Popen:
    command = [sys.executable, "-c", program, json.dumps(fields)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def checkpointed_epochs(checkpoints: Path) -> int:
    names = [path.name for path in checkpoints.glob("*/epoch-*.npz")]
    return max((int(name[6:12]) for name in names), default=0)


def test_a_killed_training_goes_on(inputs: Inputs, tmp_path: Path):
    epochs = 12
    process = start(PROGRAM, arguments(inputs, tmp_path, epochs=epochs))
    deadline = time.monotonic() + 240
    while checkpointed_epochs(tmp_path / "checkpoints") < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()  # SIGKILL: no chance to tidy up
    process.communicate()
    begun = checkpointed_epochs(tmp_path / "checkpoints")
    assert 2 <= begun < epochs
    assert not (tmp_path / "model").exists()
    (folder,) = (tmp_path / "checkpoints").iterdir()
    before = kept_history(folder)

    history = train(inputs, tmp_path, epochs=epochs)["history"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, epochs + 1))
    # Not trained again: these are the very measurements, times included.
    assert history[:begun] == before[:begun]
    assert history[-1]["loss"] < history[0]["loss"]
    assert os.listdir(tmp_path / "checkpoints") == []


# In place of SIGTERM at that moment, which nothing catches: the second epoch is never begun.
INTERRUPTED = f"""
import os
from trainer import checkpoint
save = checkpoint.Checkpoint.on_epoch_end
def save_and_end(self, epoch, logs=None):
    save(self, epoch, logs)
    os.kill(os.getpid(), 15)
checkpoint.Checkpoint.on_epoch_end = save_and_end
{PROGRAM}"""


@pytest.mark.parametrize("preset", ["tiny", "compact"])
def test_an_interrupted_training_becomes_the_uninterrupted_one(
    preset: str, inputs: Inputs, tmp_path: Path
):
    # With all that draws at random, so that nothing may be drawn otherwise.
    settings = {"augmentation.mixup": 0.2, "augmentation.random_erasing": 0.3}
    options = {"preset": preset, "set": settings, "epochs": 2}
    whole = train(inputs, tmp_path / "whole", **options)
    process = start(INTERRUPTED, arguments(inputs, tmp_path / "cut", **options))
    output, _ = process.communicate(timeout=400)
    assert process.returncode == -signal.SIGTERM, output
    assert checkpointed_epochs(tmp_path / "cut" / "checkpoints") == 1
    resumed = train(inputs, tmp_path / "cut", **options)
    for ours, theirs in zip(resumed["history"], whole["history"], strict=True):
        assert ours["loss"] == theirs["loss"] and ours["val_loss"] == theirs["val_loss"]
    first, second = (
        weights.unpack((path / "model/Format-Serving/assets.extra" / WEIGHTS_FILE).read_bytes())
        for path in (tmp_path / "whole", tmp_path / "cut")
    )
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_loss_that_is_no_number_ends_the_training(epochs: int, inputs: Inputs, tmp_path: Path):
    with pytest.raises(NonFiniteLossError, match=r"of epoch 1: train with a lower --learning_rate"):
        train(inputs, tmp_path, epochs=epochs, learning_rate=1e37)
    assert not (tmp_path / "model").exists()


MIRRORED = f"""
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
from trainer import run
run._strategy = lambda: strategy  # which takes GPUs alone
{PROGRAM}"""


def test_trains_on_several_devices(inputs: Inputs, finished: Path, tmp_path: Path):
    """Simulated by two halves of the CPU, with which GPUs share all of the code but the kernels."""
    (tmp_path / "model").write_text("in the way of the folder")
    process = start(MIRRORED, arguments(inputs, tmp_path))
    output, _ = process.communicate(timeout=240)
    assert "ExportError" in output, output
    (tmp_path / "model").unlink()
    # It continues there, too.
    process = start(MIRRORED, arguments(inputs, tmp_path))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "continuing after epoch 2" in output, output
    result, on_one = report(tmp_path), report(finished)
    assert result["trainable_parameters"] == on_one["trainable_parameters"]
    history = result["history"]
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    # The same batches, weights and learning rates; dropout draws differ.
    for ours, theirs in zip(history, on_one["history"]):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=0.1)
    served = tf.saved_model.load(str(tmp_path / "model" / "Format-Serving"))
    outputs = served.signatures["serving_default"](tf.constant(inputs.validation_images))
    picked = outputs["probabilities"].numpy()[np.arange(VALIDATION), inputs.validation_labels]
    np.testing.assert_allclose(-np.log(picked).mean(), history[-1]["val_loss"], rtol=1e-4)


def test_compact_trains_and_serves(inputs: Inputs, tmp_path: Path):
    # Its own optimizer settings, loss and layers, batch statistics among them.
    result = train(inputs, tmp_path, preset="compact", epochs=1)
    assert result["trainable_parameters"] == 584_453
    (epoch,) = result["history"]
    assert 0 < epoch["loss"] < 10
    served = tf.saved_model.load(str(tmp_path / "model" / "Format-Serving"))
    outputs = served.signatures["serving_default"](tf.constant(inputs.validation_images))
    correct = outputs["top_5_ids"].numpy()[:, 0] == inputs.validation_labels
    np.testing.assert_allclose(correct.mean(), epoch["val_top_1_accuracy"], atol=1e-3)


def test_trains_by_the_clock_and_serves_the_moving_average(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    averaged = replace(presets.get_preset("tiny"), ema_momentum=0.9)
    monkeypatch.setitem(presets.PRESETS, "tiny", averaged)
    result = train(inputs, tmp_path, train_minutes=0.05, epochs=1)
    history = result["history"]
    assert len(history) > 1  # `epochs` is not what ends it
    assert 3.0 <= history[-1]["training_seconds"] < 6.0
    served = tf.saved_model.load(str(tmp_path / "model" / "Format-Serving"))
    outputs = served.signatures["serving_default"](tf.constant(inputs.validation_images))
    picked = outputs["probabilities"].numpy()[np.arange(VALIDATION), inputs.validation_labels]
    # What was validated is what is served: the average, not the last weights.
    np.testing.assert_allclose(-np.log(picked).mean(), history[-1]["val_loss"], rtol=1e-4)


@pytest.mark.skipif(len(tf.config.list_physical_devices("GPU")) > 1, reason="there are GPUs here")
def test_strategy_without_several_gpus():
    assert run._strategy() is tf.distribute.get_strategy()
    assert run._strategy().num_replicas_in_sync == 1


def test_refuses_a_batch_size_of_0_and_an_empty_split(inputs: Inputs, tmp_path: Path):
    with pytest.raises(ValueError, match="batch_size"):
        train(inputs, tmp_path, batch_size=0)
    fields = arguments(inputs, tmp_path)
    fields["eval_files"] = [str(inputs.folder / "examples" / "Split-none" / "*")]
    with pytest.raises(ValueError, match=r"no examples in .*Split-none"):
        run.run_fn(FnArgs(**fields))
    assert os.listdir(tmp_path) == []
