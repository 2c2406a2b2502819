"""Executor of CardSchemaGen."""

from __future__ import annotations

import os
from typing import Any

from google.protobuf import text_format
from tensorflow_metadata.proto.v0 import schema_pb2
from tfx import types
from tfx.dsl.components.base import base_executor
from tfx.dsl.io import fileio
from tfx.types import artifact_utils, standard_component_specs

from components import examples
from dataset.card import DataCard

# Where TFX's components look for a schema.
_SCHEMA_FILE = "schema.pbtxt"


def make_schema(card: DataCard) -> schema_pb2.Schema:
    """Makes the schema of a data set: each example has one image and its labels.

    Args:
      card: The data set's.
    """
    schema = schema_pb2.Schema()
    image = _add(schema, "image", schema_pb2.BYTES)
    # Makes StatisticsGen count lengths rather than values. A schema can set only an upper bound on
    # them: components/data_gate checks that they are exactly so.
    image.image_domain.max_image_byte_size = card.image_bytes
    counts = {"label": card.num_classes}
    if card.superclasses:
        counts["superclass"] = len(card.superclasses.names)
    for name, count in counts.items():
        domain = _add(schema, name, schema_pb2.INT).int_domain
        domain.name, domain.is_categorical = name, True
        domain.min, domain.max = 0, count - 1
    return schema


def _add(schema: schema_pb2.Schema, name: str, kind: int) -> schema_pb2.Feature:
    feature = schema.feature.add(name=name, type=kind)
    feature.presence.min_fraction, feature.presence.min_count = 1.0, 1
    feature.shape.SetInParent()  # a scalar
    return feature


class Executor(base_executor.BaseExecutor):
    """Reads the card beside the examples and writes the schema."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See base class.

        Raises:
          DataError: The examples have no data card that can be read.
        """
        self._log_startup(input_dict, output_dict, exec_properties)
        data = artifact_utils.get_single_instance(input_dict[standard_component_specs.EXAMPLES_KEY])
        uri = artifact_utils.get_single_uri(output_dict[standard_component_specs.SCHEMA_KEY])
        fileio.makedirs(uri)
        with fileio.open(os.path.join(uri, _SCHEMA_FILE), "w") as file:
            file.write(text_format.MessageToString(make_schema(examples.read_card(data))))
