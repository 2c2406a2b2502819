"""What the `vit_cifar` preset adds to the plain Vision Transformer, for small data sets.

Shapes in comments: B images, H x W pixels, C channels, N tokens, D = projection_dim, h heads, K =
key_dim.

Sources: Lee et al., "Vision Transformer for Small-Size Datasets", https://arxiv.org/abs/2112.13492,
sections 3.2 (shifted patch tokenization) and 3.3 (locality self-attention); Huang et al., "Deep
Networks with Stochastic Depth", https://arxiv.org/abs/1603.09382.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from trainer.layers import Patches, Shape, TransformerBlock


@keras.saving.register_keras_serializable(package="vit")
class ShiftedPatches(Patches):
    """`Patches` of the image and of its copies moved half a patch along the four diagonals.

    A token sees four times the area that way. What comes in at the border is 0. Input
    [B, H, W, C], output [B, N, patch_size² x 5 C], the image's own channels first, then those of
    the copies moved up and left, up and right, down and left, down and right. No weights.

    Args:
        patch_size: Side of a patch in pixels, at least 2.
        **kwargs: `keras.layers.Layer` arguments.

    Raises:
        ValueError: `patch_size` is below 2, or (when built) does not divide the image.
    """

    def __init__(self, patch_size: int, **kwargs: Any) -> None:
        super().__init__(patch_size, **kwargs)
        if patch_size < 2:
            raise ValueError(f"patch_size is {patch_size}: half of it must be at least 1 pixel.")

    def call(self, images: Any) -> Any:
        """Cuts images [B, H, W, C] to [B, N, patch_size² x 5 C] of the same dtype."""
        height, width, shift = images.shape[1], images.shape[2], self.patch_size // 2
        padded = ops.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
        copies = [
            padded[:, top : top + height, left : left + width]
            for top in (2 * shift, 0)
            for left in (2 * shift, 0)
        ]
        return super().call(ops.concatenate([images, *copies], axis=-1))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns (B, N, patch_size² x 5 C)."""
        return super().compute_output_shape((*input_shape[:3], 5 * input_shape[3]))


@keras.saving.register_keras_serializable(package="vit")
class StochasticDepth(keras.layers.Layer):
    """Drops all of an image's values with some probability, and scales those kept to make up.

    At the end of a residual branch it takes the branch out of the network for that image.

    Args:
        rate: Probability to drop, at least 0 and below 1; active in training only.
        **kwargs: `keras.layers.Layer` arguments.

    Raises:
        ValueError: `rate` is out of range.
    """

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"rate is {rate}: it must be at least 0 and below 1.")
        self.rate = rate
        if rate:
            self.seed_generator = keras.random.SeedGenerator()

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Drops images of x [B, ...]; input and output are of the same shape and dtype."""
        if not training or not self.rate:
            return x
        shape = (ops.shape(x)[0],) + (1,) * (len(x.shape) - 1)
        kept = keras.random.uniform(shape, seed=self.seed_generator) >= self.rate
        return x * ops.cast(ops.cast(kept, "float32") / (1 - self.rate), x.dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "rate": self.rate}


@keras.saving.register_keras_serializable(package="vit")
class LocalitySelfAttention(keras.layers.Layer):
    """Multi-head self-attention in which no token attends to itself.

    A token is most like itself, so that it would mostly attend to itself; and with few tokens, of
    small images, scores divided by √K are much alike. So scores of a token with itself are masked,
    and each head learns its own factor in place of 1 / √K, which it starts at.

    Input and output [B, N, D]. Variables: kernels [D, h K] and biases [h K] of `query`, `key` and
    `value`, kernel [h K, D] and bias [D] of `output`, and `temperature` [h].

    Args:
        num_heads: Attention heads.
        key_dim: Width of one head's query, key and value.
        dropout_rate: Dropout of the attention weights, active in training only.
        **kwargs: `keras.layers.Layer` arguments.
    """

    def __init__(self, num_heads: int, key_dim: int, dropout_rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.dropout_rate = dropout_rate
        self.query, self.key, self.value = (
            keras.layers.Dense(num_heads * key_dim, dtype=self.dtype_policy, name=name)
            for name in ("query", "key", "value")
        )
        self.dropout = keras.layers.Dropout(dropout_rate, dtype=self.dtype_policy, name="dropout")

    def build(self, input_shape: Shape) -> None:
        """Creates the variables."""
        for projection in (self.query, self.key, self.value):
            projection.build(input_shape)
        self.output_projection = keras.layers.Dense(
            input_shape[-1], dtype=self.dtype_policy, name="output"
        )
        self.output_projection.build((*input_shape[:-1], self.num_heads * self.key_dim))
        self.temperature = self.add_weight(
            shape=(self.num_heads,),
            initializer=keras.initializers.Constant(self.key_dim**-0.5),
            name="temperature",
        )
        self.built = True

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Lets tokens [B, N, D] attend to one another."""
        tokens = x.shape[1]
        query, key, value = (
            ops.transpose(
                ops.reshape(projection(x), (-1, tokens, self.num_heads, self.key_dim)),
                (0, 2, 1, 3),
            )
            for projection in (self.query, self.key, self.value)
        )  # (B, h, N, K)
        query = query * ops.reshape(self.temperature, (-1, 1, 1))
        scores = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2)))  # (B, h, N, N)
        # Far below any score, and within the range of float16.
        scores = scores - ops.cast(30_000.0 * ops.eye(tokens), scores.dtype)
        weights = self.dropout(ops.softmax(scores), training=training)
        mixed = ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))  # (B, N, h, K)
        return self.output_projection(
            ops.reshape(mixed, (-1, tokens, self.num_heads * self.key_dim))
        )

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "dropout_rate": self.dropout_rate,
        }


@keras.saving.register_keras_serializable(package="vit")
class SmallDataBlock(TransformerBlock):
    """`TransformerBlock` with stochastic depth and, if asked for, locality self-attention.

    Args:
        *args: `TransformerBlock` arguments.
        locality_attention: Whether to use `LocalitySelfAttention`.
        stochastic_depth: Probability with which each of the two branches is dropped for an image.
        **kwargs: `TransformerBlock` arguments.
    """

    def __init__(
        self,
        *args: Any,
        locality_attention: bool = False,
        stochastic_depth: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.locality_attention = locality_attention  # before the attention is made
        super().__init__(*args, **kwargs)
        self.stochastic_depth = stochastic_depth
        self.attention_depth, self.mlp_depth = (
            StochasticDepth(stochastic_depth, dtype=self.dtype_policy, name=f"{branch}_depth")
            for branch in ("attention", "mlp")
        )

    def call(self, x: Any, training: bool | None = None) -> Any:
        """See `TransformerBlock.call`."""
        y = self._attend(self.attention_norm(x), training)  # (B, N, D)
        x = x + self.attention_depth(y, training=training)
        y = self.mlp(self.mlp_norm(x), training=training)  # (B, N, D)
        return x + self.mlp_depth(y, training=training)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "locality_attention": self.locality_attention,
            "stochastic_depth": self.stochastic_depth,
        }

    def _make_attention(self) -> keras.layers.Layer:
        if not self.locality_attention:
            return super()._make_attention()
        return LocalitySelfAttention(
            self.num_heads,
            self.key_dim,
            self.dropout_rate,
            dtype=self.dtype_policy,
            name="attention",
        )

    def _build_attention(self, input_shape: Shape) -> None:
        if self.locality_attention:
            self.attention.build(input_shape)
        else:
            super()._build_attention(input_shape)

    def _attend(self, y: Any, training: bool | None) -> Any:
        if self.locality_attention:
            return self.attention(y, training=training)
        return super()._attend(y, training)
