"""The search for hyperparameters, and training with what it has found."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from tfx.components.trainer.fn_args_utils import FnArgs
from tfx.components.tuner import executor
from tfx.types import standard_artifacts

from tests.trainer.training import Inputs, arguments, train
from trainer import hyperparameters, tuning
from trainer.preset import Preset, replace
from trainer.presets import PRESETS, get_preset

TINY = get_preset("tiny")
DEEP = replace(TINY, transformer_layers=4, learning_rate=2e-3)


def scaled(preset: Preset, factor: float) -> dict[str, float]:
    """What is then on."""
    augmentation = hyperparameters.scale_augmentation(preset, factor).augmentation
    return {name: value for name, value in dataclasses.asdict(augmentation).items() if value}


def test_augmentation_is_scaled_together_and_within_limits():
    preset = replace(TINY, random_shift=3)
    flip = {"random_flip": True}
    assert scaled(preset, 2) == flip | {
        "random_rotation": 0.04,
        "random_zoom": 0.4,
        "random_shift": 6,
    }
    assert scaled(preset, 0.5) == flip | {
        "random_rotation": 0.01,
        "random_zoom": 0.1,
        "random_shift": 2,
    }
    assert hyperparameters.scale_augmentation(preset, 1) == preset
    assert scaled(preset, 0) == flip
    assert not hyperparameters.is_augmented(hyperparameters.scale_augmentation(preset, 0))
    strong = scaled(replace(TINY, random_zoom=0.8), 2)
    assert strong["random_zoom"] == hyperparameters.AUGMENTATION_LIMITS["random_zoom"]
    mixing = get_preset("compact_long")
    assert scaled(mixing, 2) == flip | {"mixup": 0.4, "cutmix": 2.0, "random_shift": 8}
    assert mixing.augmentation.mixes_labels and scaled(mixing, 0) == flip
    with pytest.raises(ValueError, match=r"-0\.5"):
        hyperparameters.scale_augmentation(preset, -0.5)


@pytest.mark.parametrize(
    ("epochs", "fraction", "expected"), [(20, 0.2, 4), (2, 0.2, 1), (1, 1.0, 1), (7, 0.5, 4)]
)
def test_a_trial_is_a_part_of_the_training(epochs: int, fraction: float, expected: int):
    preset = replace(TINY, epochs=epochs)
    assert hyperparameters.shorten(preset, fraction).training.epochs == expected
    timed = replace(preset, train_minutes=10.0)
    assert hyperparameters.shorten(timed, fraction).training.train_minutes == 10 * fraction


def space(preset: Preset, *, fixed_architecture: bool = False) -> dict[str, Any]:
    found = tuning.search_space(preset, fixed_architecture=fixed_architecture).space
    return {item.name: item for item in found}


def test_the_search_is_around_the_preset():
    found = space(DEEP)
    assert {name: item.default for name, item in found.items()} == {
        "learning_rate": 2e-3,
        "weight_decay": 1e-3,
        "transformer_layers": 4,
        "augmentation": 1.0,
    }
    rate, depth = found["learning_rate"], found["transformer_layers"]
    assert (rate.min_value, rate.max_value, rate.sampling) == (0.0005, 0.008, "log")
    assert (depth.min_value, depth.max_value) == (2, 6)
    assert space(replace(DEEP, transformer_layers=1))["transformer_layers"].max_value == 2


def test_what_is_off_or_fixed_is_not_searched():
    assert "transformer_layers" not in space(DEEP, fixed_architecture=True)
    plain = replace(DEEP, weight_decay=0.0, random_rotation=0.0, random_zoom=0.0)
    assert set(space(plain)) == {"learning_rate", "transformer_layers"}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_every_preset_takes_all_that_may_be_tried(preset: Preset):
    items = tuning.search_space(preset, fixed_architecture=False).space
    for probability in (0.0, 0.5, 0.999):
        values = {item.name: item.prob_to_value(probability) for item in items}
        assert (
            hyperparameters.apply(preset, values).training.learning_rate == values["learning_rate"]
        )


class Interruption(io.StringIO):
    """What is printed; interrupts whoever begins to print of a second trial, as Ctrl-C would."""

    def write(self, text: str) -> int:
        if text.startswith("  trial 2/2: "):
            raise KeyboardInterrupt
        return super().write(text)


@dataclasses.dataclass(frozen=True)
class Search:
    """A search that was interrupted and taken up again."""

    printed: str
    best: dict[str, Any]
    results: list[dict[str, Any]]
    left: list[str]


@pytest.fixture(scope="module")
def search(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Search:
    work = tmp_path_factory.mktemp("search")
    fn_args = FnArgs(**arguments(inputs, work, trials=2, trial_fraction=0.5))
    printed = Interruption()
    result = tuning.tuner_fn(fn_args)
    with contextlib.redirect_stdout(printed), pytest.raises(KeyboardInterrupt):
        result.tuner.search(**result.fit_kwargs)
    again = io.StringIO()
    with contextlib.redirect_stdout(again):
        result = tuning.tuner_fn(fn_args)
        result.tuner.search_space_summary()
        result.tuner.search(**result.fit_kwargs)
        result.tuner.results_summary()
    # What TFX makes of it.
    outputs = {
        "best_hyperparameters": [standard_artifacts.HyperParameters()],
        "tuner_results": [standard_artifacts.TunerResults()],
    }
    for name, artifacts in outputs.items():
        (work / name).mkdir()
        artifacts[0].uri = str(work / name)
    executor.write_best_hyperparameters(result.tuner, outputs)
    best, results = (
        json.loads((work / path).read_text())
        for path in (
            "best_hyperparameters/best_hyperparameters.txt",
            "tuner_results/tuner_results.json",
        )
    )
    left = [path.name for path in (work / "checkpoints").iterdir()]
    return Search(f"{printed.getvalue()}<interrupted>\n{again.getvalue()}", best, results, left)


def test_the_first_trial_is_the_preset_and_the_best_one_wins(search: Search):
    first, second = sorted(search.results, key=lambda row: row["trial_id"])
    assert (first["trial_id"], second["trial_id"]) == ("0", "1")
    assert all(0 <= row["score"] <= 1 for row in search.results)
    assert {name: first[name] for name in search.best["values"]} == {
        "learning_rate": 2e-3,
        "weight_decay": 1e-3,
        "transformer_layers": 2,
        "augmentation": 1.0,
    }
    assert second["learning_rate"] != 2e-3
    best = max(search.results, key=lambda row: row["score"])
    assert search.best["values"].items() <= best.items()


def test_an_interrupted_search_goes_on_after_its_finished_trials(search: Search):
    before, after = search.printed.split("<interrupted>\n")
    assert "  trial 1/2: learning_rate 0.002  weight_decay 0.001  transformer_layers 2" in before
    assert re.search(r"  trial 1/2 took \d+ s: validation top-1 0\.\d{4}, the best so far", before)
    assert after.startswith("  continuing after trial 1\n  trial 2/2: ")
    # A half of the two epochs.
    assert before.count("  epoch 1/1 took") == after.count("  epoch 1/1 took") == 1
    assert re.search(r"  trial 2/2 took \d+ s: validation top-1 0\.\d{4}", after)
    assert search.left == []


def test_a_tie_goes_to_the_preset_s_own_resumed_or_not(tmp_path: Path):
    oracle = tuning._Oracle(
        objective=tuning.OBJECTIVE,
        max_trials=3,
        hyperparameters=tuning.search_space(TINY, fixed_architecture=True),
        seed=1,
    )
    oracle._set_project_dir(str(tmp_path), "search")
    for score in (0.5, 0.25, 0.5):
        trial = oracle.create_trial("tuner0")
        oracle.update_trial(trial.trial_id, {tuning.OBJECTIVE.name: score})
        trial.status = "COMPLETED"
        oracle.end_trial(trial)
    for order in ("012", "210", "102"):  # after an interruption, that of the file system
        oracle.trials = {number: oracle.trials[number] for number in order}
        best = oracle.get_best_trials(3)
        assert [trial.trial_id for trial in best] == ["0", "2", "1"]


def test_training_takes_what_was_found(search: Search, inputs: Inputs, tmp_path: Path):
    values = {
        "learning_rate": 3e-3,
        "weight_decay": 2e-3,
        "transformer_layers": 1,
        "augmentation": 0.5,
    }
    found = {**search.best, "values": values}
    result = train(inputs, tmp_path, epochs=1, hyperparameters=found)
    assert result["tuned"] == values
    preset = result["preset"]
    training = preset["training"]
    assert (training["learning_rate"], training["weight_decay"]) == (3e-3, 2e-3)
    assert preset["architecture"]["transformer_layers"] == 1
    assert preset["augmentation"]["random_zoom"] == 0.1
    assert training["epochs"] == 1 and result["trainable_parameters"] < 63_172


@pytest.mark.parametrize("trials", [1, 5, 10])
def test_after_a_third_of_the_trials_the_results_decide(
    trials: int, inputs: Inputs, tmp_path: Path
):
    fn_args = FnArgs(**arguments(inputs, tmp_path, trials=trials, trial_fraction=1.0))
    oracle = tuning.tuner_fn(fn_args).tuner.oracle
    fitted: list[int] = []
    fit = oracle.gpr.fit
    oracle.gpr.fit = lambda x, y: fitted.append(len(y)) or fit(x, y)
    for number in range(trials):
        trial = oracle.create_trial("tuner0")
        oracle.update_trial(trial.trial_id, {tuning.OBJECTIVE.name: 0.1 * number / trials})
        trial.status = "COMPLETED"
        oracle.end_trial(trial)
    assert fitted == list(range(max(2, trials // 3), trials))


def test_an_error_in_a_trial_is_an_error(inputs: Inputs, tmp_path: Path):
    fn_args = FnArgs(**arguments(inputs, tmp_path, trials=5, trial_fraction=1.0))
    tuner = tuning.tuner_fn(fn_args).tuner
    small = tf.data.Dataset.from_tensors((tf.zeros([1, 8, 8, 3]), tf.zeros([1], tf.int64)))
    assert isinstance(tuner, tuning.PresetTuner)
    tuner._inputs = tuner._inputs._replace(train=lambda first_step, mixing: small.repeat())
    with pytest.raises(tuning.TuningError, match=r"trial 1 \(learning_rate 0\.002 .*8, 8, 3"):
        tuner.search()
