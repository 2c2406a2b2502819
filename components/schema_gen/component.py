"""CardSchemaGen: the schema that follows from the data set's card, as an artifact."""

from __future__ import annotations

from tfx import types
from tfx.dsl.components.base import base_component, executor_spec
from tfx.types import component_spec, standard_artifacts, standard_component_specs

from components.code import CODE_KEY, fingerprint
from components.schema_gen import executor


class CardSchemaGenSpec(component_spec.ComponentSpec):
    """Specification of `CardSchemaGen`."""

    PARAMETERS = {CODE_KEY: component_spec.ExecutionParameter(type=str)}
    INPUTS = {
        standard_component_specs.EXAMPLES_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.Examples
        )
    }
    OUTPUTS = {
        standard_component_specs.SCHEMA_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.Schema
        )
    }


class CardSchemaGen(base_component.BaseComponent):
    """Says what every example must look like, from the card rather than from the examples.

    TFX's SchemaGen infers a schema from statistics, which accepts whatever is in the data.
    """

    SPEC_CLASS = CardSchemaGenSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(executor.Executor)

    def __init__(self, examples: types.BaseChannel):
        """Constructs the component.

        Args:
          examples: ExampleGen's output.
        """
        super().__init__(
            spec=CardSchemaGenSpec(
                examples=examples,
                code=fingerprint(__package__),
                schema=types.Channel(type=standard_artifacts.Schema),
            )
        )
