"""What the `compact` preset is made of: layers chosen by accuracy for each minute of a CPU.

Convolutions and matrix products are the cheap part of a training step on a CPU, above all in
bfloat16 where the processor has instructions for it. What costs is everything that passes over all
values between them. So: batch normalization, which is one fused operation (a layer normalization
is ten), ReLU rather than GELU, and no bias where a normalization follows.

Shapes in comments: B images, H x W pixels, C channels, N tokens, D = projection_dim, K = key_dim.

Sources: Hassani et al., "Escaping the Big Data Paradigm with Compact Transformers",
https://arxiv.org/abs/2104.05704, sections 3.2 (sequence pooling) and 3.3 (convolutional tokenizer);
Graham et al., "LeViT", https://arxiv.org/abs/2104.01136, section 4.2 (batch normalization in a
transformer, to be merged into the products at inference).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from trainer.layers import Shape


@keras.saving.register_keras_serializable(package="vit")
class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization over the last axis, with TensorFlow in its one fused operation.

    Keras's layer is composed of elementwise operations, which on a CPU takes three times as long.
    Statistics and variables are float32 whatever the input's dtype, which is kept. The moving
    variance is that of the population, N / (N - 1) times Keras's.

    Args:
        **kwargs: `keras.layers.BatchNormalization` arguments but `axis`.
    """

    def __init__(self, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(momentum=momentum, epsilon=epsilon, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalizes [..., C]; the statistics are the batch's in training, else moving ones."""
        if keras.config.backend() != "tensorflow":
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf  # the backend, so it is there

        training = bool(training and self.trainable)
        width = inputs.shape[-1]
        normalized, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs if len(inputs.shape) == 4 else tf.reshape(inputs, (1, 1, -1, width)),
            scale=self.gamma.value,
            offset=self.beta.value,
            mean=[] if training else self.moving_mean.value,
            variance=[] if training else self.moving_variance.value,
            epsilon=self.epsilon,
            is_training=training,
        )
        if training:
            for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
                moving.assign(moving.value * self.momentum + value * (1 - self.momentum))
        return normalized if len(inputs.shape) == 4 else tf.reshape(normalized, tf.shape(inputs))

    def folded(self) -> tuple[Any, Any]:
        """What the layer is at inference, x ↦ x scale + shift: (scale, shift), float32 [C]."""
        scale = self.gamma * ops.rsqrt(self.moving_variance + self.epsilon)
        return scale, self.beta - self.moving_mean * scale


@keras.saving.register_keras_serializable(package="vit")
class NormalizedConvolution(keras.layers.Layer):
    """A 3 x 3 convolution and its batch normalization: [B, H, W, C] to [B, H / s, W / s, filters].

    Args:
        filters: Channels of the output.
        strides: s, in both directions.
        **kwargs: `keras.layers.Layer` arguments.
    """

    def __init__(self, filters: int, strides: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.strides = strides
        self.convolution = keras.layers.Conv2D(
            filters,
            3,
            strides=strides,
            padding="same",
            use_bias=False,  # the normalization has one
            dtype=self.dtype_policy,
            name="convolution",
        )
        self.norm = FusedBatchNormalization(dtype=self.dtype_policy, name="norm")

    def build(self, input_shape: Shape) -> None:
        """Creates the variables of both."""
        self.convolution.build(input_shape)
        self.norm.build(self.compute_output_shape(input_shape))
        self.built = True

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Convolves and normalizes [B, H, W, C]."""
        return self.norm(self.convolution(x), training=training)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns (B, H / s, W / s, filters), rounded up."""
        return self.convolution.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "filters": self.filters, "strides": self.strides}


@keras.saving.register_keras_serializable(package="vit")
class ConvolutionalTokenizer(keras.layers.Layer):
    """Stages of normalized convolutions with ReLU, then positions.

    A stage is a convolution and any number of residual pairs of convolutions, x + f(f(x)). The
    first stage keeps the resolution, each further one halves it. Input [B, H, W, C], output
    [B, N, D] with N = (H / 2^(n - 1)) x (W / 2^(n - 1)) tokens, row by row, and D the last of the n
    widths.

    Args:
        filters: Width of each stage.
        residual_pairs: How many each stage has; empty for none at all.
        **kwargs: `keras.layers.Layer` arguments.

    Raises:
        ValueError: `filters` is empty, or `residual_pairs` is of another length.
    """

    def __init__(
        self, filters: Sequence[int], residual_pairs: Sequence[int] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not filters:
            raise ValueError("filters is empty: give the tokenizer at least one width.")
        if residual_pairs and len(residual_pairs) != len(filters):
            raise ValueError(
                f"residual_pairs is {tuple(residual_pairs)}: it must have as many numbers as "
                f"filters, which is {tuple(filters)}."
            )
        self.filters = tuple(filters)
        self.residual_pairs = tuple(residual_pairs) or (0,) * len(self.filters)
        # One flat list: Keras does not save layers in lists of lists.
        self.convolutions = [
            NormalizedConvolution(
                width,
                strides=2 if stage and not index else 1,
                dtype=self.dtype_policy,
                name=f"stage_{stage}_{index}",
            )
            for stage, (width, pairs) in enumerate(zip(self.filters, self.residual_pairs))
            for index in range(1 + 2 * pairs)
        ]

    @property
    def stages(self) -> list[list[NormalizedConvolution]]:
        """The convolutions of each stage: the one that enters it, then its residual pairs."""
        convolutions = iter(self.convolutions)
        return [[next(convolutions) for _ in range(1 + 2 * n)] for n in self.residual_pairs]

    def build(self, input_shape: Shape) -> None:
        """Creates the variables for a fixed number of positions."""
        shape = input_shape
        for layer in self.convolutions:
            layer.build(shape)
            shape = layer.compute_output_shape(shape)
        self.num_tokens = shape[1] * shape[2]
        self.positions = self.add_weight(
            shape=(self.num_tokens, self.filters[-1]),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
            name="position_embedding",
        )
        self.built = True

    def call(self, images: Any, training: bool | None = None) -> Any:
        """Tokenizes images [B, H, W, C] to [B, N, D] of the compute dtype."""
        x = ops.cast(images, self.compute_dtype)
        for entry, *residual in self.stages:
            x = ops.relu(entry(x, training=training))
            for first, second in zip(residual[::2], residual[1::2]):
                y = ops.relu(first(x, training=training))
                x = ops.relu(x + second(y, training=training))
        return ops.reshape(x, (-1, self.num_tokens, self.filters[-1])) + self.positions

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns (B, N, D)."""
        shape = input_shape
        for entry, *_ in self.stages:
            shape = entry.compute_output_shape(shape)
        return (shape[0], shape[1] * shape[2], shape[3])

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "filters": list(self.filters),
            "residual_pairs": list(self.residual_pairs),
        }


@keras.saving.register_keras_serializable(package="vit")
class BatchNormBlock(keras.layers.Layer):
    """An encoder block with batch in place of layer normalization, and ReLU.

        x + Attention(BN(x)), then x + ReLU(BN(x) W1 + b1) W2

    Input and output [B, N, D].

    Args:
        num_heads: Attention heads.
        key_dim: Width K of one head's query, key and value.
        mlp_dim: Width of the MLP's hidden layer.
        **kwargs: `keras.layers.Layer` arguments.
    """

    def __init__(self, num_heads: int, key_dim: int, mlp_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.mlp_dim = mlp_dim
        self.attention_norm = FusedBatchNormalization(
            dtype=self.dtype_policy, name="attention_norm"
        )
        self.mlp_norm = FusedBatchNormalization(dtype=self.dtype_policy, name="mlp_norm")

    def build(self, input_shape: Shape) -> None:
        """Creates the variables."""
        width, heads = input_shape[-1], self.num_heads * self.key_dim
        self.attention_norm.build(input_shape)
        self.mlp_norm.build(input_shape)
        self.qkv_kernel = self._kernel("qkv_kernel", width, 3 * heads)
        self.output_kernel = self._kernel("output_kernel", heads, width)
        self.mlp_kernel = self._kernel("mlp_kernel", width, self.mlp_dim)
        self.mlp_bias = self.add_weight(shape=(self.mlp_dim,), initializer="zeros", name="mlp_bias")
        self.mlp_output_kernel = self._kernel("mlp_output_kernel", self.mlp_dim, width)
        self.built = True

    def _kernel(self, name: str, inputs: int, outputs: int) -> Any:
        return self.add_weight(shape=(inputs, outputs), initializer="glorot_uniform", name=name)

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Applies the block to tokens [B, N, D] of the compute dtype."""
        tokens, width = x.shape[1:]
        rows = ops.reshape(self.attention_norm(x, training=training), (-1, width))  # (B x N, D)
        mixed = attend(ops.matmul(rows, self.qkv_kernel), tokens, self.num_heads, self.key_dim)
        x = x + ops.reshape(ops.matmul(mixed, self.output_kernel), (-1, tokens, width))
        rows = ops.reshape(self.mlp_norm(x, training=training), (-1, width))
        hidden = ops.relu(ops.matmul(rows, self.mlp_kernel) + self.mlp_bias)  # (B x N, mlp_dim)
        return x + ops.reshape(ops.matmul(hidden, self.mlp_output_kernel), (-1, tokens, width))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "mlp_dim": self.mlp_dim,
        }


def attend(
    projections: Any, tokens: int, num_heads: int, key_dim: int, scale: float | None = None
) -> Any:
    """Scaled dot-product attention of all heads.

    Args:
        projections: [B x N, 3 x H x K], the queries of all heads, then the keys, then the values.
        tokens: N.
        num_heads: H.
        key_dim: K.
        scale: Of the scores; 1/√K by default.

    Returns:
        [B x N, H x K].
    """
    # Split before the transposes: slices of one transposed tensor have a gradient that is written
    # in full for each of them.
    query, key, value = (
        ops.transpose(ops.reshape(part, (-1, tokens, num_heads, key_dim)), (0, 2, 1, 3))
        for part in ops.split(projections, 3, axis=-1)
    )  # (B, H, N, K)
    scale = key_dim**-0.5 if scale is None else scale
    scores = ops.matmul(query * scale, ops.transpose(key, (0, 1, 3, 2)))  # (B, H, N, N)
    mixed = ops.matmul(ops.softmax(scores), value)  # (B, H, N, K)
    return ops.reshape(ops.transpose(mixed, (0, 2, 1, 3)), (-1, num_heads * key_dim))


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
