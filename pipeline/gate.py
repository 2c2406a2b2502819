"""What a model must reach to be pushed: the metrics of the gate, by name, in one place.

A metric is one line in `METRICS`. From it follow Evaluator's configuration, the flag and the
pipeline parameter of its threshold, and its place in the summary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GateMetric:
    """A metric with a threshold.

    Attributes:
      name: In Evaluator's results; where training measures it, too, as in Keras's history.
      label: For people.
      class_name: Of Keras's or of TFMA's metrics.
      config: Arguments of that class, besides the name.
      floor: Lowest value, a fraction, for presets that have none of their own.
      at_least: A metric whose every hit is a hit of this one: its floor lifts this one's.
      compared: Whether it must not fall below the model pushed last, either.
      by: A feature, if the thresholds are for the slice of each of its values; empty for the whole
        test split.
    """

    name: str
    label: str
    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    floor: float = 0.0
    at_least: str = ""
    compared: bool = True
    by: str = ""

    @property
    def flag(self) -> str:
        """Name of the flag, and of the pipeline parameter, for the floor."""
        return f"min_{self.name}"


TOP_1 = "top_1_accuracy"
TOP_5 = "top_5_accuracy"

# How many classes the data have for which presets state their floors: CIFAR-100.
PRESET_CLASSES = 100

METRICS = (
    GateMetric(TOP_1, "top-1", "SparseCategoricalAccuracy"),
    GateMetric(TOP_5, "top-5", "SparseTopKCategoricalAccuracy", {"k": 5}, at_least=TOP_1),
)


@dataclass(frozen=True)
class Gate:
    """What a model must reach on the test split to be pushed.

    Args:
      floors: Lowest value of each of `METRICS`, by name, a fraction.
      max_accuracy_drop: How far those that are compared may fall below the baseline's, a fraction.
    """

    floors: Mapping[str, float]
    max_accuracy_drop: float = 0.0


def above_chance(metric: GateMetric, floor: float, classes: int) -> float:
    """Carries a floor over to another number of classes, as a margin above chance.

    Args:
      metric: The floor's.
      floor: For the 100 classes that presets are made for.
      classes: Of the data.

    Returns:
      A floor as far on the way from chance to 1; none (0) where the metric is 1 whatever the model.
    """
    hits = metric.config.get("k", 1)
    chance, usual = hits / classes, hits / PRESET_CLASSES
    if chance >= 1.0 or not floor:
        return 0.0
    return round(chance + (floor - usual) / (1.0 - usual) * (1.0 - chance), 4)


def resolve_floors(
    preset: Mapping[str, float], given: Mapping[str, float | None], classes: int
) -> dict[str, float]:
    """Merges the floors of a preset with those that were asked for.

    Args:
      preset: By the name of a metric, for `PRESET_CLASSES` classes.
      given: Those asked for, for the data as they are; None where it was not.
      classes: Of the data.

    Returns:
      A floor for each of `METRICS`.

    Raises:
      ValueError: Two floors contradict each other, or the preset has one for an unknown metric.
    """
    if unknown := preset.keys() - {metric.name for metric in METRICS}:
        raise ValueError(f"the preset has floors for {sorted(unknown)}, which the gate has not.")
    floors: dict[str, float] = {}
    for metric in METRICS:
        other = floors.get(metric.at_least, 0.0)
        asked = given.get(metric.name)
        if asked is not None and asked < other:
            raise ValueError(
                f"{metric.flag} {asked} is below min_{metric.at_least} {other}, whose every hit "
                f"is a hit here, too: raise it to at least {other}."
            )
        own = above_chance(metric, preset.get(metric.name, metric.floor), classes)
        floors[metric.name] = max(own, other) if asked is None else asked
    return floors
