"""What a training draws beside the model's own generators, on either engine."""

from __future__ import annotations

import numpy as np


def epoch_draws(seed: int, epoch: int, examples: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws for an epoch, as a function of the seed and of its number alone.

    So a training that goes on after an interruption does what the uninterrupted one would.

    Args:
      seed: Of the training.
      epoch: From 0.
      examples: Of the train split.
      steps: Of the epoch.

    Returns:
      The order of the examples, int32 [examples], and a seed of each step's mixing, uint32 [steps].
    """
    draw = np.random.default_rng((seed, epoch))
    order = draw.permutation(examples).astype(np.int32)
    return order, draw.integers(2**32, size=steps, dtype=np.uint32)
