"""Executor of BaselineEvaluator."""

from __future__ import annotations

from typing import Any

from tfx import types
from tfx.components.evaluator import executor as evaluator_executor
from tfx.types import standard_component_specs

from components import models


class Executor(evaluator_executor.Executor):
    """Evaluates alone where the baseline artifact holds no model."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See base class."""
        key = standard_component_specs.BASELINE_MODEL_KEY
        baselines = [artifact for artifact in input_dict.get(key, []) if models.has_model(artifact)]
        super().Do({**input_dict, key: baselines}, output_dict, exec_properties)
