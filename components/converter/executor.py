"""Executor of Converter."""

from __future__ import annotations

import json
import logging as python_logging
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import tensorflow as tf
from absl import logging
from tfx import types
from tfx.dsl.components.base import base_executor
from tfx.types import artifact_utils, standard_component_specs
from tfx.utils import io_utils, path_utils

from components import examples
from components.converter import conversion, formats
from components.converter.saved_model import PixelsToProbabilities
from serving.quiet import held_stderr

EXPORTS_KEY = "exports"
FORMATS_KEY = "formats"
SPLIT_KEY = "split"
REPRESENTATIVE_SPLIT_KEY = "representative_split"

_TEST_IMAGES = 1000
# 1,000 made no difference to the agreement.
_REPRESENTATIVE_IMAGES = 200


class Executor(base_executor.BaseExecutor):
    """Converts the model, compares the results with it, and keeps those that agree.

    A file that does not is refused, not an error: as with a model that is not blessed, the report
    says why, and the rest goes on.
    """

    def Do(
        self,
        input_dict: dict[str, list[types.Artifact]],
        output_dict: dict[str, list[types.Artifact]],
        exec_properties: dict[str, Any],
    ) -> None:
        """See base class.

        Raises:
          MissingPackagesError: A format's packages are not installed.
          ExamplesError: A split is empty.
          ConversionError: The model cannot be converted.
        """
        self._log_startup(input_dict, output_dict, exec_properties)
        model = artifact_utils.get_single_instance(input_dict[standard_component_specs.MODEL_KEY])
        data = artifact_utils.get_single_instance(input_dict[standard_component_specs.EXAMPLES_KEY])
        exports = artifact_utils.get_single_instance(output_dict[EXPORTS_KEY])
        names = formats.parse(exec_properties[FORMATS_KEY])
        formats.check_installed(names)
        tested = examples.read(data, exec_properties[SPLIT_KEY], _TEST_IMAGES)
        split = exec_properties[REPRESENTATIVE_SPLIT_KEY]
        represented = examples.read(data, split, _REPRESENTATIVE_IMAGES)
        # The converters write to the standard error whatever the log level is.
        shown = tf.get_logger().isEnabledFor(python_logging.INFO)
        with (
            tempfile.TemporaryDirectory(prefix="converter-") as work,
            nullcontext() if shown else held_stderr(),
        ):
            _convert(
                path_utils.serving_model_dir(model.uri),
                names,
                tested=tested,
                represented=represented,
                data=data,
                output=Path(work),
            )
            io_utils.copy_dir(work, exports.uri)


def _convert(
    model_dir: str,
    names: tuple[str, ...],
    *,
    tested: list[bytes],
    represented: list[bytes],
    data: types.Artifact,
    output: Path,
) -> None:
    card = examples.read_card(data)
    model = PixelsToProbabilities(model_dir)
    pixels = examples.images(tested, card, data.uri)
    reference = conversion.Reference(
        pixels=pixels,
        labels=examples.labels(tested),
        expected=conversion.answers(model, pixels),
    )
    results = []
    for made, content, predict in conversion.convert(
        model, names, examples.images(represented, card, data.uri), card.classes
    ):
        result = conversion.measure(made, content, predict, reference)
        results.append(result)
        if result.problem:
            logging.warning("%s is refused: it %s.", made.name, result.problem)
        else:
            (output / made.name).write_bytes(content)
    (output / formats.LABELS_FILE).write_text("\n".join(card.classes) + "\n")
    report = {
        "images": len(pixels),
        "top_1_accuracy": conversion.top_1_accuracy(reference.expected, reference.labels),
        "files": [result.to_json() for result in results],
    }
    (output / formats.REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
