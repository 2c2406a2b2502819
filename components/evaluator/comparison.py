"""The comparison with earlier models, where the noise of the test says how far one may be below."""

from __future__ import annotations

import dataclasses
import json
import os

import tensorflow_model_analysis as tfma
from tfx import types
from tfx.components.evaluator import constants
from tfx.dsl.io import fileio
from tfx.utils import io_utils

from components.baseline.executor import MEASURED_PROPERTY, VERSION_PROPERTY
from components.evaluator import drop
from components.evaluator.results import Metrics, accuracies


def judge(
    evaluation_uri: str,
    blessing: types.Artifact,
    baseline: types.Artifact | None,
    config: tfma.EvalConfig,
    data: str,
) -> None:
    """Tells Pusher what was measured; takes a blessing back that TFMA should not have given.

    TFMA compares with a number alone. Where the allowed drop is `drop.AUTO`, which it never
    refuses, the comparison is made here.

    Args:
      evaluation_uri: Evaluator's output.
      blessing: Its other one; changed.
      baseline: Baseline's output if it holds a model.
      config: What was measured.
      data: Fingerprint of the data.
    """
    overall = accuracies(evaluation_uri)
    candidate = _measured(overall[tfma.CANDIDATE_KEY, None], data)
    blessing.set_string_custom_property(
        drop.MEASURED_PROPERTY, json.dumps(dataclasses.asdict(candidate))
    )
    version = baseline.get_string_custom_property(VERSION_PROPERTY) if baseline else ""
    blessing.set_string_custom_property(drop.COMPARED_PROPERTY, version)
    metrics = _metrics_compared_by_noise(config)
    if baseline is None or not metrics:
        return
    pushed = json.loads(baseline.get_string_custom_property(MEASURED_PROPERTY) or "[]")
    comparisons = drop.compare(
        candidate,
        _measured(overall[tfma.BASELINE_KEY, None], data),
        filter(None, map(drop.Measured.from_json, pushed)),
        metrics,
    )
    io_utils.write_string_file(
        os.path.join(evaluation_uri, drop.COMPARISON_FILE),
        json.dumps([dataclasses.asdict(comparison) for comparison in comparisons], indent=1),
    )
    blessed = os.path.join(blessing.uri, constants.BLESSED_FILE_NAME)
    if any(comparison.refused for comparison in comparisons) and fileio.exists(blessed):
        fileio.remove(blessed)
        io_utils.write_string_file(os.path.join(blessing.uri, constants.NOT_BLESSED_FILE_NAME), "")
        blessing.set_int_custom_property(
            constants.ARTIFACT_PROPERTY_BLESSED_KEY, constants.NOT_BLESSED_VALUE
        )


def _metrics_compared_by_noise(config: tfma.EvalConfig) -> list[str]:
    return [
        json.loads(metric.config)["name"]
        for specification in config.metrics_specs
        for metric in specification.metrics
        for per_slice in metric.per_slice_thresholds
        if per_slice.threshold.change_threshold.absolute.value == -drop.AUTO
    ]


def _measured(metrics: Metrics, data: str) -> drop.Measured:
    fractions = {name: value for name, value in metrics.items() if 0 <= value <= 1}
    return drop.Measured(fractions, int(metrics["example_count"]), data)
