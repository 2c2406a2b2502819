"""Training that starts from an exported model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras import ops

from dataset.card import CARD_FILE, from_json
from tests.support.cards import make_card
from tests.support.networks import build_model
from tests.trainer.training import Inputs, report, train
from trainer import export, warm_start
from trainer import weights as packed_weights
from trainer.optimizer import build_optimizer
from trainer.preset import Preset, replace
from trainer.presets import PRESETS, get_preset
from trainer.report import REPORT_FILE, Normalization, TrainingReport
from trainer.warm_start import BaseModel, WarmStartError, read_base_model

TINY, COMPACT = get_preset("tiny"), get_preset("compact")
CLASSES = make_card(["apple", "bear", "camel"])


def base_model(preset: Preset, tuned: dict[str, Any] | None = None) -> BaseModel:
    report = TrainingReport(
        dataset="synthetic",
        limit=None,
        subset=False,
        train_examples=1,
        preset=preset,
        tuned=tuned,
        base_model=None,
        seed=0,
        engine="tensorflow",
        precision="float32",
        device="cpu",
        devices=1,
        versions={},
        trainable_parameters=1,
        normalization=Normalization((0.0,) * 3, (1.0,) * 3),
        history=[{"epoch": 1}],
    )
    return BaseModel("", report, CLASSES)


def test_training_starts_from_the_exported_weights(finished: Path, inputs: Inputs, tmp_path: Path):
    exported = finished / "model" / "Format-Serving"
    # With another seed, and a learning rate that moves nothing.
    result = train(inputs, tmp_path, base_model=exported, epochs=1, seed=8, learning_rate=1e-12)
    last = report(finished)["history"][-1]
    assert result["base_model"] == {"epochs": 2, "val_top_1_accuracy": last["val_top_1_accuracy"]}
    assert result["history"][0]["val_loss"] == pytest.approx(last["val_loss"], abs=1e-5)
    before = read_base_model(str(exported))
    after = read_base_model(str(tmp_path / "model" / "Format-Serving"))
    assert before is not None and after is not None
    assert (before.report.epochs, after.report.epochs) == (2, 3)
    with np.load(before.weights) as theirs, np.load(after.weights) as ours:
        assert list(theirs) == list(ours)
        assert sum(array.size for array in theirs.values()) == 63_172
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-7)


def test_without_a_model_there_is_nothing_to_start_from(tmp_path: Path):
    assert read_base_model(None) is None
    assert read_base_model(str(tmp_path / "none")) is None


def test_an_export_without_weights(finished: Path, tmp_path: Path):
    extra = shutil.copytree(
        finished / "model" / "Format-Serving" / "assets.extra", tmp_path / "assets.extra"
    )
    (extra / export.WEIGHTS_FILE).unlink()
    with pytest.raises(WarmStartError, match=r"no trained_weights\.npz .*without --warm_start"):
        read_base_model(str(tmp_path))


def test_what_does_not_change_the_architecture_may_differ():
    changed = replace(TINY, name="other", epochs=9, random_zoom=0.0, dropout_rate=0.3)
    assert base_model(TINY).adapt(changed, CLASSES) == changed


def test_another_architecture_is_refused_by_both_names_and_values():
    other = replace(TINY, name="other", transformer_layers=4, mlp_head_units=(8, 8), epochs=7)
    with pytest.raises(WarmStartError) as error:
        base_model(other).adapt(TINY, CLASSES)
    text = str(error.value)
    assert "preset 'tiny' cannot start from" in text and "is of preset 'other'" in text
    assert "transformer_layers is 4 there and 2 here" in text
    assert "mlp_head_units is (8, 8) there and (64,) here" in text
    assert "epochs" not in text


def test_other_classes_have_a_new_classifier_alone(
    finished: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    exported = shutil.copytree(finished / "model" / "Format-Serving", tmp_path / "pushed")
    path = exported / "assets.extra" / CARD_FILE
    card = from_json(path.read_text(), "it")
    path.write_text(dataclasses.replace(card, classes=(*card.classes[:-1], "other")).to_json())
    # A learning rate that moves nothing.
    result = train(inputs, tmp_path, base_model=exported, epochs=1, learning_rate=1e-12)
    assert (
        "starting from all but the classifier of the model pushed last" in capsys.readouterr().out
    )
    assert result["base_model"]["epochs"] == 2
    after = tmp_path / "model" / "Format-Serving" / "assets.extra" / export.WEIGHTS_FILE
    with (
        np.load(exported / "assets.extra" / export.WEIGHTS_FILE) as theirs,
        np.load(after) as ours,
    ):
        new = {name for name in theirs if np.abs(ours[name] - theirs[name]).max() > 1e-6}
    assert {name.partition("/")[2] for name in new} == {"logits/kernel", "logits/bias"}


@pytest.mark.parametrize("preset", [TINY, COMPACT], ids=lambda preset: preset.name)
def test_what_was_taken_over_has_a_learning_rate_of_its_own(preset: Preset):
    preset = replace(
        preset,
        weight_decay=0.0,
        learning_rate_schedule="constant",
        warmup=0.0,
        base_rate_ratio=0.25,
        transformer_layers=1,
    )
    moved = []
    for other_classes in (False, True):
        network = build_model(preset, num_classes=3, seed=0)
        optimizer = build_optimizer(preset.training, steps_per_epoch=1, other_classes=other_classes)
        before = [variable.numpy() for variable in network.trainable_variables]
        gradients = [np.full(b.shape, 0.1, np.float32) for b in before]
        optimizer.apply([ops.convert_to_tensor(g) for g in gradients], network.trainable_variables)
        moved.append([v.numpy() - b for v, b in zip(network.trainable_variables, before)])
    for variable, whole, part in zip(network.trainable_variables, *moved, strict=True):
        ratio = 1.0 if "logits" in variable.path else 0.25
        np.testing.assert_allclose(part, ratio * whole, atol=2e-6)
        assert np.abs(whole).max() > 1e-5


def test_images_of_another_size_are_refused_where_the_network_does_not_resize_them():
    larger = make_card(CLASSES.classes, image_size=(48, 48))
    with pytest.raises(WarmStartError, match=r"images are \(32, 32, 3\) there and \(48, 48, 3\)"):
        base_model(TINY).adapt(TINY, larger)
    notebook = get_preset("notebook")
    assert base_model(notebook).adapt(notebook, larger) == notebook


def test_a_model_of_another_version(finished: Path, tmp_path: Path):
    extra = shutil.copytree(
        finished / "model" / "Format-Serving" / "assets.extra", tmp_path / "assets.extra"
    )
    report = json.loads((extra / REPORT_FILE).read_text())
    report["preset"] = {"name": "tiny", "epochs": 2}  # all in one, as it was
    (extra / REPORT_FILE).write_text(json.dumps(report))
    message = r"training\.json is not the training report .*preset.*without --warm_start"
    with pytest.raises(WarmStartError, match=message):
        read_base_model(str(tmp_path))


def test_the_depth_that_a_tuner_has_chosen_stays():
    deeper = replace(TINY, transformer_layers=3)
    with pytest.raises(WarmStartError, match="transformer_layers is 3 there and 2 here"):
        base_model(deeper).adapt(TINY, CLASSES)
    base = base_model(deeper, tuned={"transformer_layers": 3, "learning_rate": 0.5})
    assert base.adapt(TINY, CLASSES) == deeper


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize(
    # Batch normalization is for blocks without dropout.
    "other",
    [replace(TINY, dropout_rate=0.0), COMPACT],
    ids=lambda preset: preset.name,
)
def test_architecture_is_all_that_weights_and_outputs_depend_on(
    name: str, other: Preset, tmp_path: Path
):
    preset = get_preset(name)
    same = dataclasses.replace(other, architecture=preset.architecture)
    first, second = (build_model(each, seed=n) for n, each in enumerate((preset, same)))
    weights = tmp_path / export.WEIGHTS_FILE
    weights.write_bytes(packed_weights.pack(first))
    warm_start.load_weights(second, BaseModel(str(weights), None, CLASSES), CLASSES)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("f4")
    outputs = [each(images, training=False) for each in (first, second)]
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_weights_that_do_not_fit(tmp_path: Path):
    weights = tmp_path / export.WEIGHTS_FILE
    weights.write_bytes(packed_weights.pack(build_model(TINY)))
    deeper = build_model(replace(TINY, transformer_layers=3))
    with pytest.raises(
        WarmStartError, match=r"do not fit: there are \d+ weights, the network has \d+"
    ):
        warm_start.load_weights(deeper, BaseModel(str(weights), None, CLASSES), CLASSES)
