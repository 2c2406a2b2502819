"""What the `compact` preset has in place of patches and of flattened tokens.

Shapes in comments: B images, H x W pixels, C channels, N tokens, D = projection_dim.

Source: Hassani et al., "Escaping the Big Data Paradigm with Compact Transformers",
https://arxiv.org/abs/2104.05704, sections 3.2 (sequence pooling) and 3.3 (convolutional tokenizer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from trainer.layers import Shape


@keras.saving.register_keras_serializable(package="vit")
class ConvolutionalTokenizer(keras.layers.Layer):
    """3 x 3 convolutions, each with batch normalization and ReLU, then positions.

    The first convolution keeps the resolution, each further one halves it. Input [B, H, W, C],
    output [B, N, D] with N = (H / 2^(n - 1)) x (W / 2^(n - 1)) tokens, row by row, and D the last
    of the n widths.

    Args:
        filters: Width of each convolution.
        **kwargs: `keras.layers.Layer` arguments.

    Raises:
        ValueError: `filters` is empty.
    """

    def __init__(self, filters: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not filters:
            raise ValueError("filters is empty: give the tokenizer at least one width.")
        self.filters = tuple(filters)
        self.convolutions = [
            keras.layers.Conv2D(
                width,
                3,
                strides=1 if index == 0 else 2,
                padding="same",
                use_bias=False,  # the normalization behind it has one
                dtype=self.dtype_policy,
                name=f"convolution_{index}",
            )
            for index, width in enumerate(self.filters)
        ]
        self.norms = [
            keras.layers.BatchNormalization(dtype=self.dtype_policy, name=f"norm_{index}")
            for index in range(len(self.filters))
        ]

    def build(self, input_shape: Shape) -> None:
        """Creates the variables for a fixed number of positions."""
        shape = input_shape
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            convolution.build(shape)
            shape = convolution.compute_output_shape(shape)
            norm.build(shape)
        self.num_tokens = shape[1] * shape[2]
        self.positions = self.add_weight(
            shape=(self.num_tokens, self.filters[-1]),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
            name="position_embedding",
        )
        self.built = True

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Tokenizes images [B, H, W, C] to [B, N, D] of the compute dtype."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = ops.relu(norm(convolution(x), training=training))
        return ops.reshape(x, (-1, self.num_tokens, self.filters[-1])) + self.positions

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns (B, N, D)."""
        shape = input_shape
        for convolution in self.convolutions:
            shape = convolution.compute_output_shape(shape)
        return (shape[0], shape[1] * shape[2], shape[3])

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "filters": list(self.filters)}


@keras.saving.register_keras_serializable(package="vit")
class SequencePooling(keras.layers.Layer):
    """The mean of the tokens, weighted by a learned attention to each.

    Input [B, N, D], output [B, D].
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.score = keras.layers.Dense(1, dtype=self.dtype_policy, name="score")

    def build(self, input_shape: Shape) -> None:
        """Creates the score's variables."""
        self.score.build(input_shape)
        self.built = True

    def call(self, tokens: Any) -> Any:
        """Pools tokens [B, N, D] to [B, D]."""
        weights = ops.softmax(self.score(tokens), axis=1)  # (B, N, 1)
        return ops.sum(weights * tokens, axis=1)  # (B, D)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns (B, D)."""
        return (input_shape[0], input_shape[2])
