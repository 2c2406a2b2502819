"""The Vision Transformer of a preset, as a functional Keras model on any backend."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import keras

from trainer.network.augment import augmentation_layers
from trainer.network.compact_layers import (
    BatchNormBlock,
    ConvolutionalTokenizer,
    FusedBatchNormalization,
    SequencePooling,
)
from trainer.network.fast_layers import (
    FewerTokens,
    FoldedPatchEmbedding,
    FullTokens,
    FusedTransformerBlock,
    MergedProjections,
)
from trainer.network.layers import MLP, PatchEmbedding, Patches, TransformerBlock, training_only
from trainer.preset import Architecture, Preset


def build_model(
    preset: Preset,
    shape: tuple[int, int, int],
    num_classes: int,
    *,
    seed: int | None = None,
    plain: bool = False,
) -> keras.Model:
    """Builds an untrained, uncompiled classifier of normalized images.

    Resizing and augmentation are part of the model, as in the keras.io example; augmentation and
    dropout act in training only. Normalization is not: the caller does it.

    Args:
        preset: The architecture.
        shape: Height, width and channels of the images.
        num_classes: Number of logits.
        seed: Fixes the initial weights and the streams of dropout and augmentation (the same seed
            gives the same model on the same backend); None draws fresh ones.
        plain: Compute as the reference does, step by step, in place of
            `trainer/network/fast_layers.py`.
            The variables are the same ones, and the outputs up to rounding. In training the fast
            layers draw other random numbers, and augmentation resamples images once and before
            they are resized.

    Returns:
        A model from `image`, normalized float32 [N, *shape], to logits, float32
        [N, num_classes], also under a mixed-precision policy.

    Raises:
        ValueError: `num_classes` or `shape` is not positive.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}: it must be at least 1.")
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"shape is {tuple(shape)}: it must be (height, width, channels), each at least 1."
        )
    with _default_seeds(seed):
        return _build(preset, tuple(shape), num_classes, plain)


def _build(preset: Preset, shape: tuple[int, ...], num_classes: int, plain: bool) -> keras.Model:
    architecture, training = preset.architecture, preset.training
    image = keras.Input(shape, dtype="float32", name="image")  # (B, H, W, C)
    if plain or architecture.embedding == "convolutions":
        x = _embed_plainly(preset, image)  # (B, N, D)
    else:
        x = _embed(preset, image)  # (B, N, D)
    x = _encode(preset, x, shape[0], plain)  # (B, N, D)
    if architecture.block == "batch_norm":
        x = FusedBatchNormalization(name="norm")(x)
    else:
        x = keras.layers.LayerNormalization(epsilon=architecture.layer_norm_epsilon, name="norm")(x)
    if architecture.sequence_pooling:
        x = SequencePooling(name="pool")(x)  # (B, D)
    else:
        # All tokens side by side rather than a class token (the paper) or their mean.
        x = keras.layers.Flatten(name="flatten")(x)  # (B, N x D)
    x = training_only(keras.layers.Dropout(training.head_dropout_rate, name="head_dropout"))(x)
    if architecture.mlp_head_units:
        x = MLP(architecture.mlp_head_units, training.head_dropout_rate, name="head")(x)
    # float32 so that the softmax of the loss and the served probabilities do not lose digits.
    logits = keras.layers.Dense(num_classes, dtype="float32", name="logits")(x)
    network = keras.Model(image, logits, name=preset.name)
    for layer in network._flatten_layers():
        if isinstance(layer, FusedBatchNormalization):
            # The averaged weights are evaluated with statistics that are averaged as long.
            layer.momentum = max(layer.momentum, training.ema_momentum)
    return network


def _encode(
    preset: Preset, x: keras.KerasTensor, image_height: int, plain: bool
) -> keras.KerasTensor:
    """The blocks, one after the other: tokens [B, N, D] to tokens [B, N, D]."""
    blocks = []
    for index in range(preset.architecture.transformer_layers):
        blocks.append(_block(preset, index, image_height, plain))
        blocks[-1].build(x.shape)  # in turn, as each draws seeds for its weights
    if keras.config.backend() != "jax" or not isinstance(blocks[0], FusedTransformerBlock):
        for block in blocks:
            x = block(x)
        return x
    projections = MergedProjections(blocks, name="projections")(x)
    tokens, mask = x.shape[1], None
    if tokens % 8 and keras.config.dtype_policy().compute_dtype != "float32":
        x, mask = FullTokens(name="full_tokens")(x)
    for block, merged in zip(blocks, projections):
        x = block(x, merged=merged, mask=mask)
    return x if mask is None else FewerTokens(tokens, name="fewer_tokens")(x)


def _grid_height(architecture: Architecture, image_height: int) -> int | None:
    """Rows of tokens, where blocks have to know it."""
    if not architecture.depthwise_convolution:
        return None
    side = architecture.resize or image_height
    if architecture.embedding == "convolutions":
        return math.ceil(side / 2 ** (len(architecture.tokenizer_filters) - 1))
    return side // architecture.patch_size


def _block(preset: Preset, index: int, image_height: int, plain: bool) -> keras.layers.Layer:
    name, architecture = f"block_{index}", preset.architecture
    if architecture.block == "batch_norm":
        return BatchNormBlock(
            architecture.num_heads,
            architecture.key_dim,
            architecture.transformer_units[0],
            architecture.depthwise_convolution,
            _grid_height(architecture, image_height),
            name=name,
        )
    options: dict[str, Any] = {
        "num_heads": architecture.num_heads,
        "key_dim": architecture.key_dim,
        "mlp_units": architecture.transformer_units,
        "dropout_rate": preset.training.dropout_rate,
        "layer_norm_epsilon": architecture.layer_norm_epsilon,
        "linear_mlp_output": architecture.linear_mlp_output,
        "name": name,
    }
    # Below that width the products of projections are larger than the projections.
    fuse = not plain and architecture.key_dim >= architecture.projection_dim
    return (FusedTransformerBlock if fuse else TransformerBlock)(**options)


def _embed_plainly(preset: Preset, x: keras.KerasTensor) -> keras.KerasTensor:
    """Resize, augment, cut, project: images [B, H, W, C] to tokens [B, N, D]."""
    architecture = preset.architecture
    size = architecture.resize
    if size and x.shape[1:3] != (size, size):
        resize = keras.layers.Resizing(
            size, size, interpolation="bilinear", dtype="float32", name="resize"
        )
        x = resize(x)  # (B, size, size, C)
    for layer in augmentation_layers(preset.augmentation):
        x = layer(x)  # (B, H, W, C)
    if architecture.embedding == "convolutions":
        tokenizer = ConvolutionalTokenizer(
            architecture.tokenizer_filters, architecture.tokenizer_residual_pairs, name="tokenizer"
        )
        return tokenizer(x)  # (B, N, D)
    x = Patches(architecture.patch_size, name="patches")(x)  # (B, N, P)
    return PatchEmbedding(architecture.projection_dim, name="patch_embedding")(x)  # (B, N, D)


def _embed(preset: Preset, x: keras.KerasTensor) -> keras.KerasTensor:
    """The same, augmented by one resampling at the images' own size, and resized in the fold."""
    for layer in augmentation_layers(preset.augmentation, in_one=True):
        x = layer(x)  # (B, H, W, C)
    architecture = preset.architecture
    embedding = FoldedPatchEmbedding(
        architecture.projection_dim,
        architecture.resize,
        architecture.patch_size,
        name="patch_embedding",
    )
    return embedding(x)  # (B, N, D)


@contextlib.contextmanager
def _default_seeds(seed: int | None) -> Iterator[None]:
    """Makes the seeds that Keras draws for unseeded layers reproducible, and only those.

    An initializer or layer without a seed takes one from Python's `random` (in
    `keras.random.SeedGenerator` and every random initializer). Seeding that stream gives each of
    them its own fixed seed. Passing one number to each would not do: `MultiHeadAttention` copies
    its initializer, seed included, so that query, key and value would start out identical. And
    `keras.utils.set_random_seed` would reseed the whole process for good.
    """
    if seed is None:
        yield
        return
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
