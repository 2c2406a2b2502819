"""Evaluator on models whose accuracy is known beforehand, example by example."""

import copy
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_analysis as tfma
from tfx import types
from tfx import v1 as tfx
from tfx.dsl.components.base.base_beam_executor import BaseBeamExecutor
from tfx.types import standard_artifacts

from components.evaluator.component import BaselineEvaluator
from components.evaluator.drop import AUTO, Measured
from components.evaluator.executor import Executor, fit_to_card
from components.evaluator.results import accuracies
from dataset.card import DataCard
from pipeline.execution import beam_arguments
from pipeline.gate import TOP_1, TOP_5, Gate
from pipeline.graph import evaluation_config
from pipeline.summary import comparisons, rejection_reasons
from tests.support.cards import SYNTHETIC_CARD, make_card
from tests.support.examples import example, examples_artifact

# 200 examples, two of each of the 100 classes, five classes to a superclass.
INDEX = np.arange(200)
LABELS = INDEX % 100
COARSE = LABELS // 5
# How many classes a model holds to be more probable than the right one. The two models' ranks are
# the first two bytes of each image.
GOOD = np.select([INDEX % 8 == 0, INDEX % 8 == 4], [5, 4], 0)  # top-1 3/4, top-5 7/8
POOR = np.select([INDEX % 4 == 0, INDEX % 4 == 2], [4, 9], 0)  # top-1 1/2, top-5 3/4


class RankModel(tf.Module):
    """Puts the right class at the rank that a byte of the image gives."""

    def __init__(self, byte: int):
        super().__init__()
        self._byte = byte

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
    def serving_examples(self, examples: tf.Tensor) -> dict[str, tf.Tensor]:
        features = tf.io.parse_example(
            examples,
            {
                "image": tf.io.FixedLenFeature([], tf.string),
                "label": tf.io.FixedLenFeature([], tf.int64),
            },
        )
        pixels = tf.io.decode_raw(features["image"], tf.uint8)
        rank = tf.cast(pixels[:, self._byte], tf.int64)[:, None]  # (N, 1)
        distance = (tf.range(100, dtype=tf.int64) - features["label"][:, None]) % 100
        scores = tf.where(distance <= rank, tf.cast(distance + 1, tf.float32), 0.0)  # (N, 100)
        return {"probabilities": scores / tf.reduce_sum(scores, axis=1, keepdims=True)}


class Evaluation(NamedTuple):
    uri: str
    blessing: types.Artifact

    @property
    def blessed(self) -> bool:
        return self.blessing.get_int_custom_property("blessed") == 1

    @property
    def reasons(self) -> list[str]:
        return rejection_reasons(tfma.load_validation_result(self.uri))


def row(index: int) -> bytes:
    image = bytes([GOOD[index], POOR[index]]) + bytes(3070)
    return example(image=image, label=int(LABELS[index]), superclass=int(COARSE[index]))


class Workshop:
    """The examples and models that the tests evaluate."""

    def __init__(self, root: Path, card: DataCard = SYNTHETIC_CARD):
        self._root = root
        self._runs = 0
        self.good = self._export("good", byte=0)
        self.poor = self._export("poor", byte=1)
        self.none = self._artifact(standard_artifacts.Model, "none")
        Path(self.none.uri).mkdir()
        # In train, one example that both models get wrong: it counts if that is read, too.
        splits = {"train": [row(0)], "test": [row(index) for index in INDEX]}
        self._examples = examples_artifact(root / "examples", splits, card)

    def _artifact(self, kind: type[types.Artifact], name: str) -> types.Artifact:
        artifact = kind()
        artifact.uri = str(self._root / name)
        return artifact

    def _export(self, name: str, byte: int) -> types.Artifact:
        artifact = self._artifact(standard_artifacts.Model, name)
        model = RankModel(byte)
        tf.saved_model.save(
            model,
            str(Path(artifact.uri, "Format-Serving")),
            signatures={"serving_examples": model.serving_examples},
        )
        return artifact

    def evaluate(self, model: types.Artifact, baseline: types.Artifact, gate: Gate) -> Evaluation:
        """Runs the executor with the component's own properties."""
        component = BaselineEvaluator(
            examples=tfx.dsl.Channel(type=standard_artifacts.Examples),
            model=tfx.dsl.Channel(type=standard_artifacts.Model),
            baseline_model=tfx.dsl.Channel(type=standard_artifacts.Model),
            example_splits=["test"],
            eval_config=evaluation_config(gate),
        )
        self._runs += 1
        run = f"run{self._runs}"
        evaluation = self._artifact(standard_artifacts.ModelEvaluation, f"{run}/evaluation")
        blessing = self._artifact(standard_artifacts.ModelBlessing, f"{run}/blessing")
        context = BaseBeamExecutor.Context(
            beam_pipeline_args=beam_arguments(workers=1),
            tmp_dir=str(self._root / run / "tmp"),
            unique_id=run,
        )
        Executor(context).Do(
            {"examples": [self._examples], "model": [model], "baseline_model": [baseline]},
            {"evaluation": [evaluation], "blessing": [blessing]},
            dict(component.exec_properties),
        )
        return Evaluation(evaluation.uri, blessing)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("evaluator"))


@pytest.fixture(scope="module")
def first_run(workshop: Workshop) -> Evaluation:
    """The good model, with nothing to compare it to and thresholds just below its accuracies."""
    gate = Gate({TOP_1: 0.74, TOP_5: 0.87}, max_accuracy_drop=0.0)
    return workshop.evaluate(workshop.good, workshop.none, gate)


@pytest.fixture(scope="module")
def worse_run(workshop: Workshop) -> Evaluation:
    """The poor model after the good one."""
    gate = Gate({TOP_1: 0.1, TOP_5: 0.1}, max_accuracy_drop=0.2)
    return workshop.evaluate(workshop.poor, workshop.good, gate)


def expected(ranks: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """The metrics of the examples chosen, by counting."""
    return {
        TOP_1: float(np.mean(ranks[chosen] == 0)),
        TOP_5: float(np.mean(ranks[chosen] < 5)),
        "example_count": float(np.sum(chosen)),
    }


def test_first_model_is_blessed_on_the_value_thresholds_alone(first_run: Evaluation):
    assert first_run.blessed
    assert first_run.reasons == []


def test_accuracies_on_the_whole_test_split(first_run: Evaluation):
    assert accuracies(first_run.uri) == {
        (tfma.CANDIDATE_KEY, None): {TOP_1: 0.75, TOP_5: 0.875, "example_count": 200.0}
    }


@pytest.mark.parametrize(
    ("key", "labels", "slices"), [("superclass", COARSE, 20), ("label", LABELS, 100)]
)
def test_accuracies_of_each_slice(first_run: Evaluation, key: str, labels: np.ndarray, slices: int):
    measured = accuracies(first_run.uri, key)
    assert len(measured) == slices
    for (_, label), metrics in measured.items():
        assert metrics == pytest.approx(expected(GOOD, labels == label)), label


def test_a_class_that_is_never_recognised_does_not_block_the_model(first_run: Evaluation):
    assert accuracies(first_run.uri, "label")[tfma.CANDIDATE_KEY, 0][TOP_1] == 0.0
    assert first_run.blessed


def test_confusion_matrix_counts_every_example_once(first_run: Evaluation):
    (overall,) = (
        plots for plots in tfma.load_plots(first_run.uri) if not plots.slice_key.single_slice_keys
    )
    (plot,) = overall.plot_keys_and_values
    (matrix,) = plot.value.multi_class_confusion_matrix_at_thresholds.matrices
    counts = {
        (entry.actual_class_id, entry.predicted_class_id): entry.num_weighted_examples
        for entry in matrix.entries
    }
    assert sum(counts.values()) == 200
    assert sum(count for (actual, guess), count in counts.items() if actual == guess) == 150
    # The wrong guesses are five or four classes up.
    assert {(guess - actual) % 100 for actual, guess in counts} == {0, 4, 5}


def test_model_worse_than_the_baseline_is_refused(worse_run: Evaluation):
    # 0.5 after 0.75 is more than the 0.2 allowed; top-5's 0.75 after 0.875 is not.
    assert not worse_run.blessed
    assert worse_run.reasons == [f"{TOP_1} is 0.2500 below the baseline's (allowed: 0.2000)"]


def test_both_models_are_measured(worse_run: Evaluation):
    everything = np.ones(200, bool)
    assert accuracies(worse_run.uri) == {
        (tfma.CANDIDATE_KEY, None): expected(POOR, everything),
        (tfma.BASELINE_KEY, None): expected(GOOD, everything),
    }


def test_model_as_good_as_the_baseline_is_blessed(workshop: Workshop):
    gate = Gate({TOP_1: 0.1, TOP_5: 0.1}, max_accuracy_drop=0.0)
    run = workshop.evaluate(workshop.good, workshop.good, gate)
    assert run.reasons == []
    assert run.blessed


def test_model_below_the_value_thresholds_is_refused(workshop: Workshop):
    gate = Gate({TOP_1: 0.76, TOP_5: 0.9}, max_accuracy_drop=0.0)
    run = workshop.evaluate(workshop.good, workshop.none, gate)
    assert not run.blessed
    assert sorted(run.reasons) == [
        f"{TOP_1} is 0.7500, the threshold 0.7600",
        f"{TOP_5} is 0.8750, the threshold 0.9000",
    ]


def test_the_noise_of_the_test_refuses_a_model_that_tfma_would_bless(workshop: Workshop):
    """0.5 after 0.75, of 200 examples: the difference's standard error is 0.0468."""
    run = workshop.evaluate(workshop.poor, workshop.good, Gate({TOP_1: 0.1, TOP_5: 0.1}, AUTO))
    assert not run.blessed
    assert sorted(os.listdir(run.blessing.uri)) == ["NOT_BLESSED"]
    assert run.reasons == []  # of TFMA's
    assert comparisons(run.uri, refused=True) == [
        f"{TOP_1} is 0.2500 below the baseline, more than the test's noise of 0.0468",
        f"{TOP_5} is 0.1250 below the baseline, more than the test's noise of 0.0385",
    ]
    assert comparisons(run.uri, refused=False) == []


def test_an_equal_model_is_blessed_and_pusher_told_what_was_measured(workshop: Workshop):
    baseline = copy.deepcopy(workshop.good)
    baseline.set_string_custom_property("version", "17")
    run = workshop.evaluate(workshop.good, baseline, Gate({TOP_1: 0.1, TOP_5: 0.1}, AUTO))
    assert run.blessed and sorted(os.listdir(run.blessing.uri)) == ["BLESSED"]
    assert run.blessing.get_string_custom_property("compared_with") == "17"
    assert json.loads(run.blessing.get_string_custom_property("measured")) == {
        "accuracies": {TOP_1: 0.75, TOP_5: 0.875},
        "examples": 200,
        "data": SYNTHETIC_CARD.source.fingerprint,
        "version": "",
    }


def test_a_model_far_below_the_best_version_in_the_folder_is_refused(workshop: Workshop):
    baseline = copy.deepcopy(workshop.poor)
    best = Measured({TOP_1: 0.75}, 200, SYNTHETIC_CARD.source.fingerprint, "3")
    baseline.set_string_custom_property("version", "17")
    baseline.set_string_custom_property("measured_versions", json.dumps([asdict(best)]))
    run = workshop.evaluate(workshop.poor, baseline, Gate({TOP_1: 0.1, TOP_5: 0.1}, AUTO))
    assert not run.blessed
    assert comparisons(run.uri, refused=True) == [
        f"{TOP_1} is 0.2500 below the best version in the folder, 3, more than 2 times the test's "
        "noise of 0.0468"
    ]


def test_the_configuration_fits_three_classes_without_superclasses():
    config = evaluation_config(Gate({TOP_1: 0.5, TOP_5: 0.9}))
    fit_to_card(config, make_card(["a", "b", "c"]))
    metrics = {metric.class_name: metric for metric in config.metrics_specs[0].metrics}
    top_k = metrics["SparseTopKCategoricalAccuracy"]
    assert json.loads(top_k.config) == {"name": TOP_5, "k": 3}
    assert top_k.per_slice_thresholds[0].threshold.value_threshold.lower_bound.value == 0.9
    assert [list(item.feature_keys) for item in config.slicing_specs] == [[], ["label"]]
    assert "MultiClassConfusionMatrixPlot" in metrics


def test_no_confusion_matrix_of_ten_thousand_classes():
    config = evaluation_config(Gate({TOP_1: 0.5, TOP_5: 0.9}))
    fit_to_card(config, make_card([str(index) for index in range(10_000)]))
    names = [metric.class_name for metric in config.metrics_specs[0].metrics]
    assert "MultiClassConfusionMatrixPlot" not in names and "ExampleCount" in names


def test_data_without_superclasses_are_evaluated(tmp_path: Path):
    card = make_card(SYNTHETIC_CARD.classes)
    workshop = Workshop(tmp_path, card)
    run = workshop.evaluate(workshop.good, workshop.none, Gate({TOP_1: 0.74, TOP_5: 0.87}))
    assert run.blessed
    assert accuracies(run.uri, "superclass") == {} and len(accuracies(run.uri, "label")) == 100
