"""A trained model for serving: everything that does not depend on the images, computed once."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from trainer.network.compact_layers import (
    BatchNormBlock,
    ConvolutionalTokenizer,
    attend,
    mix_neighbours,
)
from trainer.network.fast_layers import FoldedPatchEmbedding, FusedTransformerBlock
from trainer.network.layers import Shape


def for_inference(network: keras.Model) -> keras.Model:
    """Rewrites a network of `trainer.network.model.build_model` for inference alone.

    What is marked as `training_only` is left out, products of weights are multiplied out, the scale
    and shift of layer normalizations are part of the projections behind them, and so are whole
    batch normalizations, or of the convolutions before them. At one image per call, where the
    number of operations is what takes the time, that is worth as much as at many.

    Args:
        network: A chain of layers with trained weights; it is not changed. Layers that there is
            nothing to gain from are shared with it.

    Returns:
        A model of the same inputs and outputs, equal up to rounding; the network itself where
        none of its layers can be rewritten or left out.
    """
    if not any(_is_left_out(layer) or type(layer) in _REWRITTEN for layer in network.layers):
        return network
    x = network.input
    for layer in network.layers:
        if isinstance(layer, keras.layers.InputLayer) or _is_left_out(layer):
            continue
        rewrite = _REWRITTEN.get(type(layer))
        x = (rewrite(layer) if rewrite else layer)(x, training=False)
    return keras.Model(network.input, x, name=network.name)


def _is_left_out(layer: keras.layers.Layer) -> bool:
    return getattr(layer, "training_only", False)


class _Frozen(keras.layers.Layer):
    """Holds constants as variables, so that a SavedModel's signatures share them."""

    def __init__(self, constants: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(trainable=False, **kwargs)
        for name, value in constants.items():
            array = ops.convert_to_numpy(value).astype(np.float32)
            weight = self.add_weight(
                shape=array.shape, initializer="zeros", trainable=False, name=name
            )
            weight.assign(array)
            setattr(self, name, weight)
        self.built = True


class _FrozenEmbedding(_Frozen):
    """`FoldedPatchEmbedding` with its kernel multiplied out."""

    def __init__(self, layer: FoldedPatchEmbedding) -> None:
        positions = layer.position_embedding.embeddings + layer.projection.bias
        constants = {
            "kernel": layer.folded_kernel(),
            "positions": ops.expand_dims(positions, 1),  # (N, 1, D)
        }
        super().__init__(constants, dtype=layer.dtype_policy, name=layer.name)
        self._windows = layer.windows
        self._shape = (layer.num_patches, layer.projection_dim)

    def call(self, images: Any) -> Any:
        """Images [B, height, width, C] to tokens [B, N, D]."""
        windows = ops.cast(self._windows(images), self.compute_dtype)
        return ops.transpose(ops.matmul(windows, self.kernel) + self.positions, (1, 0, 2))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns (B, N, D)."""
        return (input_shape[0], *self._shape)


class _FrozenBlock(_Frozen):
    """`FusedTransformerBlock`, its normalizations' scale γ and shift β in the projections.

    With n the normalized tokens, y = n γ + β, and A, c, B, b as in the block:

        scores_h = (y A + c) yᵀ = (n (γ A γᵀ) + (β A + c) γ) nᵀ + what is the same for all keys
        output   = Σ_h P_h n (γ B) + Σ_h (β B + b), as the rows of P sum to 1

    Of GELU's three factors, x / 2 · (1 + erf(x √½)) = √½ · z (1 + erf z) with z = x √½, those of √½
    are in the kernels around it, too.

    The tokens' mean over D is left out of the output: it is read by layer normalizations alone,
    here and at the end, which subtract it. With output_kernel and its bias of mean 0 as well, the
    second normalization has nothing to subtract.
    """

    def __init__(self, block: FusedTransformerBlock) -> None:
        a, c, b_kernel, b = map(ops.convert_to_numpy, block.merged_projections())
        heads, width = b.shape
        gamma, beta = map(ops.convert_to_numpy, block.attention_norm.weights)
        scale = np.tile(gamma, heads)
        constants = {
            "query_kernel": gamma[:, None] * a * scale,  # (D, H x D)
            "query_bias": (beta @ a + c) * scale,
            "output_kernel": _centred(scale[:, None] * b_kernel),  # (H x D, D)
            "output_bias": _centred(
                np.tile(beta, heads) @ b_kernel
                + b.sum(axis=0)
                + ops.convert_to_numpy(block.attention.output_dense.bias)
            ),
        }
        gamma, beta = map(ops.convert_to_numpy, block.mlp_norm.weights)
        mlp, factor = [], 1.0  # the factor that the layer's input still lacks
        for index, dense in enumerate(block.mlp.dense_layers):
            kernel, bias = map(ops.convert_to_numpy, dense.weights)
            if index == 0:
                kernel, bias = gamma[:, None] * kernel, beta @ kernel + bias
            kernel = kernel * factor
            is_gelu = dense.activation is keras.activations.gelu
            factor = 0.5**0.5 if is_gelu else 1.0
            constants |= {f"kernel_{index}": kernel * factor, f"bias_{index}": bias * factor}
            mlp.append((f"kernel_{index}", f"bias_{index}", is_gelu))
        super().__init__(constants, dtype=block.dtype_policy, name=block.name)
        self._heads, self._width = heads, width
        self._epsilon = block.layer_norm_epsilon
        self._mlp, self._factor = mlp, factor

    def call(self, x: Any) -> Any:
        """Tokens [B, N, D] to tokens [B, N, D], up to their mean."""
        tokens, heads, width = x.shape[1], self._heads, self._width
        x = _centred(x)
        n = _scaled(x, self._epsilon)  # (B, N, D)
        rows = ops.reshape(n, (-1, width))
        queries = ops.matmul(rows, self.query_kernel) + self.query_bias
        queries = ops.reshape(queries, (-1, tokens * heads, width))
        weights = ops.softmax(ops.matmul(queries, ops.transpose(n, (0, 2, 1))))  # (B, N x H, N)
        mixed = ops.reshape(ops.matmul(weights, n), (-1, heads * width))  # (B x N, H x D)
        y = ops.matmul(mixed, self.output_kernel) + self.output_bias
        x = ops.reshape(x, (-1, width)) + y  # (B x N, D)
        y = _scaled(x, self._epsilon)
        for kernel, bias, is_gelu in self._mlp:
            y = ops.matmul(y, getattr(self, kernel)) + getattr(self, bias)
            y = y * (1.0 + ops.erf(y)) if is_gelu else y
        return ops.reshape(x + y * self._factor, (-1, tokens, width))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the input's shape."""
        return input_shape


class _FrozenTokenizer(_Frozen):
    """`ConvolutionalTokenizer`, its normalizations' scale in the kernels, their shift as a bias."""

    def __init__(self, layer: ConvolutionalTokenizer) -> None:
        constants = {"positions": layer.positions}
        for convolution in (c for stage in layer.stages for c in stage):
            scale, shift = convolution.norm.folded()
            constants |= {
                f"{convolution.name}_kernel": convolution.convolution.kernel * scale,
                f"{convolution.name}_bias": shift,
            }
        super().__init__(constants, dtype=layer.dtype_policy, name=layer.name)
        self._stages = [[(c.name, c.strides) for c in stage] for stage in layer.stages]
        self._shape = (layer.num_tokens, layer.filters[-1])

    def call(self, images: Any) -> Any:
        """Images [B, H, W, C] to tokens [B, N, D]."""
        x = ops.cast(images, self.compute_dtype)
        for entry, *residual in self._stages:
            x = ops.relu(self._convolve(x, entry))
            for first, second in zip(residual[::2], residual[1::2]):
                x = ops.relu(x + self._convolve(ops.relu(self._convolve(x, first)), second))
        return ops.reshape(x, (-1, *self._shape)) + self.positions

    def _convolve(self, x: Any, convolution: tuple[str, int]) -> Any:
        name, strides = convolution
        kernel, bias = getattr(self, f"{name}_kernel"), getattr(self, f"{name}_bias")
        return ops.conv(x, kernel, strides, padding="same") + bias

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns (B, N, D)."""
        return (input_shape[0], *self._shape)


class _FrozenBatchNormBlock(_Frozen):
    """`BatchNormBlock`, its normalizations x s + t in the products behind them.

        (x s + t) W = x (s W) + t W

    The queries' 1/√K is in their projection, too.
    """

    def __init__(self, block: BatchNormBlock) -> None:
        constants = {
            "output_kernel": block.output_kernel,
            "mlp_output_kernel": block.mlp_output_kernel,
        }
        if block.depthwise_convolution:
            constants["depthwise_kernel"] = block.depthwise_kernel
        heads = block.num_heads * block.key_dim
        queries_first = np.repeat([block.key_dim**-0.5, 1], [heads, 2 * heads]).astype(np.float32)
        for name, norm, kernel, bias in (
            ("qkv", block.attention_norm, block.qkv_kernel * queries_first, 0.0),
            ("mlp", block.mlp_norm, block.mlp_kernel, block.mlp_bias),
        ):
            scale, shift = norm.folded()
            constants |= {
                f"{name}_kernel": ops.expand_dims(scale, 1) * kernel,
                f"{name}_bias": ops.matmul(shift, kernel) + bias,
            }
        super().__init__(constants, dtype=block.dtype_policy, name=block.name)
        self._heads, self._key_dim = block.num_heads, block.key_dim
        self._depthwise, self._height = block.depthwise_convolution, block.grid_height

    def call(self, x: Any) -> Any:
        """Tokens [B, N, D] to tokens [B, N, D]."""
        tokens, width = x.shape[1:]
        x = ops.reshape(x, (-1, width))  # (B x N, D)
        projections = ops.matmul(x, self.qkv_kernel) + self.qkv_bias
        mixed = attend(projections, tokens, self._heads, self._key_dim, scale=1.0)
        x = x + ops.matmul(mixed, self.output_kernel)
        hidden = ops.matmul(x, self.mlp_kernel) + self.mlp_bias
        if self._depthwise:
            hidden = mix_neighbours(hidden, self.depthwise_kernel, tokens, self._height)
        x = x + ops.matmul(ops.relu(hidden), self.mlp_output_kernel)
        return ops.reshape(x, (-1, tokens, width))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the input's shape."""
        return input_shape


def _centred(x: Any) -> Any:
    """What a layer normalization of the last axis begins with."""
    return x - ops.mean(x, axis=-1, keepdims=True)


def _scaled(x: Any, epsilon: float) -> Any:
    """The rest of it, without scale and shift."""
    if x.dtype != "float32":
        wide = _scaled(ops.cast(x, "float32"), epsilon)
        return ops.cast(wide, x.dtype)
    return x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + epsilon)


_REWRITTEN: dict[type[keras.layers.Layer], Any] = {
    FoldedPatchEmbedding: _FrozenEmbedding,
    FusedTransformerBlock: _FrozenBlock,
    ConvolutionalTokenizer: _FrozenTokenizer,
    BatchNormBlock: _FrozenBatchNormBlock,
}
