"""DataGate: no training on data that the schema refuses."""

from __future__ import annotations

from collections.abc import Sequence

from tfx import types
from tfx.dsl.components.base import base_component, executor_spec
from tfx.types import component_spec, standard_artifacts, standard_component_specs
from tfx.utils import json_utils

from components.code import CODE_KEY, fingerprint
from components.data_gate import executor


class DataGateSpec(component_spec.ComponentSpec):
    """Specification of `DataGate`."""

    PARAMETERS = {
        executor.EXPECTED_SPLITS_KEY: component_spec.ExecutionParameter(type=str),
        CODE_KEY: component_spec.ExecutionParameter(type=str),
    }
    INPUTS = {
        standard_component_specs.EXAMPLES_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.Examples
        ),
        standard_component_specs.STATISTICS_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.ExampleStatistics
        ),
        standard_component_specs.ANOMALIES_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.ExampleAnomalies
        ),
    }
    OUTPUTS: dict[str, component_spec.ChannelParameter] = {}


class DataGate(base_component.BaseComponent):
    """Fails when ExampleValidator found anomalies or a split is missing or empty.

    ExampleValidator only writes down what it finds. Make Transform depend on this component with
    `transform.add_upstream_node(gate)` so that nothing is trained on data that do not match the
    schema.
    """

    SPEC_CLASS = DataGateSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(executor.Executor)

    def __init__(
        self,
        examples: types.BaseChannel,
        statistics: types.BaseChannel,
        anomalies: types.BaseChannel,
        expected_splits: Sequence[str],
    ):
        """Constructs the component.

        Args:
          examples: ExampleGen's output.
          statistics: StatisticsGen's output.
          anomalies: ExampleValidator's output.
          expected_splits: Splits that must be there, with at least one example each.
        """
        super().__init__(
            spec=DataGateSpec(
                examples=examples,
                statistics=statistics,
                anomalies=anomalies,
                expected_splits=json_utils.dumps(list(expected_splits)),
                code=fingerprint(__package__),
            )
        )
