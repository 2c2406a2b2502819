"""--engine jax: the same training in a process of its own, and its model in TensorFlow."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import pytest
import tensorflow as tf
from tfx.components.trainer.fn_args_utils import FnArgs

from tests.trainer.training import TRAIN, Inputs, arguments, report, train
from trainer import export, jax_engine, known_answers, presets, run, tuning
from trainer.on_jax import process
from trainer.on_jax.job import Folder, Job, Result
from trainer.preset import Preset, replace

ROOT = Path(__file__).resolve().parents[2]
TINY = presets.get_preset("tiny")
# Nothing is drawn at random, and a step sees all images: losses are the same whoever computes them.
FIXED = {
    "dropout_rate": 0.0,
    "head_dropout_rate": 0.0,
    "random_flip": False,
    "random_rotation": 0.0,
    "random_zoom": 0.0,
    "random_shift": 0,
    "batch_size": TRAIN,
    "mixed_precision": False,
    "learning_rate_schedule": "constant",
    "warmup": 0.0,
}
TINY_FIXED = replace(TINY, **FIXED)
# Muon, averaged weights, batch statistics.
SMALL_FIXED = replace(
    presets.get_preset("compact"),
    **FIXED,
    projection_dim=16,
    num_heads=2,
    key_dim=8,
    transformer_layers=1,
    transformer_units=(32, 16),
    tokenizer_filters=(8, 16, 16),
    tokenizer_residual_pairs=(),
    ema_momentum=0.5,
)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One folder of compiled programs for all of these trainings."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("compiled")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def work(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of `tiny` for two epochs."""
    folder = tmp_path_factory.mktemp("jax")
    train(inputs, folder, engine="jax")
    return folder


def served(work: Path, inputs: Inputs) -> np.ndarray:
    """Probabilities of the exported model on the validation images."""
    model = tf.saved_model.load(str(work / "model" / "Format-Serving"))
    outputs = model.signatures["serving_default"](tf.constant(inputs.validation_images))
    return outputs["probabilities"].numpy()


def test_the_report_says_what_has_trained(work: Path):
    result = report(work)
    assert (result["engine"], result["device"], result["devices"]) == ("jax", "cpu", 1)
    assert result["precision"] == "float32"
    assert set(result["versions"]) == {"jax", "jaxlib", "tensorflow", "keras"}
    assert result["versions"]["jax"] == jax.__version__
    assert result["trainable_parameters"] == 63_172
    assert [set(epoch) for epoch in result["history"]] == 2 * [
        {"epoch", "seconds", "loss", "val_loss", "val_top_1_accuracy", "val_top_5_accuracy"}
    ]
    # A good deal of what it starts with, ln 100 = 4.6, and more with random weights.
    assert result["history"][1]["loss"] < result["history"][0]["loss"]


def test_the_exported_model_is_what_jax_has_validated(work: Path, inputs: Inputs):
    probabilities, labels = served(work, inputs), inputs.validation_labels
    last = report(work)["history"][-1]
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    np.testing.assert_allclose(loss, last["val_loss"], rtol=1e-4)
    ranks = (-probabilities).argsort(axis=1) == labels[:, None]
    np.testing.assert_allclose(ranks[:, 0].mean(), last["val_top_1_accuracy"], atol=1e-6)
    np.testing.assert_allclose(ranks[:, :5].any(1).mean(), last["val_top_5_accuracy"], atol=1e-6)


def test_known_answers_are_those_of_jax(work: Path, inputs: Inputs):
    assets = work / "model" / "Format-Serving" / "assets.extra"
    known = json.loads((assets / known_answers.KNOWN_ANSWERS_FILE).read_text())
    images = inputs.validation_images[:32]
    assert [base64.b64decode(image) for image in known["images"]] == [x.tobytes() for x in images]
    np.testing.assert_allclose(known["probabilities"], served(work, inputs)[:32], atol=1e-5)


def test_nothing_but_the_results_and_compiled_programs_is_left(work: Path, compiled: Path):
    assert os.listdir(work / "checkpoints") == []
    assert list(compiled.glob("jit_steps_of_an_epoch*"))
    assert (work / "model_run" / "validation").is_dir()


@pytest.fixture(scope="module")
def read(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> run.Inputs:
    """What run_fn reads."""
    fields = arguments(inputs, tmp_path_factory.mktemp("read"), engine="jax")
    return run.read_inputs(FnArgs(**fields), TINY)[1]


def test_other_answers_in_tensorflow_are_refused(read: run.Inputs):
    network = run.build_network(TINY, read)
    answers = known_answers.compute(network, read.validation_split.images, read.validation)
    off = np.array(answers["probabilities"])
    off[31, 99] += 3e-4
    with pytest.raises(export.ExportError, match=r"differ by up to 0\.0003, more than 0\.0001"):
        jax_engine.checked_answers(network, read, result_with(off.tolist()))
    same = result_with(answers["probabilities"])
    assert jax_engine.checked_answers(network, read, same) == answers


def result_with(probabilities: list[list[float]]) -> Result:
    return Result([], "float32", "cpu", 1, {}, probabilities)


@pytest.mark.parametrize("preset", [TINY_FIXED, SMALL_FIXED], ids=lambda preset: preset.name)
def test_either_goes_on_from_the_other(preset: Preset, read: run.Inputs, tmp_path: Path):
    def epochs(number: int) -> Preset:
        return replace(preset, epochs=number)

    whole = jax_engine.fit(epochs(4), read).result.history
    folder = str(tmp_path / "checkpoints")
    jax_engine.fit(epochs(2), read, folder)
    with_tensorflow = read._replace(
        engine="tensorflow",
        train=functools.partial(read.train, batch_size=preset.training.batch_size),
    )
    network = run.build_network(epochs(3), with_tensorflow)
    run._fit(network, with_tensorflow, epochs(3), str(tmp_path / "logs"), folder)
    history = jax_engine.fit(epochs(4), read, folder).result.history
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3, 4]
    assert "top_1_accuracy" in history[2]  # TensorFlow's
    # The third and fourth losses are right only with the momenta of the steps before.
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(
            [epoch[name] for epoch in history], [epoch[name] for epoch in whole], rtol=1e-4
        )
    assert whole[3]["loss"] < whole[0]["loss"] - 0.01


def test_training_starts_from_an_exported_model(work: Path, inputs: Inputs, tmp_path: Path):
    exported = work / "model" / "Format-Serving"
    # With another seed, and a learning rate that moves nothing.
    options = {"epochs": 1, "seed": 8, "learning_rate": 1e-12}
    result = train(inputs, tmp_path, base_model=exported, engine="jax", **options)
    last = report(work)["history"][-1]
    assert result["base_model"] == {"epochs": 2, "val_top_1_accuracy": last["val_top_1_accuracy"]}
    assert result["history"][0]["val_loss"] == pytest.approx(last["val_loss"], abs=1e-5)


def test_a_trial_of_the_tuner(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fields = arguments(inputs, tmp_path, trials=1, trial_fraction=0.5, engine="jax")
    result = tuning.tuner_fn(FnArgs(**fields))
    result.tuner.search(**result.fit_kwargs)
    assert 0.0 <= result.tuner.oracle.get_best_trials()[0].score <= 1.0
    assert "  epoch 1/1 took" in capsys.readouterr().out
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_failed_trial(read: run.Inputs, tmp_path: Path):
    huge = replace(TINY, learning_rate=1e30)
    with pytest.raises(process.TrainingError) as error:
        jax_engine.fit(huge, read)
    assert re.match(
        r"the loss is (nan|inf) at step [23] of epoch 1: train with a lower --learning_rate,",
        str(error.value),
    )
    assert "NonFiniteLossError" in str(error.value.__cause__)


def write_job(folder: Path, preset: Preset) -> Folder:
    """A job on random images, 150 of them to train on."""
    folder.mkdir()
    job, draw = Folder(folder), np.random.default_rng(0)
    for name, number in (("train", 150), ("validation", 50)):
        images = draw.integers(0, 256, (number, 32, 32, 3)).astype(np.uint8)
        job.write_split(name, images, draw.integers(0, 100, number))
    means = [128.0] * 3, [5000.0] * 3
    job.write_job(Job(preset, 100, 0, *means, str(folder / "checkpoints")), None)
    return job


# In a process of its own, to be killed.
PROGRAM = """
import sys
from trainer.on_jax import job, process
process.run(job.Folder(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_parent(kill: signal.Signals, tmp_path: Path, compiled: Path):
    minutes = replace(TINY, train_minutes=60.0)
    write_job(tmp_path / "job", minutes)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "job"), str(compiled)]
    # Tests that run in the background of a shell ignore SIGINT, and so would what they start.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    parent = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heeds
    )
    assert parent.stdout is not None
    assert "  epoch 1 took" in parent.stdout.readline()
    (child,) = psutil.Process(parent.pid).children()
    assert "trainer.on_jax" in child.cmdline()
    parent.send_signal(kill)
    parent.communicate(timeout=20)
    assert parent.returncode != 0
    child.wait(timeout=5)


def test_several_devices_share_a_batch(
    tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch
):
    """Parts of the CPU: other devices share all of the code but the kernels."""
    histories = {}
    for devices in (1, 4):
        monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}")
        folder = write_job(tmp_path / str(devices), replace(TINY, epochs=2))
        process.run(folder, str(compiled))
        result, _ = folder.read_result()
        assert result.devices == devices
        histories[devices] = result.history
    for name in ("loss", "val_loss", "val_top_5_accuracy"):
        one, four = ([epoch[name] for epoch in histories[devices]] for devices in (1, 4))
        np.testing.assert_allclose(four, one, atol=1e-3)
    uneven = write_job(tmp_path / "uneven", replace(TINY, batch_size=66))
    with pytest.raises(process.TrainingError, match="66, which 4 devices cannot share evenly"):
        process.run(uneven, str(compiled))


def test_trains_by_the_clock(tmp_path: Path, compiled: Path, capsys: pytest.CaptureFixture[str]):
    # Fewer images than a batch has: it is filled up.
    timed = replace(TINY, train_minutes=0.05, epochs=1, batch_size=256)
    folder = write_job(tmp_path / "job", timed)
    process.run(folder, str(compiled))
    history = folder.read_result()[0].history
    assert len(history) > 1  # `epochs` is not what ends it
    assert 3.0 <= history[-1]["training_seconds"] < 4.0
    seconds = [epoch["training_seconds"] for epoch in history]
    assert seconds == sorted(seconds)
    assert history[-1]["loss"] < history[0]["loss"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(history) and lines[-1].startswith(f"  epoch {len(history)} took")
