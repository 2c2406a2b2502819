"""Executor of Baseline."""

from __future__ import annotations

import json
import os
from typing import Any

from absl import logging
from tfx import types
from tfx.dsl.components.base import base_executor
from tfx.dsl.io import fileio
from tfx.types import artifact_utils
from tfx.utils import io_utils, path_utils

from components import models

MODEL_KEY = "model"
BASELINE_KEY = "baseline"
SERVING_DIR_KEY = "serving_dir"
VERSION_KEY = "baseline_version"
VERSION_PROPERTY = "version"
MEASURED_KEY = MEASURED_PROPERTY = "measured_versions"


def find_baseline(serving_dir: str, candidates: list[types.Artifact]) -> str:
    """Finds the newest pushed version that is another model than the candidate.

    The candidate itself is passed over, so that a run that is repeated after its model was pushed
    compares the same two models again.

    Args:
      serving_dir: A TF Serving model base path.
      candidates: The Model artifact to be compared, or none.

    Returns:
      The name of the version's folder; empty when there is none.
    """
    for version in reversed(models.versions(serving_dir)):
        folder = os.path.join(serving_dir, version)
        if not any(models.is_same_model(folder, candidate) for candidate in candidates):
            return version
    return ""


def find_measured(serving_dir: str, candidates: list[types.Artifact]) -> str:
    """Finds what was measured of the versions that were pushed.

    Args:
      serving_dir: A TF Serving model base path.
      candidates: As for `find_baseline`; versions that are copies of it do not count.

    Returns:
      A JSON list: of each version that has it, the oldest first, Evaluator's `Measured`.
    """
    found = []
    for version in models.versions(serving_dir):
        folder = os.path.join(serving_dir, version)
        if not any(models.is_same_model(folder, candidate) for candidate in candidates):
            measured = models.read_json(os.path.join(folder, models.MEASURED_FILE))
            if isinstance(measured, dict):
                found.append({**measured, "version": version})
    return json.dumps(found)


class Executor(base_executor.BaseExecutor):
    """Copies the last pushed model, which was blessed or would not have been pushed."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See base class."""
        self._log_startup(input_dict, output_dict, exec_properties)
        baseline = artifact_utils.get_single_instance(output_dict[BASELINE_KEY])
        # An orchestrator expects the folder of an output to exist, with or without a model.
        fileio.makedirs(baseline.uri)
        serving_dir = exec_properties[SERVING_DIR_KEY]
        version = exec_properties.get(VERSION_KEY)
        if version is None:  # no driver has run
            version = find_baseline(serving_dir, input_dict.get(MODEL_KEY, []))
        measured = exec_properties.get(MEASURED_KEY)
        if measured is None:
            measured = find_measured(serving_dir, input_dict.get(MODEL_KEY, []))
        if not version:
            logging.info("No other model was pushed to %s yet: no baseline.", serving_dir)
            return
        # A copy: the artifact stays readable when its version is rolled back or removed.
        io_utils.copy_dir(
            os.path.join(serving_dir, version), path_utils.serving_model_dir(baseline.uri)
        )
        baseline.set_string_custom_property(VERSION_PROPERTY, version)
        baseline.set_string_custom_property(MEASURED_PROPERTY, measured)
        logging.info("The baseline is version %s of %s.", version, serving_dir)
