"""What Evaluator has measured, read from its output."""

from __future__ import annotations

import tensorflow_model_analysis as tfma

Slice = tuple[str, "int | None"]
Metrics = dict[str, float]


def accuracies(evaluation_uri: str, slice_key: str | None = None) -> dict[Slice, Metrics]:
    """Reads the metrics of one kind of slice.

    Args:
      evaluation_uri: Evaluator's output.
      slice_key: `superclass` or `label`; None for the whole test split.

    Returns:
      (model name, label) -> metric name -> value. The model is tfma.CANDIDATE_KEY or
      tfma.BASELINE_KEY; the label is None for the whole split.
    """
    result: dict[Slice, Metrics] = {}
    for metrics in tfma.load_metrics(evaluation_uri):
        keys = {key.column: key.int64_value for key in metrics.slice_key.single_slice_keys}
        if list(keys) != ([slice_key] if slice_key else []):
            continue
        for item in metrics.metric_keys_and_values:
            if item.value.HasField("double_value") and not item.key.is_diff:
                model = item.key.model_name or tfma.CANDIDATE_KEY
                values = result.setdefault((model, keys.get(slice_key)), {})
                values[item.key.name] = item.value.double_value.value
    return result
