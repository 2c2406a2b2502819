"""MixUp and CutMix: each training image mixed with another one of its batch, and so its label.

Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization",
https://arxiv.org/abs/1710.09412; Yun et al., "CutMix", https://arxiv.org/abs/1905.04899.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from trainer.preset import Preset

# More than any of the generators draws for a batch.
_DRAWS = 1000


class Mixing:
    """Keras's MixUp and CutMix, as a function of a seed on any backend.

    Without a state of its own it can be part of a `tf.data` pipeline that works on several batches
    side by side as well as of a compiled JAX program, and gives the same for the same seed.

    Args:
        preset: Whose `mixup` and `cutmix` are used. Where both are on, each image gets either with
            probability 1/2; where one is, each image gets it.
        num_classes: Classes that labels stand for.

    Raises:
        ValueError: The preset mixes nothing.
    """

    def __init__(self, preset: Preset, num_classes: int) -> None:
        if not preset.mixes_labels:
            raise ValueError(
                f"preset {preset.name!r} has mixup 0 and cutmix 0: set one of them above 0."
            )
        self._num_classes = num_classes
        self._layers: list[keras.layers.Layer] = []
        if preset.mixup:
            self._layers.append(keras.layers.MixUp(preset.mixup, seed=0, dtype="float32"))
        if preset.cutmix:
            alpha = (preset.cutmix, preset.cutmix)
            self._layers.append(keras.layers.CutMix(alpha, seed=0, dtype="float32"))
        self._coin = keras.random.SeedGenerator(0)

    def __call__(self, images: Any, labels: Any, seed: Any) -> tuple[Any, Any]:
        """Mixes a batch.

        Args:
            images: float32 [B, H, W, C].
            labels: Integers [B].
            seed: uint32 [2]; the second of them is best left 0.

        Returns:
            The mixed images, float32 [B, H, W, C], and what share each class has in them, float32
            [B, classes].
        """
        labels = ops.one_hot(labels, self._num_classes, dtype="float32")
        seed = ops.cast(seed, "uint32")
        generators = [self._coin, *(layer.generator for layer in self._layers)]
        states = [
            (generator.state, seed + ops.array([0, index * _DRAWS], "uint32"))
            for index, generator in enumerate(generators)
        ]
        with keras.StatelessScope(state_mapping=states):
            mixed = [
                layer({"images": images, "labels": labels}, training=True) for layer in self._layers
            ]
            if len(mixed) == 1:
                return mixed[0]["images"], mixed[0]["labels"]
            heads = keras.random.uniform((ops.shape(images)[0], 1), seed=self._coin) < 0.5
        first, second = mixed
        return (
            ops.where(heads[:, :, None, None], first["images"], second["images"]),
            ops.where(heads, first["labels"], second["labels"]),
        )
