"""Executor of DataGate."""

from __future__ import annotations

import os
from typing import Any

import tensorflow_data_validation as tfdv
from tensorflow_metadata.proto.v0 import anomalies_pb2, statistics_pb2
from tfx import types
from tfx.dsl.components.base import base_executor
from tfx.dsl.io import fileio
from tfx.types import artifact_utils, standard_component_specs
from tfx.utils import json_utils

from components import examples
from dataset.format import DataError

EXPECTED_SPLITS_KEY = "expected_splits"
_STATISTICS_FILE = "FeatureStats.pb"
_ANOMALIES_FILE = "SchemaDiff.pb"


def find_problems(
    split: str,
    statistics: statistics_pb2.DatasetFeatureStatisticsList,
    anomalies: anomalies_pb2.Anomalies,
    image_bytes: int,
) -> list[str]:
    """Says what is wrong with a split, each with the feature and the values that were seen.

    Args:
      split: The split's name, for the messages.
      statistics: What StatisticsGen computed for it.
      anomalies: What ExampleValidator found in it.
      image_bytes: How many each image must have, which a schema cannot express. The statistics
        must be of a schema that gives `image` an image domain.

    Returns:
      One sentence for each problem; empty when there is none.
    """
    dataset = statistics.datasets[0]
    if not dataset.num_examples:
        return [f"split {split!r} has no examples"]
    features = {feature.path.step[0]: feature for feature in dataset.features}
    reasons = {
        name: [reason.description for reason in info.reason] or [info.description]
        for name, info in anomalies.anomaly_info.items()
    }
    lengths = features["image"].bytes_stats if "image" in features else None
    if lengths and not lengths.min_num_bytes == lengths.max_num_bytes == image_bytes:
        reasons.setdefault("image", []).append(f"values must have {image_bytes} bytes")
    problems = []
    if anomalies.HasField("dataset_anomaly_info"):
        problems.append(f"split {split!r}: {anomalies.dataset_anomaly_info.description}")
    for name, why in sorted(reasons.items()):
        seen = _describe(features[name]) if name in features else "not at all"
        text = "; ".join(reason.rstrip(".") for reason in dict.fromkeys(why))
        problems.append(f"split {split!r}, feature {name!r}: {text} (seen: {seen})")
    return problems


def _describe(feature: statistics_pb2.FeatureNameStatistics) -> str:
    """Summarises the values of a feature, and how many examples lack it."""
    kind = feature.WhichOneof("stats")
    missing = getattr(feature, kind).common_stats.num_missing
    return _describe_values(feature) + (f", missing from {missing} examples" if missing else "")


def _describe_values(feature: statistics_pb2.FeatureNameStatistics) -> str:
    if feature.HasField("num_stats"):
        return f"values from {feature.num_stats.min:g} to {feature.num_stats.max:g}"
    if feature.HasField("bytes_stats"):
        stats = feature.bytes_stats
        return f"{stats.min_num_bytes:.0f} to {stats.max_num_bytes:.0f} bytes"
    strings = feature.string_stats
    buckets = strings.rank_histogram.buckets
    # Categorical integers are counted as strings: all of them, while there are not too many.
    if feature.type == feature.INT and len(buckets) == strings.unique:
        values = [int(bucket.label) for bucket in buckets]
        return f"values from {min(values)} to {max(values)}"
    return "values such as " + ", ".join(value.value for value in strings.top_values[:3])


class Executor(base_executor.BaseExecutor):
    """Raises when a split is missing or has anomalies."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See base class.

        Raises:
          DataError: With all problems of all splits.
        """
        self._log_startup(input_dict, output_dict, exec_properties)
        statistics = artifact_utils.get_single_instance(
            input_dict[standard_component_specs.STATISTICS_KEY]
        )
        anomalies = artifact_utils.get_single_instance(
            input_dict[standard_component_specs.ANOMALIES_KEY]
        )
        data = artifact_utils.get_single_instance(input_dict[standard_component_specs.EXAMPLES_KEY])
        image_bytes = examples.read_card(data).image_bytes
        splits = artifact_utils.decode_split_names(statistics.split_names)
        problems = []
        for split in json_utils.loads(exec_properties[EXPECTED_SPLITS_KEY]):
            if split not in splits:
                problems.append(f"split {split!r} is missing (there are: {', '.join(splits)})")
                continue
            problems += find_problems(
                split,
                tfdv.load_stats_binary(
                    os.path.join(_split_uri(statistics, split), _STATISTICS_FILE)
                ),
                _load_anomalies(os.path.join(_split_uri(anomalies, split), _ANOMALIES_FILE)),
                image_bytes,
            )
        if problems:
            listing = "\n".join(f"  - {problem}" for problem in problems)
            raise DataError(
                f"the data do not match the schema:\n{listing}\n"
                "Correct the data, or the schema if it is what is wrong, and run again."
            )


def _split_uri(artifact: types.Artifact, split: str) -> str:
    return artifact_utils.get_split_uri([artifact], split)


def _load_anomalies(path: str) -> anomalies_pb2.Anomalies:
    anomalies = anomalies_pb2.Anomalies()
    with fileio.open(path, "rb") as file:
        anomalies.ParseFromString(file.read())
    return anomalies
