"""The gate on real statistics and anomalies: each split below has faults of its own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from tfx import types
from tfx import v1 as tfx
from tfx.components.example_validator.executor import Executor as ExampleValidatorExecutor
from tfx.components.statistics_gen.executor import Executor as StatisticsGenExecutor
from tfx.dsl.components.base.base_beam_executor import BaseBeamExecutor
from tfx.types import standard_artifacts

from components.data_gate.component import DataGate
from components.data_gate.executor import Executor
from components.schema_gen.executor import Executor as SchemaGenExecutor
from dataset.format import DataError
from pipeline.execution import beam_arguments
from tests.support.cards import SYNTHETIC_CARD
from tests.support.examples import example as any_example
from tests.support.examples import examples_artifact

IMAGE = bytes(range(256)) * 12


def example(**features: Any) -> bytes:
    """A serialized tf.Example, sound but for what is given; None leaves a feature out."""
    return any_example(**{"image": IMAGE, "label": 7, "superclass": 3, **features})


SOUND = [example(label=label, superclass=label % 20) for label in range(100)]
SPLITS = {
    "sound": SOUND,
    "label_100": [*SOUND, example(label=100)],
    "too_large": [*SOUND, example(label=173, superclass=20, image=IMAGE + b"\0")],
    "too_small": [*SOUND, example(label=-4, image=IMAGE[:-1])],
    "all_short": [example(image=IMAGE[:-1])] * 5,
    "uneven": [*SOUND, example(image=[IMAGE, IMAGE]), *[example(label=None)] * 2],
    "wrong_types": [example(image=5, label=1.5)] * 5,
    "other_features": [*[example(image=None)] * 5, example(image=None, weight=1.5)],
    "empty": [],
}


class Findings(NamedTuple):
    examples: types.Artifact
    statistics: types.Artifact
    anomalies: types.Artifact


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """What StatisticsGen and ExampleValidator say about all splits, in one run."""
    root = tmp_path_factory.mktemp("data")
    examples = examples_artifact(root / "examples", SPLITS, SYNTHETIC_CARD)
    schema = standard_artifacts.Schema()
    schema.uri = str(root / "schema")
    SchemaGenExecutor().Do({"examples": [examples]}, {"schema": [schema]}, {})
    statistics = standard_artifacts.ExampleStatistics()
    statistics.uri = str(root / "statistics")
    anomalies = standard_artifacts.ExampleAnomalies()
    anomalies.uri = str(root / "anomalies")
    # Both components as pipeline/graph.py makes them: with the schema and nothing else.
    context = BaseBeamExecutor.Context(
        beam_pipeline_args=beam_arguments(workers=1), tmp_dir=str(root / "tmp"), unique_id="1"
    )
    StatisticsGenExecutor(context).Do(
        {"examples": [examples], "schema": [schema]}, {"statistics": [statistics]}, {}
    )
    ExampleValidatorExecutor().Do(
        {"statistics": [statistics], "schema": [schema]}, {"anomalies": [anomalies]}, {}
    )
    return Findings(examples, statistics, anomalies)


def gate(findings: Findings, expected_splits: Sequence[str]) -> None:
    component = DataGate(
        examples=tfx.dsl.Channel(type=standard_artifacts.Examples),
        statistics=tfx.dsl.Channel(type=standard_artifacts.ExampleStatistics),
        anomalies=tfx.dsl.Channel(type=standard_artifacts.ExampleAnomalies),
        expected_splits=expected_splits,
    )
    inputs = {key: [artifact] for key, artifact in findings._asdict().items()}
    Executor().Do(inputs, {}, component.exec_properties)


def problems(findings: Findings, expected_splits: Sequence[str]) -> list[str]:
    """The lines of the error that list a problem each."""
    with pytest.raises(DataError) as raised:
        gate(findings, expected_splits)
    first, *listing, last = str(raised.value).splitlines()
    assert first == "the data do not match the schema:"
    assert last == "Correct the data, or the schema if it is what is wrong, and run again."
    assert all(line.startswith("  - ") for line in listing)
    return [line[4:] for line in listing]


def test_sound_data_pass(findings: Findings):
    gate(findings, ["sound"])


@pytest.mark.parametrize(
    ("split", "feature", "why", "seen"),
    [
        ("label_100", "label", "large value: 100", "values from 0 to 100"),
        ("too_large", "label", "large value: 173", "values from 0 to 173"),
        ("too_large", "superclass", "large value: 20", "values from 0 to 20"),
        ("too_large", "image", "must have 3072 bytes", "3072 to 3073 bytes"),
        ("too_small", "label", "small value: -4", "values from -4 to 99"),
        ("too_small", "image", "must have 3072 bytes", "3071 to 3072 bytes"),
        ("all_short", "image", "must have 3072 bytes", "3071 to 3071 bytes"),
        ("uneven", "image", "lengths vary", "3072 to 3072 bytes"),
        (
            "uneven",
            "label",
            "fewer examples than expected",
            "values from 0 to 99, missing from 2 examples",
        ),
        ("wrong_types", "label", "type: INT but got FLOAT", "values from 1.5 to 1.5"),
        ("wrong_types", "image", "type: BYTES but got INT", "values from 5 to 5"),
        ("other_features", "image", "completely missing", "not at all"),
        (
            "other_features",
            "weight",
            "New column",
            "values from 1.5 to 1.5, missing from 5 examples",
        ),
    ],
)
def test_fault_is_named_with_split_feature_and_values(
    findings: Findings, split: str, feature: str, why: str, seen: str
):
    (problem,) = (line for line in problems(findings, [split]) if repr(feature) in line)
    assert problem.startswith(f"split {split!r}, feature {feature!r}: ")
    assert problem.endswith(f" (seen: {seen})")
    assert why in problem


def test_empty_split(findings: Findings):
    assert problems(findings, ["sound", "empty"]) == ["split 'empty' has no examples"]


def test_missing_split(findings: Findings):
    (problem,) = problems(findings, ["sound", "validation"])
    assert problem.startswith("split 'validation' is missing (there are: sound, label_100, ")


def test_all_faults_of_all_splits_are_listed(findings: Findings):
    listing = problems(findings, ["too_small", "sound", "empty"])
    assert [problem.partition(":")[0] for problem in listing] == [
        "split 'too_small', feature 'image'",
        "split 'too_small', feature 'label'",
        "split 'empty' has no examples",
    ]
