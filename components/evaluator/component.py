"""BaselineEvaluator: TFX's Evaluator for any number of classes, with or without a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow_model_analysis as tfma
from tfx import types
from tfx.components.evaluator import component as evaluator_component
from tfx.dsl.components.base import base_beam_component, executor_spec
from tfx.types import component_spec, standard_artifacts, standard_component_specs
from tfx.utils import json_utils

from components.code import CODE_KEY, fingerprint
from components.evaluator import executor


class BaselineEvaluatorSpec(standard_component_specs.EvaluatorSpec):
    """Evaluator's specification and the code behind it."""

    PARAMETERS = {
        **standard_component_specs.EvaluatorSpec.PARAMETERS,
        CODE_KEY: component_spec.ExecutionParameter(type=str),
    }


class BaselineEvaluator(evaluator_component.Evaluator):
    """TFX's Evaluator; same outputs.

    Where `baseline_model` is an artifact without a model (the first run of a pipeline, see
    `components.baseline`), change thresholds are ignored, as Evaluator does without a baseline.
    What a data set has too few or too many classes for is left out (see `executor`).
    """

    SPEC_CLASS = BaselineEvaluatorSpec
    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(executor.Executor)

    def __init__(
        self,
        *,
        examples: types.BaseChannel,
        example_splits: Sequence[str],
        model: types.BaseChannel,
        baseline_model: types.BaseChannel,
        eval_config: tfma.EvalConfig,
    ):
        """Constructs the component.

        Args:
          examples: ExampleGen's output.
          example_splits: Which of them to evaluate on.
          model: Trainer's output.
          baseline_model: Baseline's output.
          eval_config: Metrics, slices and thresholds.
        """
        spec = BaselineEvaluatorSpec(
            examples=examples,
            model=model,
            baseline_model=baseline_model,
            eval_config=eval_config,
            example_splits=json_utils.dumps(list(example_splits)),
            evaluation=types.Channel(type=standard_artifacts.ModelEvaluation),
            blessing=types.Channel(type=standard_artifacts.ModelBlessing),
            code=fingerprint(__package__),
        )
        # Past Evaluator's constructor, which builds its own specification.
        base_beam_component.BaseBeamComponent.__init__(self, spec=spec)
