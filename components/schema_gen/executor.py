"""Executor of CuratedSchemaGen."""

from __future__ import annotations

import os
from typing import Any

from tfx import types
from tfx.dsl.components.base import base_executor
from tfx.dsl.io import fileio
from tfx.types import artifact_utils, standard_component_specs

SCHEMA_TEXT_KEY = "schema_text"
# Where TFX's components look for a schema.
_SCHEMA_FILE = "schema.pbtxt"


class Executor(base_executor.BaseExecutor):
    """Writes the schema that it is given."""

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See base class."""
        self._log_startup(input_dict, output_dict, exec_properties)
        uri = artifact_utils.get_single_uri(output_dict[standard_component_specs.SCHEMA_KEY])
        fileio.makedirs(uri)
        with fileio.open(os.path.join(uri, _SCHEMA_FILE), "w") as file:
            file.write(exec_properties[SCHEMA_TEXT_KEY])
