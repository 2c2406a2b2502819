"""Executor of BaselineEvaluator."""

from __future__ import annotations

import json
from typing import Any

import tensorflow_model_analysis as tfma
from google.protobuf import json_format
from tfx import types
from tfx.components.evaluator import executor as evaluator_executor
from tfx.types import artifact_utils, standard_component_specs

from components import examples, models
from components.evaluator import comparison
from dataset.card import DataCard

# The counts of N x N pairs of classes are kept in memory while the examples are read.
_MAX_CONFUSION_CLASSES = 1000


class Executor(evaluator_executor.Executor):
    """Fits the configuration to the data set's card, and evaluates alone without a baseline.

    With a baseline, see `comparison` for what is allowed below it.
    """

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
        data = artifact_utils.get_single_instance(input_dict[standard_component_specs.EXAMPLES_KEY])
        key = standard_component_specs.EVAL_CONFIG_KEY
        config = json_format.Parse(exec_properties[key], tfma.EvalConfig())
        card = examples.read_card(data)
        fit_to_card(config, card)
        properties = {**exec_properties, key: json_format.MessageToJson(config)}

        key = standard_component_specs.BASELINE_MODEL_KEY
        baselines = [artifact for artifact in input_dict.get(key, []) if models.has_model(artifact)]
        super().Do({**input_dict, key: baselines}, output_dict, properties)
        comparison.judge(
            artifact_utils.get_single_uri(output_dict[standard_component_specs.EVALUATION_KEY]),
            artifact_utils.get_single_instance(output_dict[standard_component_specs.BLESSING_KEY]),
            baselines[0] if baselines else None,
            config,
            card.source.fingerprint,
        )


def fit_to_card(config: tfma.EvalConfig, card: DataCard) -> None:
    """Leaves out of a configuration what a data set has too few or too many classes for.

    A top-k accuracy counts all classes where there are fewer than k; there are no slices by
    superclass without superclasses, and no confusion matrix of more than 1,000 classes.

    Args:
      config: Of any data set; changed in place.
      card: This data set's.
    """
    for specification in config.metrics_specs:
        for metric in specification.metrics:
            options = json.loads(metric.config or "{}")
            if "k" in options:
                metric.config = json.dumps({**options, "k": min(options["k"], card.num_classes)})
        if card.num_classes > _MAX_CONFUSION_CLASSES:
            kept = [item for item in specification.metrics if "Confusion" not in item.class_name]
            del specification.metrics[:]
            specification.metrics.extend(kept)
    if card.superclasses is None:
        slices = [item for item in config.slicing_specs if "superclass" not in item.feature_keys]
        del config.slicing_specs[:]
        config.slicing_specs.extend(slices)
