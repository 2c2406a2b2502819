"""The Vision Transformer's layers, on any Keras backend.

Shapes in comments: B images, H x W pixels, C channels, N tokens (patches), P = patch_size² x C
values per patch, D = projection_dim.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929,
section 3.1, as built by the keras.io example "Image classification with Vision Transformer".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

Shape = tuple[Any, ...]


def training_only(layer: Any) -> Any:
    """Marks a layer, or a class of layers, that inference does without.

    Args:
        layer: Passes its input on in inference, or prepares what `trainer/network/inference.py`
            computes once. The mark of a single layer is not kept when it is serialized.

    Returns:
        The same, which `for_inference` leaves out.
    """
    layer.training_only = True
    return layer


@keras.saving.register_keras_serializable(package="vit")
class Patches(keras.layers.Layer):
    """Cuts images into non-overlapping square patches, row by row.

    Input [B, H, W, C], output [B, (H / patch_size) x (W / patch_size), patch_size² x C]; within a
    patch the values run over rows, then columns, then channels. No weights.

    Args:
        patch_size: Side of a patch in pixels.
        **kwargs: `keras.layers.Layer` arguments.

    Raises:
        ValueError: `patch_size` is not positive, or (when built) does not divide the image.
    """

    def __init__(self, patch_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if patch_size < 1:
            raise ValueError(f"patch_size is {patch_size}: it must be at least 1 pixel.")
        self.patch_size = patch_size

    def build(self, input_shape: Shape) -> None:
        """Checks the image's size; there is nothing to create."""
        self._grid(input_shape)
        self.built = True

    def call(self, images: Any) -> Any:
        """Cuts the images.

        Args:
            images: [B, H, W, C], any float dtype.

        Returns:
            [B, N, P] of the same dtype.
        """
        rows, columns = self._grid(images.shape)
        size, channels = self.patch_size, images.shape[3]
        # A reshape and a transpose: the same values in the same order as
        # `ops.image.extract_patches`, which some backends run as a convolution with P filters.
        x = ops.reshape(images, (-1, rows, size, columns, size, channels))
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))  # (B, rows, columns, size, size, C)
        return ops.reshape(x, (-1, rows * columns, size * size * channels))  # (B, N, P)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns (B, N, P)."""
        rows, columns = self._grid(input_shape)
        return (input_shape[0], rows * columns, self.patch_size**2 * input_shape[3])

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "patch_size": self.patch_size}

    def _grid(self, shape: Shape) -> tuple[int, int]:
        if len(shape) != 4 or shape[1] is None or shape[2] is None or shape[3] is None:
            raise ValueError(
                f"Patches needs images of a fixed size, [batch, height, width, channels], but "
                f"got shape {tuple(shape)}: resize them first."
            )
        height, width = shape[1], shape[2]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"Images of {height} x {width} pixels cannot be cut into whole patches of "
                f"patch_size {self.patch_size}: choose a patch_size that divides both, or resize."
            )
        return height // self.patch_size, width // self.patch_size


@keras.saving.register_keras_serializable(package="vit")
class PatchEmbedding(keras.layers.Layer):
    """Projects patches linearly to tokens and adds a learned embedding of each position.

    Input [B, N, P], output [B, N, D]. Variables: `projection` kernel [P, D] and bias [D],
    `position_embedding` [N, D].

    Args:
        projection_dim: Width D of a token.
        **kwargs: `keras.layers.Layer` arguments.

    Raises:
        ValueError: `projection_dim` is not positive, or (when built) N is not fixed.
    """

    def __init__(self, projection_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if projection_dim < 1:
            raise ValueError(f"projection_dim is {projection_dim}: it must be at least 1.")
        self.projection_dim = projection_dim

    def build(self, input_shape: Shape) -> None:
        """Creates the variables for N positions."""
        if len(input_shape) != 3 or input_shape[1] is None:
            raise ValueError(
                f"PatchEmbedding needs a fixed number of patches, [batch, patches, values], but "
                f"got shape {tuple(input_shape)}: feed it the output of Patches."
            )
        self.num_patches = int(input_shape[1])
        self.projection = keras.layers.Dense(
            self.projection_dim, dtype=self.dtype_policy, name="projection"
        )
        self.projection.build(input_shape)
        self.position_embedding = keras.layers.Embedding(
            self.num_patches, self.projection_dim, dtype=self.dtype_policy, name="positions"
        )
        self.position_embedding.build()
        self.built = True

    def call(self, patches: Any) -> Any:
        """Embeds the patches.

        Args:
            patches: [B, N, P] of the layer's compute dtype.

        Returns:
            Tokens [B, N, D] of the layer's compute dtype.
        """
        positions = self.position_embedding(ops.arange(self.num_patches))  # (N, D)
        return self.projection(patches) + positions  # (B, N, D)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns (B, N, D)."""
        return (input_shape[0], input_shape[1], self.projection_dim)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "projection_dim": self.projection_dim}


@keras.saving.register_keras_serializable(package="vit")
class MLP(keras.layers.Layer):
    """Dense layers, each followed by GELU (exact, not the tanh approximation) and dropout.

    Input [..., M], output [..., hidden_units[-1]].

    Args:
        hidden_units: Width of each dense layer.
        dropout_rate: Dropout after each of them, active in training only.
        linear_output: Whether the last dense layer goes without GELU.
        **kwargs: `keras.layers.Layer` arguments.

    Raises:
        ValueError: `hidden_units` is empty.
    """

    dropout_class: type[keras.layers.Layer] = keras.layers.Dropout

    def __init__(
        self,
        hidden_units: Sequence[int],
        dropout_rate: float,
        linear_output: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not hidden_units:
            raise ValueError("hidden_units is empty: give the MLP at least one width.")
        self.hidden_units = tuple(hidden_units)
        self.dropout_rate = dropout_rate
        self.linear_output = linear_output
        activations: list[str | None] = ["gelu"] * len(self.hidden_units)
        if linear_output:
            activations[-1] = None
        self.dense_layers = [
            keras.layers.Dense(
                units, activation=activation, dtype=self.dtype_policy, name=f"dense_{index}"
            )
            for index, (units, activation) in enumerate(zip(self.hidden_units, activations))
        ]
        self.dropout_layers = [
            self.dropout_class(dropout_rate, dtype=self.dtype_policy, name=f"dropout_{index}")
            for index in range(len(self.hidden_units))
        ]

    def build(self, input_shape: Shape) -> None:
        """Creates the dense layers' variables."""
        for dense in self.dense_layers:
            dense.build(input_shape)
            input_shape = dense.compute_output_shape(input_shape)
        self.built = True

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Applies the layers.

        Args:
            x: [..., M] of the layer's compute dtype.
            training: Whether dropout is active.

        Returns:
            [..., hidden_units[-1]] of the layer's compute dtype.
        """
        for dense, dropout in zip(self.dense_layers, self.dropout_layers, strict=True):
            x = dropout(dense(x), training=training)  # (..., units)
        return x

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the input's shape with the last width."""
        return (*input_shape[:-1], self.hidden_units[-1])

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "hidden_units": list(self.hidden_units),
            "dropout_rate": self.dropout_rate,
            "linear_output": self.linear_output,
        }


@keras.saving.register_keras_serializable(package="vit")
class TransformerBlock(keras.layers.Layer):
    """A pre-norm encoder block: x + MHA(LN(x)), then x + MLP(LN(x)).

    Input and output [B, N, D].

    Args:
        num_heads: Attention heads.
        key_dim: Width of one head's query, key and value.
        mlp_units: Widths of the MLP; the last must be D, for the residual sum.
        dropout_rate: Dropout of the attention weights and in the MLP, active in training only.
        layer_norm_epsilon: Added to the variance in both layer normalizations.
        linear_mlp_output: Whether the MLP's last layer goes without GELU.
        **kwargs: `keras.layers.Layer` arguments.

    Raises:
        ValueError: `mlp_units` is empty, or (when built) does not end with D.
    """

    mlp_class: type[MLP] = MLP
    norm_class: type[keras.layers.Layer] = keras.layers.LayerNormalization

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        mlp_units: Sequence[int],
        dropout_rate: float,
        layer_norm_epsilon: float,
        linear_mlp_output: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.mlp_units = tuple(mlp_units)
        self.dropout_rate = dropout_rate
        self.layer_norm_epsilon = layer_norm_epsilon
        self.linear_mlp_output = linear_mlp_output
        self.attention_norm = self.norm_class(
            epsilon=layer_norm_epsilon, dtype=self.dtype_policy, name="attention_norm"
        )
        self.attention = keras.layers.MultiHeadAttention(
            num_heads,
            key_dim,
            dropout=dropout_rate,
            dtype=self.dtype_policy,
            name="attention",
        )
        self.mlp_norm = self.norm_class(
            epsilon=layer_norm_epsilon, dtype=self.dtype_policy, name="mlp_norm"
        )
        self.mlp = self.mlp_class(
            self.mlp_units, dropout_rate, linear_mlp_output, dtype=self.dtype_policy, name="mlp"
        )

    def build(self, input_shape: Shape) -> None:
        """Creates the variables of the four sub-layers."""
        if len(input_shape) != 3 or self.mlp_units[-1] != input_shape[-1]:
            raise ValueError(
                f"mlp_units is {self.mlp_units}, but the block adds the MLP's output to its "
                f"input of shape {tuple(input_shape)}: end mlp_units with {input_shape[-1]}."
            )
        self.attention_norm.build(input_shape)
        self.attention.build(input_shape, input_shape)
        self.mlp_norm.build(input_shape)
        self.mlp.build(input_shape)
        self.built = True

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Applies the block.

        Args:
            x: Tokens [B, N, D] of the layer's compute dtype.
            training: Whether dropout is active.

        Returns:
            Tokens [B, N, D] of the layer's compute dtype.
        """
        y = self.attention_norm(x)  # (B, N, D)
        x = x + self.attention(y, y, training=training)  # (B, N, D)
        return x + self.mlp(self.mlp_norm(x), training=training)  # (B, N, D)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "mlp_units": list(self.mlp_units),
            "dropout_rate": self.dropout_rate,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "linear_mlp_output": self.linear_mlp_output,
        }
