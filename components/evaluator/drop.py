"""How far a model may fall below those that were pushed before it, by what the test can tell.

Cheap to import: the command line is checked with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Of the blessing, for Pusher: what was measured, and the version that it was compared with.
MEASURED_PROPERTY = "measured"
COMPARED_PROPERTY = "compared_with"
# In the evaluation: how the model compares with earlier ones, where the test's noise is allowed.
COMPARISON_FILE = "comparison.json"

# As an allowed drop, which is a fraction otherwise: one standard error of the difference. A number,
# since it takes the place of one in Evaluator's configuration and in pipelines' parameters.
AUTO = 2.0
# How far below the best version a model may be, in standard errors: each version is compared with
# the one before it, and could be worse by one of them every time.
_BELOW_BEST = 2.0


@dataclass(frozen=True)
class Measured:
    """A model's accuracies on a test split.

    Attributes:
      accuracies: Metric -> value, a fraction.
      examples: How many examples were tested.
      data: Fingerprint of the data; empty if unknown.
      version: The pushed version that the model is; empty if it is none yet.
    """

    accuracies: Mapping[str, float]
    examples: int
    data: str
    version: str = ""

    @staticmethod
    def from_json(value: object) -> Measured | None:
        """Makes it of what `asdict` made; None of anything else."""
        try:
            measured = Measured(**value)  # type: ignore[arg-type]
            whole = measured.examples > 0 and all(
                0 <= accuracy <= 1 for accuracy in measured.accuracies.values()
            )
        except (TypeError, AttributeError):
            return None
        return measured if whole else None


@dataclass(frozen=True)
class Comparison:
    """How a metric compares with those of earlier models.

    Attributes:
      metric: Its name.
      text: For people.
      refused: Whether it is why the model must not be pushed.
    """

    metric: str
    text: str
    refused: bool


def standard_error(first: float, second: float, examples: int) -> float:
    """Standard error of the difference of two accuracies, each measured on so many examples.

    That of independent samples: two models tested on the same examples differ by less noise the
    more they agree, which the accuracies alone do not tell.

    Args:
      first: A fraction.
      second: Another.
      examples: At least 1.
    """
    return math.sqrt((first * (1 - first) + second * (1 - second)) / examples)


def compare(
    candidate: Measured,
    baseline: Measured,
    pushed: Iterable[Measured],
    metrics: Sequence[str],
) -> list[Comparison]:
    """Judges a candidate by the noise of its test.

    Args:
      candidate: The new model.
      baseline: The model pushed last, measured in the same test.
      pushed: All versions that are still in the folder; those tested on other data do not count.
      metrics: What to compare.

    Returns:
      A comparison for each metric in which the candidate is below one of the others.
    """
    result = []
    best_of = [
        other
        for other in pushed
        if (other.data, other.examples) == (candidate.data, candidate.examples)
    ]
    for metric in metrics:
        own, other = candidate.accuracies[metric], baseline.accuracies[metric]
        noise = standard_error(own, other, candidate.examples)
        below = f"{metric} is {other - own:.4f} below the baseline"
        if other - own > noise:
            text = f"{below}, more than the test's noise of {noise:.4f}"
            result.append(Comparison(metric, text, refused=True))
        elif other > own:
            text = f"{below}, within the test's noise of {noise:.4f}"
            result.append(Comparison(metric, text, refused=False))
        known = [version for version in best_of if metric in version.accuracies]
        if not known:
            continue
        best = max(known, key=lambda version: version.accuracies[metric])
        noise = standard_error(own, best.accuracies[metric], candidate.examples)
        drop = best.accuracies[metric] - own
        if drop > _BELOW_BEST * noise:
            text = (
                f"{metric} is {drop:.4f} below the best version in the folder, {best.version}, "
                f"more than {_BELOW_BEST:g} times the test's noise of {noise:.4f}"
            )
            result.append(Comparison(metric, text, refused=True))
    return result
