"""The gate on real statistics and anomalies: each split below has faults of its own."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import tensorflow as tf
from tfx import types
from tfx import v1 as tfx
from tfx.components.example_validator.executor import Executor as ExampleValidatorExecutor
from tfx.components.statistics_gen.executor import Executor as StatisticsGenExecutor
from tfx.dsl.components.base.base_beam_executor import BaseBeamExecutor
from tfx.types import artifact_utils, standard_artifacts

from components.data_gate.component import DataGate
from components.data_gate.executor import Executor
from dataset.format import DataError
from pipeline.execution import beam_arguments
from pipeline.graph import SCHEMA_FILE

IMAGE = bytes(range(256)) * 12


def example(**features: int | float | bytes | list[bytes] | None) -> bytes:
    """A serialized tf.Example, sound but for what is given; None leaves a feature out."""
    message = tf.train.Example()
    for name, value in {"image": IMAGE, "label": 7, "superclass": 3, **features}.items():
        feature = message.features.feature[name]
        if value is None:
            del message.features.feature[name]
        elif isinstance(value, float):
            feature.float_list.value.append(value)
        elif isinstance(value, int):
            feature.int64_list.value.append(value)
        else:
            feature.bytes_list.value.extend(value if isinstance(value, list) else [value])
    return message.SerializeToString()


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
    statistics: types.Artifact
    anomalies: types.Artifact


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """What StatisticsGen and ExampleValidator say about all splits, in one run."""
    root = tmp_path_factory.mktemp("data")
    examples = standard_artifacts.Examples()
    examples.uri = str(root / "examples")
    examples.split_names = artifact_utils.encode_split_names(list(SPLITS))
    options = tf.io.TFRecordOptions(compression_type="GZIP")
    for split, rows in SPLITS.items():
        folder = Path(examples.uri, f"Split-{split}")
        folder.mkdir(parents=True)
        with tf.io.TFRecordWriter(str(folder / "data.gz"), options) as writer:
            for row in rows:
                writer.write(row)
    schema = standard_artifacts.Schema()
    schema.uri = str(root / "schema")
    Path(schema.uri).mkdir()
    shutil.copy(SCHEMA_FILE, schema.uri)
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
    return Findings(statistics, anomalies)


def gate(findings: Findings, expected_splits: Sequence[str]) -> None:
    component = DataGate(
        statistics=tfx.dsl.Channel(type=standard_artifacts.ExampleStatistics),
        anomalies=tfx.dsl.Channel(type=standard_artifacts.ExampleAnomalies),
        expected_splits=expected_splits,
        byte_lengths={"image": 3072},
    )
    inputs = {"statistics": [findings.statistics], "anomalies": [findings.anomalies]}
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
        "split 'too_small', feature 'label'",
        "split 'too_small', feature 'image'",
        "split 'empty' has no examples",
    ]
