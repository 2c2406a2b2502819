"""CuratedSchemaGen: the repository's schema as an artifact."""

from __future__ import annotations

from google.protobuf import text_format
from tensorflow_metadata.proto.v0 import schema_pb2
from tfx import types
from tfx.dsl.components.base import base_component, executor_spec
from tfx.dsl.io import fileio
from tfx.types import component_spec, standard_artifacts, standard_component_specs

from components.schema_gen import executor


class CuratedSchemaGenSpec(component_spec.ComponentSpec):
    """Specification of `CuratedSchemaGen`."""

    PARAMETERS = {executor.SCHEMA_TEXT_KEY: component_spec.ExecutionParameter(type=str)}
    INPUTS: dict[str, component_spec.ChannelParameter] = {}
    OUTPUTS = {
        standard_component_specs.SCHEMA_KEY: component_spec.ChannelParameter(
            type=standard_artifacts.Schema
        )
    }


class CuratedSchemaGen(base_component.BaseComponent):
    """What TFX's ImportSchemaGen does, with the schema in place of its path.

    ImportSchemaGen reads the file when it runs, which may be on another machine, and has the path
    in its cache key and not what the file holds: an edited schema would be ignored for as long as
    the old one is in the cache. Here the schema is read when the pipeline is built; comments and
    formatting do not count.
    """

    SPEC_CLASS = CuratedSchemaGenSpec
    EXECUTOR_SPEC = executor_spec.ExecutorClassSpec(executor.Executor)

    def __init__(self, schema_file: str):
        """Constructs the component.

        Args:
          schema_file: A Schema as a text proto.

        Raises:
          google.protobuf.text_format.ParseError: It is not one.
        """
        with fileio.open(schema_file, "r") as file:
            schema = text_format.Parse(file.read(), schema_pb2.Schema())
        super().__init__(
            spec=CuratedSchemaGenSpec(
                schema_text=text_format.MessageToString(schema),
                schema=types.Channel(type=standard_artifacts.Schema),
            )
        )
