"""The layers of `trainer/network/layers.py`, computed faster: same variables, same function.

`set_weights(other.get_weights())` moves weights between a layer here and its plain counterpart in
either direction, or between whole models. What differs is the order of the arithmetic (outputs
agree to rounding) and, in training, which random numbers dropout draws (their distribution is the
same).

Shapes in comments: B images, N tokens, D = projection_dim, H heads, K = key_dim, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from trainer.network.layers import (
    MLP,
    PatchEmbedding,
    Shape,
    TransformerBlock,
    training_only,
)


def resize_matrix(size: int, resized: int) -> np.ndarray:
    """A bilinear resize of one axis, as the matrix that it is.

    Args:
        size: Pixels before.
        resized: Pixels after.

    Returns:
        float32 [resized, size], the weights of `keras.layers.Resizing` (pixel centres at half
        integers, the border repeated).
    """
    # In float32 like the backends', whose rounded positions are part of what they compute.
    at = (np.arange(resized, dtype=np.float32) + np.float32(0.5)) * np.float32(size / resized)
    at = np.clip(at - np.float32(0.5), 0, size - 1)
    low = np.minimum(np.floor(at).astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((resized, size), np.float32)
    np.add.at(matrix, (np.arange(resized), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(resized), high), at - low)
    return matrix


def patch_windows(size: int, resized: int, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """What each patch of a resized axis sees of the axis before.

    Args:
        size: Pixels before the resize.
        resized: Pixels after it.
        patch_size: Pixels of a patch; divides `resized`.

    Returns:
        pixels: int32 [patches, window], which pixels before the resize, consecutive.
        weights: float32 [patches, patch_size, window]: the patch is `weights @ axis[pixels]`.
    """
    per_patch = resize_matrix(size, resized).reshape(-1, patch_size, size)
    used = [np.flatnonzero(rows.any(axis=0)) for rows in per_patch]
    window = max(pixels[-1] - pixels[0] + 1 for pixels in used)
    starts = np.minimum([pixels[0] for pixels in used], size - window)
    pixels = (starts[:, None] + np.arange(window)).astype(np.int32)
    weights = np.stack([rows[:, taken] for rows, taken in zip(per_patch, pixels, strict=True)])
    return pixels, weights


@keras.saving.register_keras_serializable(package="vit")
class FoldedPatchEmbedding(PatchEmbedding):
    """Resize, cut into patches, project: in one linear map for each token.

    A bilinear resize is linear and patches do not overlap, so the projection W of a patch of the
    resized image is a projection W' = Rᵢᵀ W Rⱼ of a small window of the original (with the
    `notebook` preset 7 x 7 pixels in place of 32 x 32). The resized image never exists.

    Input [B, height, width, C], output [B, N, D]. Variables as in `PatchEmbedding`.

    Args:
        projection_dim: Width D of a token.
        image_size: Side that images are resized to (bilinear); None takes them as they are.
        patch_size: Side of a patch; divides the image's.
        **kwargs: `keras.layers.Layer` arguments.

    Raises:
        ValueError: `patch_size` does not divide the image's sides (when built).
    """

    def __init__(
        self, projection_dim: int, image_size: int | None, patch_size: int, **kwargs: Any
    ) -> None:
        super().__init__(projection_dim, **kwargs)
        self.image_size = image_size
        self.patch_size = patch_size

    def build(self, input_shape: Shape) -> None:
        """Creates the variables, and the constants that describe the resize."""
        batch, height, width, channels = input_shape
        rows, columns = self._grid(input_shape)
        self._rows = patch_windows(height, self.image_size or height, self.patch_size)
        self._columns = patch_windows(width, self.image_size or width, self.patch_size)
        super().build((batch, rows * columns, self.patch_size**2 * channels))

    def _grid(self, input_shape: Shape) -> tuple[int, int]:
        sides = [self.image_size or side for side in input_shape[1:3]]
        if self.patch_size < 1 or any(side % self.patch_size for side in sides):
            raise ValueError(
                f"images of {sides[0]} x {sides[1]} pixels cannot be cut into whole patches of "
                f"patch_size {self.patch_size}: choose a patch_size that divides both."
            )
        return sides[0] // self.patch_size, sides[1] // self.patch_size

    def folded_kernel(self) -> Any:
        """W', float32 [N, window rows x window columns x C, D]."""
        size, width = self.patch_size, self.projection_dim
        (down, window_rows), (across, window_columns) = self._rows[0].shape, self._columns[0].shape
        channels = self.projection.kernel.shape[0] // size**2
        # Rows first, then columns, each as one matrix product.
        rows = np.reshape(self._rows[1].transpose(0, 2, 1), (-1, size))  # (down x window, size)
        kernel = ops.reshape(self.projection.kernel, (size, -1))
        kernel = ops.reshape(ops.matmul(rows, kernel), (-1, size, channels * width))
        columns = np.reshape(self._columns[1].transpose(0, 2, 1), (-1, size))
        kernel = ops.matmul(columns, kernel)  # (down x window, across x window, C x D)
        kernel = ops.reshape(kernel, (down, window_rows, across, window_columns, channels, width))
        kernel = ops.transpose(kernel, (0, 2, 1, 3, 4, 5))
        return ops.reshape(kernel, (down * across, window_rows * window_columns * channels, width))

    def windows(self, images: Any) -> Any:
        """Cuts the windows out of images [B, height, width, C].

        Returns:
            [N, B, window rows x window columns x C].
        """
        (down, window_rows), (across, window_columns) = self._rows[0].shape, self._columns[0].shape
        channels = images.shape[-1]
        x = ops.take(images, self._rows[0].ravel(), axis=1)
        x = ops.take(x, self._columns[0].ravel(), axis=2)
        x = ops.reshape(x, (-1, down, window_rows, across, window_columns, channels))
        x = ops.transpose(x, (1, 3, 0, 2, 4, 5))
        return ops.reshape(x, (down * across, -1, window_rows * window_columns * channels))

    def call(self, images: Any) -> Any:
        """Embeds images [B, height, width, C] as tokens [B, N, D] of the compute dtype."""
        kernel = ops.cast(self.folded_kernel(), self.compute_dtype)
        windows = ops.cast(self.windows(images), self.compute_dtype)
        tokens = ops.transpose(ops.matmul(windows, kernel), (1, 0, 2))  # (B, N, D)
        positions = self.position_embedding(ops.arange(self.num_patches))  # (N, D)
        return tokens + (positions + ops.cast(self.projection.bias, self.compute_dtype))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns (B, N, D)."""
        rows, columns = self._grid(input_shape)
        return (input_shape[0], rows * columns, self.projection_dim)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "image_size": self.image_size,
            "patch_size": self.patch_size,
        }


@keras.saving.register_keras_serializable(package="vit")
class FastDropout(keras.layers.Dropout):
    """Dropout that spends 16 random bits on each value rather than 32.

    The rate is rounded to a multiple of 1 / 65,536, and values that are kept are scaled by exactly
    the inverse of their probability, so the expectation is unchanged. Where the backend is not
    TensorFlow, whose generator is the reason, this is `keras.layers.Dropout`.
    """

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Drops values; input and output are of the same shape and dtype."""
        if not training or self.rate == 0 or keras.config.backend() != "tensorflow":
            return super().call(inputs, training=training)
        import tensorflow as tf  # the backend, so it is there

        shape, size = tf.shape(inputs), tf.size(inputs)
        seed = tf.cast(self.seed_generator.next(), tf.int64)  # (seed, number of draws so far)
        bits = tf.random.stateless_uniform(
            [(size + 1) // 2], seed, minval=None, maxval=None, dtype=tf.int32
        )
        halves = tf.reshape(tf.bitcast(bits, tf.int16), [-1])[:size]
        dropped = round(self.rate * 65536)  # of the 65,536 values that 16 bits have
        keep = tf.reshape(halves >= tf.constant(dropped - 32768, tf.int16), shape)
        scale = tf.constant(65536 / (65536 - dropped), inputs.dtype)
        return inputs * (tf.cast(keep, inputs.dtype) * scale)


@keras.saving.register_keras_serializable(package="vit")
class FastLayerNormalization(keras.layers.LayerNormalization):
    """Layer normalization of the last axis, on JAX with one pass for all sums of each direction.

    On other backends this is `keras.layers.LayerNormalization`.
    """

    def call(self, inputs: Any) -> Any:
        """Normalizes [..., D]; input and output are of the same shape and dtype."""
        if keras.config.backend() != "jax":
            return super().call(inputs)
        rows = ops.reshape(inputs, (-1, inputs.shape[-1]))
        normalized = _normalize_rows(rows, self.gamma, self.beta, self.epsilon)
        return ops.reshape(normalized, ops.shape(inputs))


def _normalize_rows(x: Any, gamma: Any, beta: Any, epsilon: float) -> Any:
    """(x - mean) / √(variance + ε) γ + β of each row of [N, D], computed in float32."""

    @ops.custom_gradient
    def normalize(x: Any, gamma: Any, beta: Any) -> Any:
        wide = ops.cast(x, "float32")
        mean = ops.mean(wide, axis=1, keepdims=True)
        variance = ops.mean(ops.square(wide), axis=1, keepdims=True) - ops.square(mean)
        inverse = ops.rsqrt(variance + epsilon)
        normalized = (wide - mean) * inverse * gamma + beta

        def gradient(upstream: Any) -> tuple[Any, Any, Any]:
            upstream = ops.cast(upstream, "float32")
            standard = (ops.cast(x, "float32") - mean) * inverse
            of_beta = ops.sum(upstream, axis=0)
            of_gamma = ops.sum(upstream * standard, axis=0)
            scaled = upstream * gamma
            rest = ops.mean(scaled, axis=1, keepdims=True)
            along = ops.mean(scaled * standard, axis=1, keepdims=True)
            return (
                ops.cast((scaled - rest - standard * along) * inverse, x.dtype),
                of_gamma,
                of_beta,
            )

        return ops.cast(normalized, x.dtype), gradient

    return normalize(x, ops.cast(gamma, "float32"), ops.cast(beta, "float32"))


@keras.saving.register_keras_serializable(package="vit")
class FastMLP(MLP):
    """`MLP` with `FastDropout`."""

    dropout_class = FastDropout


@keras.saving.register_keras_serializable(package="vit")
class FusedTransformerBlock(TransformerBlock):
    """`TransformerBlock` for heads as wide as the tokens, with half of the projections.

    With K >= D the product of a head's query and key projections is no larger than either of them,
    and so is that of value and output:

        scores_h = (y Wq + bq)(y Wk + bk)ᵀ = (y A + c) yᵀ + what is the same for all keys
        output   = Σ_h P_h (y Wv + bv) Wo  = Σ_h (P_h y) B + rowsum(P_h) b

    where A = Wq Wkᵀ and B = Wv Wo are D x D. What is the same for all keys a softmax cancels, which
    takes the key's bias out of the computation: its gradient is zero, where the plain layer's is
    zero up to rounding. Keys and values of all heads are then y itself, so the heads' queries can
    lie side by side in one matrix and nothing needs transposing.

    Args:
        *args: `TransformerBlock` arguments.
        **kwargs: `TransformerBlock` arguments.
    """

    mlp_class = FastMLP
    norm_class = FastLayerNormalization

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attention_dropout = FastDropout(
            self.dropout_rate, dtype=self.dtype_policy, name="attention_dropout"
        )

    def merged_projections(self) -> tuple[Any, Any, Any, Any]:
        """The products of each head's projections: see `merge_projections`."""
        return merge_projections([self])[0]

    def call(
        self,
        x: Any,
        training: bool | None = None,
        merged: tuple[Any, ...] | None = None,
        mask: Any = None,
    ) -> Any:
        """Applies the block.

        Args:
            x: Tokens [B, N, D] of the layer's compute dtype.
            training: Whether dropout is active.
            merged: What `merge_projections` gives; computed here by default.
            mask: Added to the scores, [N]: far below 0 for what is no token.

        Returns:
            Tokens [B, N, D] of the layer's compute dtype.
        """
        y = self._attend_merged(
            self.attention_norm(x), merged or self.merged_projections(), mask, training
        )
        x = x + y  # (B, N, D)
        return x + self.mlp(self.mlp_norm(x), training=training)  # (B, N, D)

    def compute_output_spec(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the input's specification."""
        return keras.KerasTensor(x.shape, self.compute_dtype)

    def _attend_merged(
        self, y: Any, merged: tuple[Any, ...], mask: Any, training: bool | None
    ) -> Any:
        tokens, width, heads = y.shape[1], y.shape[2], self.num_heads
        a, c, b_kernel, b = (ops.cast(w, y.dtype) for w in merged)
        rows = ops.reshape(y, (-1, width))  # (B x N, D)
        queries = ops.reshape(ops.matmul(rows, a) + c, (-1, tokens * heads, width))
        scores = ops.matmul(queries, ops.transpose(y, (0, 2, 1)))  # (B, N x H, N)
        if mask is not None:
            scores = scores + ops.cast(mask, scores.dtype)
        weights = self.attention_dropout(ops.softmax(scores), training=training)
        mixed = ops.reshape(ops.matmul(weights, y), (-1, heads * width))  # (B x N, H x D)
        # Dropout leaves rows that do not sum to 1, so the values' bias counts that often.
        sums = ops.reshape(ops.sum(weights, axis=-1), (-1, heads, 1))  # (B x N, H, 1)
        # Not a matrix product: of so few rows, XLA would pad them.
        bias = ops.sum(sums * b, axis=1) + ops.cast(self.attention.output_dense.bias, y.dtype)
        return ops.reshape(ops.matmul(mixed, b_kernel) + bias, (-1, tokens, width))


def merge_projections(blocks: Sequence[FusedTransformerBlock]) -> list[tuple[Any, Any, Any, Any]]:
    """The products of each head's projections, of all blocks in one batch, in the variables' dtype.

    Args:
        blocks: Of one shape.

    Returns:
        For each block: A [D, H x D] and c [H x D], with the 1/√K of the scores; B [H x D, D] and b
        [H, D].
    """

    def stack(variables: list[Any]) -> Any:
        return ops.concatenate([ops.expand_dims(v, 0) for v in variables])  # (L, ...)

    attention = [block.attention for block in blocks]
    scale = blocks[0].key_dim ** -0.5
    # (L, H, K, D), (L, H, D, K), (L, H, D, K), (L, H, K, D)
    key = ops.transpose(stack([x.key_dense.kernel for x in attention]), (0, 2, 3, 1)) * scale
    query = ops.transpose(stack([x.query_dense.kernel for x in attention]), (0, 2, 1, 3))
    value = ops.transpose(stack([x.value_dense.kernel for x in attention]), (0, 2, 1, 3))
    output = stack([x.output_dense.kernel for x in attention])
    layers, heads, _, width = output.shape
    a = ops.transpose(ops.matmul(query, key), (0, 2, 1, 3))  # (L, D, H, D)
    c = ops.matmul(stack([x.query_dense.bias for x in attention])[:, :, None], key)  # (L, H, 1, D)
    # Adds nothing, but keeps the key's bias among the variables that have a gradient.
    c = c + 0.0 * ops.sum(stack([x.key_dense.bias for x in attention]))
    b = ops.matmul(stack([x.value_dense.bias for x in attention])[:, :, None], output)
    a = ops.reshape(a, (layers, width, heads * width))
    c = ops.reshape(c, (layers, heads * width))
    b_kernel = ops.reshape(ops.matmul(value, output), (layers, heads * width, width))
    b = ops.reshape(b, (layers, heads, width))
    return [(a[i], c[i], b_kernel[i], b[i]) for i in range(layers)]


class _Unowned(NamedTuple):
    """Layers that a layer reads and that another one has: Keras does not look in here."""

    layers: Any


@training_only
class MergedProjections(keras.layers.Layer):
    """`merge_projections` of blocks that come behind it in the network.

    One batch of products for all blocks is a tenth of the operations, which on a GPU is what small
    products cost. Output: for each block the four arrays that it is called with. A network with
    this layer keeps its weights by `save_weights`; it cannot be saved whole, as the layer has no
    configuration without the blocks.

    Args:
        blocks: Built; they keep their variables.
        **kwargs: `keras.layers.Layer` arguments.
    """

    def __init__(self, blocks: Sequence[FusedTransformerBlock], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._unowned = _Unowned(lambda: blocks)

    def call(self, x: Any) -> list[tuple[Any, ...]]:
        """Merges; x [B, N, D] only says when."""
        return merge_projections(self._unowned.layers())

    def compute_output_spec(self, x: Any) -> list[tuple[Any, ...]]:
        """Returns the specifications of `call`'s output."""
        blocks = self._unowned.layers()
        width, heads = x.shape[-1], blocks[0].num_heads
        shapes = ((width, heads * width), (heads * width,), (heads * width, width), (heads, width))
        return [tuple(keras.KerasTensor(s, self.compute_dtype) for s in shapes) for _ in blocks]


@training_only
class FullTokens(keras.layers.Layer):
    """Adds tokens up to a multiple of 8, which a GPU's matrix units want in half precision.

    Otherwise XLA adds them before each product and takes them away after it. What is added is
    masked as keys and cut off at the end (`FewerTokens`), so that it changes nothing.

    Input [B, N, D]; output [B, N', D] and the mask [N'], 0 for a token and far below it for what is
    none.
    """

    def call(self, x: Any) -> tuple[Any, Any]:
        """Pads x [B, N, D]."""
        tokens = x.shape[1]
        added = -tokens % 8
        mask = ops.where(ops.arange(tokens + added) < tokens, 0.0, -30_000.0)
        return ops.pad(x, ((0, 0), (0, added), (0, 0))), ops.cast(mask, x.dtype)

    def compute_output_spec(self, x: Any) -> tuple[Any, Any]:
        """Returns the specifications of `call`'s output."""
        batch, tokens, width = x.shape
        tokens += -tokens % 8
        return (
            keras.KerasTensor((batch, tokens, width), self.compute_dtype),
            keras.KerasTensor((tokens,), self.compute_dtype),
        )


@training_only
class FewerTokens(keras.layers.Layer):
    """The first of the tokens: [B, N', D] to [B, N, D].

    Args:
        tokens: N.
        **kwargs: `keras.layers.Layer` arguments.
    """

    def __init__(self, tokens: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokens = tokens

    def call(self, x: Any) -> Any:
        """Cuts x [B, N', D]."""
        return x[:, : self.tokens]

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns (B, N, D)."""
        return (input_shape[0], self.tokens, input_shape[2])
