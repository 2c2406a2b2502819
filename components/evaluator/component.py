"""BaselineEvaluator: TFX's Evaluator with a baseline that may be empty."""

from __future__ import annotations

from tfx.components.evaluator import component as evaluator_component
from tfx.dsl.components.base import executor_spec

from components.evaluator import executor


class BaselineEvaluator(evaluator_component.Evaluator):
    """TFX's Evaluator; same arguments and outputs.

    Where `baseline_model` is an artifact without a model (the first run of a pipeline, see
    `components.baseline`), change thresholds are ignored, as Evaluator does without a baseline.
    """

    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(executor.Executor)
