"""MixUp and CutMix: each training image mixed with another one of its batch, and so its label.

Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization",
https://arxiv.org/abs/1710.09412; Yun et al., "CutMix", https://arxiv.org/abs/1905.04899.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops
from scipy import special

from trainer.preset import Augmentation

# Of a Beta distribution. Sampling it exactly is a loop of rejections, which XLA takes minutes to
# compile and cannot capture together with the step around it.
_QUANTILES = 4096


class Mixing:
    """MixUp and CutMix, as a function of a seed on any backend.

    Without a state of its own it can be part of a `tf.data` pipeline that works on several batches
    side by side as well as of a compiled JAX program, and gives the same for the same seed.

    An image's partner is the one before it in the batch, whose order is random. MixUp and CutMix
    are both a weight for each pixel: the same for all pixels, or 0 in a box and 1 around it.
    Keras's layers are not used, whose draws are a dozen programs and whose partners are sorted.

    Args:
        augmentation: Whose `mixup` and `cutmix` are used. Where both are on, each image gets either
            with probability 1/2; where one is, each image gets it.
        num_classes: Classes that labels stand for.

    Raises:
        ValueError: They are off.
    """

    def __init__(self, augmentation: Augmentation, num_classes: int) -> None:
        if not augmentation.mixes_labels:
            raise ValueError("mixup and cutmix are 0: set one of them above 0.")
        self._num_classes = num_classes
        self._mixup = _beta_quantiles(augmentation.mixup)
        self._cutmix = _beta_quantiles(augmentation.cutmix)
        self._generator = keras.random.SeedGenerator(0)

    def __call__(self, images: Any, labels: Any, seed: Any) -> tuple[Any, Any]:
        """Mixes a batch.

        Args:
            images: float32 [B, H, W, C].
            labels: Integers [B].
            seed: uint32 [2].

        Returns:
            The mixed images, float32 [B, H, W, C], and what share each class has in them, float32
            [B, classes].
        """
        labels = ops.one_hot(labels, self._num_classes, dtype="float32")
        weights = self._pixel_weights(ops.shape(images)[0], images.shape[1:3], seed)  # (B, H, W, 1)
        shares = ops.mean(weights, axis=(1, 2))  # (B, 1)
        return (
            weights * images + (1 - weights) * ops.roll(images, 1, axis=0),
            shares * labels + (1 - shares) * ops.roll(labels, 1, axis=0),
        )

    def _pixel_weights(self, batch: Any, size: tuple[int, int], seed: Any) -> Any:
        with keras.StatelessScope([(self._generator.state, ops.cast(seed, "uint32"))]):
            coin, quantile, row, column = ops.unstack(
                keras.random.uniform((4, batch), seed=self._generator), axis=0
            )
        level = ops.cast(quantile * _QUANTILES, "int32")
        one = ops.ones((1, *size, 1))
        if self._cutmix is None:
            return _of_images(ops.take(self._mixup, level)) * one
        # A box of a share 1 - λ of the area around any point, as far as it is in the image.
        reach = ops.sqrt(1 - ops.take(self._cutmix, level)) / 2
        inside = ops.logical_and(
            ops.abs(_axis(size[0], 1) - _of_images(row)) < _of_images(reach),
            ops.abs(_axis(size[1], 2) - _of_images(column)) < _of_images(reach),
        )  # (B, H, W, 1)
        cut = 1 - ops.cast(inside, "float32")
        if self._mixup is None:
            return cut
        return ops.where(
            _of_images(coin) < 0.5, _of_images(ops.take(self._mixup, level)) * one, cut
        )


def _beta_quantiles(alpha: float) -> np.ndarray | None:
    """Of Beta(α, α), equally probable, float32 [_QUANTILES]; None for α = 0."""
    if not alpha:
        return None
    levels = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    return special.betaincinv(alpha, alpha, levels).astype(np.float32)


def _axis(size: int, axis: int) -> np.ndarray:
    """Centres of the pixels along an axis of images, as fractions of it."""
    shape = [1, 1, 1, 1]
    shape[axis] = size
    return ((np.arange(size, dtype=np.float32) + 0.5) / size).reshape(shape)


def _of_images(values: Any) -> Any:
    """[B] to [B, 1, 1, 1]."""
    return values[:, None, None, None]
