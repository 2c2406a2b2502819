"""Baseline: the last blessed model, in every orchestrator."""

from __future__ import annotations

from tfx import types
from tfx.dsl.components.base import base_component, executor_spec
from tfx.types import component_spec, standard_artifacts

from components.baseline import driver, executor
from components.code import CODE_KEY, fingerprint


class BaselineSpec(component_spec.ComponentSpec):
    """Specification of `Baseline`."""

    PARAMETERS = {
        executor.SERVING_DIR_KEY: component_spec.ExecutionParameter(type=str),
        executor.VERSION_KEY: component_spec.ExecutionParameter(type=str, optional=True),
        CODE_KEY: component_spec.ExecutionParameter(type=str),
        executor.MEASURED_KEY: component_spec.ExecutionParameter(type=str, optional=True),
    }
    INPUTS = {
        executor.MODEL_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.Model, optional=True
        )
    }
    OUTPUTS = {
        executor.BASELINE_KEY: component_spec.ChannelParameter(type=standard_artifacts.Model)
    }


class Baseline(base_component.BaseComponent):
    """Finds the model that is being served now, for Evaluator to compare with or to train on from.

    It does what a Resolver with LatestBlessedModelStrategy would, without a Resolver node, which
    open-source Kubeflow Pipelines cannot run. Only blessed models are pushed, so the last pushed
    model is the last blessed one. The output artifact is empty when no other model than the
    candidate was pushed yet.
    """

    SPEC_CLASS = BaselineSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(executor.Executor)
    DRIVER_CLASS = driver.Driver

    def __init__(self, serving_dir: str, model: types.BaseChannel | None = None):
        """Constructs the component.

        Args:
          serving_dir: Pusher's base directory.
          model: The candidate, which may have been pushed by an earlier run and is then not its
            own baseline. None before there is one: the last pushed model, whatever it is.
        """
        super().__init__(
            spec=BaselineSpec(
                serving_dir=serving_dir,
                model=model,
                code=fingerprint(__package__),
                baseline=types.Channel(type=standard_artifacts.Model),
            )
        )
