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

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from trainer.network.layers import Shape


@keras.saving.register_keras_serializable(package="vit")
class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization over the last axis, with TensorFlow in its one fused operation.

    Keras's layer is composed of elementwise operations, which on a CPU takes three times as long,
    and on a GPU, with JAX, passes over the values again for the variance, and its gradient four
    times more: there both are written out, with one pass for all sums of each.
    Statistics and variables are float32 whatever the input's dtype, which is kept. The moving
    variance is that of the population, N / (N - 1) times Keras's.

    Args:
        **kwargs: `keras.layers.BatchNormalization` arguments but `axis`.
    """

    def __init__(self, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(momentum=momentum, epsilon=epsilon, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalizes [..., C]; the statistics are the batch's in training, else moving ones."""
        if keras.config.backend() == "jax" and training and self.trainable:
            return self._normalize_by_batch(inputs)
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

    def _normalize_by_batch(self, inputs: Any) -> Any:
        rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        gamma, beta = map(ops.convert_to_tensor, (self.gamma, self.beta))
        normalized, mean, variance = _normalized(rows, gamma, beta, self.epsilon)
        number = rows.shape[0]
        population = variance * (number / (number - 1))
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, population)):
            moving.assign(moving * self.momentum + value * (1 - self.momentum))
        return ops.reshape(normalized, ops.shape(inputs))

    def folded(self) -> tuple[Any, Any]:
        """What the layer is at inference, x ↦ x scale + shift: (scale, shift), float32 [C]."""
        scale = self.gamma * ops.rsqrt(self.moving_variance + self.epsilon)
        return scale, self.beta - self.moving_mean * scale


def _normalized(x: Any, gamma: Any, beta: Any, epsilon: float) -> tuple[Any, Any, Any]:
    """Normalizes columns.

    Source of the gradient: Ioffe and Szegedy, https://arxiv.org/abs/1502.03167, section 3.

    Args:
        x: [N, C] of any float dtype.
        gamma: Scale, float32 [C].
        beta: Shift, float32 [C].
        epsilon: Added to the variance.

    Returns:
        The normalized columns in x's dtype; their mean and variance, float32 [C], which have no
        gradient.
    """

    @ops.custom_gradient
    def normalize(x: Any, gamma: Any, beta: Any) -> Any:
        wide = ops.cast(x, "float32")
        mean = ops.mean(wide, axis=0)
        variance = ops.mean(ops.square(wide), axis=0) - ops.square(mean)
        inverse = ops.rsqrt(variance + epsilon)
        scale = gamma * inverse
        normalized = ops.cast(wide * scale + (beta - mean * scale), x.dtype)

        def gradient(upstream: Any, *_: Any) -> tuple[Any, Any, Any]:
            upstream = ops.cast(upstream[0], "float32")
            centred = ops.cast(x, "float32") - mean
            of_beta = ops.sum(upstream, axis=0)
            of_gamma = ops.sum(upstream * centred, axis=0) * inverse
            number = x.shape[0]
            rest = of_beta / number + centred * (inverse * of_gamma / number)
            return ops.cast((upstream - rest) * scale, x.dtype), of_gamma, of_beta

        return (normalized, mean, variance), gradient

    return normalize(x, gamma, beta)


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

        x + Attention(BN(x)), then x + ReLU(C(BN(x) W1 + b1)) W2

    where C(h) is h or, with a depthwise convolution, h + convolution(h) on the grid of the tokens.
    Input and output [B, N, D].

    Args:
        num_heads: Attention heads.
        key_dim: Width K of one head's query, key and value.
        mlp_dim: Width of the MLP's hidden layer.
        depthwise_convolution: Whether the hidden layer's neighbours are mixed by a 3 x 3
            convolution of each channel (Lu et al., "Bridging the Gap Between Vision Transformers
            and Convolutional Neural Networks on Small Datasets", https://arxiv.org/abs/2210.05958,
            section 3.3). The tokens are then those of a grid, row by row.
        grid_height: Rows of that grid; None: it is square.
        **kwargs: `keras.layers.Layer` arguments.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        mlp_dim: int,
        depthwise_convolution: bool = False,
        grid_height: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.depthwise_convolution = depthwise_convolution
        self.grid_height = grid_height
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
        if self.depthwise_convolution:
            self.depthwise_kernel = self.add_weight(
                shape=(3, 3, self.mlp_dim, 1), initializer="zeros", name="depthwise_kernel"
            )
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
        hidden = ops.matmul(rows, self.mlp_kernel) + self.mlp_bias  # (B x N, mlp_dim)
        if self.depthwise_convolution:
            hidden = mix_neighbours(hidden, self.depthwise_kernel, tokens, self.grid_height)
        hidden = ops.matmul(ops.relu(hidden), self.mlp_output_kernel)  # (B x N, D)
        return x + ops.reshape(hidden, (-1, tokens, width))

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
            "depthwise_convolution": self.depthwise_convolution,
            "grid_height": self.grid_height,
        }


def mix_neighbours(rows: Any, kernel: Any, tokens: int, height: int | None = None) -> Any:
    """Adds a 3 x 3 convolution of each channel, with zeros around the grid.

    Args:
        rows: [B x N, C], the tokens of a grid, row by row.
        kernel: [3, 3, C, 1], in the dtype of the rows.
        tokens: N.
        height: Rows of the grid; None: it is square.

    Returns:
        [B x N, C].
    """
    height, channels = height or math.isqrt(tokens), rows.shape[-1]
    width = tokens // height
    grid = ops.reshape(rows, (-1, height, width, channels))
    if keras.config.backend() == "jax":
        # One elementwise kernel on a GPU, where cuDNN's convolution of single channels is slow.
        padded = ops.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0)))
        mixed = grid
        for row in range(3):
            for column in range(3):
                shifted = padded[:, row : row + height, column : column + width]
                mixed = mixed + shifted * kernel[row, column, :, 0]
    else:
        mixed = grid + ops.depthwise_conv(grid, kernel, padding="same")
    return ops.reshape(mixed, (-1, channels))


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
