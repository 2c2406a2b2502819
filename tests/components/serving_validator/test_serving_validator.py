"""ServingValidator on small models with the interface of ours, served by real processes."""

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
from tensorflow_serving.apis import prediction_log_pb2
from tfx import types
from tfx.types import standard_artifacts

from components import models
from components.examples import ExamplesError
from components.serving_validator import checks
from components.serving_validator.component import ServingValidator
from components.serving_validator.executor import Executor, ValidationError
from pipeline.graph import BATCHING_FILE
from serving import server_process
from serving.client import Signature, Tensor
from tests.serving.helpers import Classifier, pixels, weights
from tests.support.cards import SYNTHETIC_CARD
from tests.support.examples import example, examples_artifact

SIGNATURES = ("serving_bytes", "serving_default", "serving_examples")


def export(folder: Path, classifier: Classifier | None = None) -> types.Artifact:
    """What Trainer leaves, with the answers that a right model gives."""
    model = standard_artifacts.Model()
    model.uri = str(folder)
    target = folder / "Format-Serving"
    (classifier or Classifier()).save(target)
    images = pixels(8, seed=1)
    odds = np.exp(images.reshape(-1, 3072).astype(np.float64) @ weights())
    answers = {
        "images": [base64.b64encode(image.tobytes()).decode() for image in images],
        "probabilities": (odds / odds.sum(axis=1, keepdims=True)).tolist(),
    }
    (target / "assets.extra").mkdir()
    (target / "assets.extra" / "known_answers.json").write_text(json.dumps(answers))
    return model


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> types.Artifact:
    """ExampleGen's output: 40 images to test on."""
    rows = [
        example(image=image.tobytes(), label=label)
        for label, image in enumerate(pixels(40, seed=2))
    ]
    folder = tmp_path_factory.mktemp("examples")
    return examples_artifact(folder, {"train": [], "test": rows}, SYNTHETIC_CARD)


def validate(
    model: types.Artifact, examples: types.Artifact, output: Path, split: str = "test"
) -> tuple[types.Artifact, dict[str, Any]]:
    """Runs the executor as the component describes it; returns the blessing and the report."""
    component = ServingValidator(
        model=types.Channel(type=standard_artifacts.Model),
        examples=types.Channel(type=standard_artifacts.Examples),
        split=split,
        batching_file=BATCHING_FILE,
    )
    blessing = standard_artifacts.InfraBlessing()
    blessing.uri = str(output)
    Executor().Do(
        {"model": [model], "examples": [examples]},
        {"blessing": [blessing]},
        component.exec_properties,
    )
    return blessing, json.loads((output / "report.json").read_text())


def refusal(
    model: types.Artifact, examples: types.Artifact, output: Path
) -> tuple[str, dict[str, Any]]:
    """Validates a model that must be refused; returns the reason and the report."""
    blessing, report = validate(model, examples, output)
    assert blessing.get_int_custom_property("blessed") == 0
    assert blessing.get_int_custom_property("has_model") == 0
    assert (output / "INFRA_NOT_BLESSED").exists() and not (output / "stamped_model").exists()
    assert report["blessed"] is False
    reason = blessing.get_string_custom_property("reason")
    assert reason == "; ".join(report["problems"])
    return reason, report


def tf_serving(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a `tensorflow_model_server` on PATH."""
    folder.mkdir()
    binary = folder / server_process.TF_SERVING
    binary.write_text(f"#!/bin/sh\n{script}\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_good_model_is_blessed_with_warmup(
    examples: types.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # TF Serving's binary goes first; its port is taken when it is started for the first time.
    tf_serving(
        tmp_path / "bin",
        f"[ -e {tmp_path}/tried ] && exec {sys.executable} -m serving.server $@\n"
        f"touch {tmp_path}/tried; echo 'bind: Address already in use' >&2; exit 1",
        monkeypatch,
    )
    model = export(tmp_path / "model")
    before = sorted(path for path in (tmp_path / "model").rglob("*"))
    blessing, report = validate(model, examples, tmp_path / "blessing")
    assert report["problems"] == []
    assert blessing.get_int_custom_property("blessed") == 1
    assert blessing.get_int_custom_property("has_model") == 1
    assert (tmp_path / "blessing" / "INFRA_BLESSED").exists()
    assert report["server"] == "tensorflow_model_server"
    assert report["images"] == {"test": 32, "validation": 8}
    assert set(report["latency"]) == set(report["difference_from_trainer"]) == set(SIGNATURES)
    for figures in report["latency"].values():
        assert 0 < figures["p50_ms"] <= figures["p99_ms"]
        assert figures["requests"] >= 10
    assert max(report["difference_from_trainer"].values()) < 1e-5

    pushed = tmp_path / "blessing" / "stamped_model"
    assert models.is_same_model(str(pushed), model)
    assert sorted(path for path in (tmp_path / "model").rglob("*")) == before
    file = pushed / "assets.extra" / "tf_serving_warmup_requests"
    assert file.stat().st_size < 500_000
    shapes: dict[str, list[int]] = {}
    for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
        request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
        ((_, tensor),) = request.inputs.items()
        array = tf.make_ndarray(tensor)
        shapes.setdefault(request.model_spec.signature_name, []).append(len(array))
        assert array.shape[1:] in ((), (32, 32, 3))
    assert shapes == {name: [1, 2, 4, 8, 16, 32] for name in SIGNATURES}
    log = (tmp_path / "blessing" / "server.log").read_text()
    assert "18 warm-up requests" in log


def test_wrong_probabilities(examples: types.Artifact, tmp_path: Path):
    model = export(tmp_path / "model", Classifier(total=0.9))
    reason, report = refusal(model, examples, tmp_path / "blessing")
    assert report["server"] == "serving.server"
    for name in SIGNATURES:
        assert f"{name}: probabilities sum to 0.9000, not to 1 (image " in reason


def test_a_signature_that_disagrees_with_the_others_and_with_trainer(
    examples: types.Artifact, tmp_path: Path
):
    model = export(tmp_path / "model", Classifier(bias=0.1))
    reason, _ = refusal(model, examples, tmp_path / "blessing")
    assert "serving_bytes: probabilities differ from Trainer's own by up to 0.0" in reason
    assert "serving_default and serving_bytes differ by up to 0.0" in reason
    assert "serving_default and serving_examples" not in reason


def test_a_model_that_does_not_load(examples: types.Artifact, tmp_path: Path):
    model = export(tmp_path / "model")
    (tmp_path / "model" / "Format-Serving" / "saved_model.pb").write_bytes(b"cut short")
    reason, _ = refusal(model, examples, tmp_path / "blessing")
    assert reason.startswith("the model does not load: ")


def test_a_server_that_dies_while_it_loads_is_tried_twice(
    examples: types.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tf_serving(
        tmp_path / "bin", f"echo x >>{tmp_path}/tried; echo no memory >&2; kill -9 $$", monkeypatch
    )
    reason, _ = refusal(export(tmp_path / "model"), examples, tmp_path / "blessing")
    assert reason == "the model server ended with signal SIGKILL: no memory"
    assert (tmp_path / "tried").read_text() == "x\nx\n"


def test_a_server_that_dies_later_is_noticed_and_none_is_left(tmp_path: Path):
    export(tmp_path / "vit")
    (tmp_path / "vit" / "Format-Serving").rename(tmp_path / "vit" / "1")
    with server_process.serve(
        tmp_path / "vit",
        "vit",
        batching=Path(BATCHING_FILE),
        log=tmp_path / "log",
        timeout=120,
    ) as server:
        assert server.load_seconds > 0
        server.check()
        server.process.kill()
        server.process.wait()
        with pytest.raises(server_process.ModelServerError, match="ended with signal SIGKILL"):
            server.check()
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="util-linux has no setpriv here")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_does_not_outlive_who_has_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: signal.Signals
):
    tf_serving(tmp_path / "bin", f"echo $$ >{tmp_path}/pid; exec sleep 300", monkeypatch)
    program = (
        "from pathlib import Path; from serving.server_process import serve\n"
        f"with serve(Path(), 'vit', batching=Path(), log=Path('{tmp_path}/log'), timeout=99): pass"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            assert parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.send_signal(end)
        parent.wait()
    server = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{server}").exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"process {server} is still there")


def test_nothing_to_query_with(examples: types.Artifact, tmp_path: Path):
    model = export(tmp_path / "model")
    with pytest.raises(ExamplesError, match="have no split 'eval'"):
        validate(model, examples, tmp_path / "blessing", split="eval")
    with pytest.raises(ExamplesError, match=r"no examples in .*Split-train"):
        validate(model, examples, tmp_path / "blessing", split="train")
    (tmp_path / "model" / "Format-Serving" / "assets.extra" / "known_answers.json").unlink()
    with pytest.raises(ValidationError, match=r"known_answers\.json of the model cannot be read"):
        validate(model, examples, tmp_path / "blessing")
    assert not (tmp_path / "blessing").exists()


def outputs() -> dict[str, np.ndarray]:
    """Right answers for two images of three classes."""
    return {
        "probabilities": np.array([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]], np.float32),
        "top_5_ids": np.array([[1, 2, 0], [0, 2, 1]], np.int32),
        "top_5_probabilities": np.array([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]], np.float32),
    }


DECLARED = Signature(
    {"images": Tensor("uint8", (None, 32, 32, 3))},
    {
        "probabilities": Tensor("float32", (None, 3)),
        "top_5_ids": Tensor("int32", (None, 3)),
        "top_5_probabilities": Tensor("float32", (None, 3)),
    },
)


def test_right_answers_are_no_problem():
    assert checks.shape_problems(DECLARED, outputs(), 2) == []
    assert checks.value_problems(outputs()) == []


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("top_5_ids", np.zeros([2, 3], np.int64), "top_5_ids is int64 [2, 3] for 2 images"),
        ("top_5_ids", np.zeros([2, 4], np.int32), "top_5_ids is int32 [2, 4] for 2 images"),
        ("probabilities", np.ones([1, 3], np.float32), "probabilities is float32 [1, 3] for 2"),
        ("more", np.zeros([2]), "returns more, probabilities, top_5_ids, top_5_probabilities, w"),
    ],
)
def test_outputs_that_are_not_as_declared(name: str, values: np.ndarray, problem: str):
    (found,) = checks.shape_problems(DECLARED, {**outputs(), name: values}, 2)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("probabilities", np.nan, "values that are negative or no numbers"),
        ("probabilities", -0.1, "values that are negative or no numbers"),
        ("probabilities", 0.6, "probabilities sum to 1.5000, not to 1 (image 1)"),
        ("top_5_ids", 1, "top_5_ids are not the 3 largest"),
        ("top_5_probabilities", 0.4, "top_5_ids are not the 3 largest"),
    ],
)
def test_impossible_answers(name: str, value: float, problem: str):
    broken = outputs()
    broken[name][1, 1] = value
    assert problem in checks.value_problems(broken)[0]
