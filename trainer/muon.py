"""Muon, for whole models: with convolutions, fused projections and TensorFlow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="vit")
class Muon(keras.optimizers.Muon):
    """Momentum whose update of a matrix is made orthogonal; Adam for what is not a matrix.

    Keras's optimizer, and beyond it: kernels of convolutions, as matrices of [height x width x
    channels, filters]; kernels that several projections share, each made orthogonal by itself; and
    learning rates that are right for Keras's kernels, which are [inputs, outputs] (the source's
    are the other way round). Keras's, as of 3.12, does not run with TensorFlow: it looks for a
    layer's name in a variable that has none there.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
    https://kellerjordan.github.io/posts/muon/.

    Args:
        learning_rate: Of matrices; Adam's is `adam_lr_ratio` times that.
        exclude_layers: What is in the paths of variables that are left to Adam, besides those of
            less than two axes: embeddings and the classifier.
        projections: What is in the path of a kernel -> how many projections lie in it side by side.
        orthogonalization_dtype: To compute the orthogonal update in; bfloat16 is enough.
        **kwargs: `keras.optimizers.Muon` arguments.
    """

    def __init__(
        self,
        learning_rate: Any = 0.02,
        exclude_layers: Any = (),
        projections: Mapping[str, int] | None = None,
        orthogonalization_dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, exclude_layers=list(exclude_layers), **kwargs)
        self.projections = dict(projections or {})
        self.orthogonalization_dtype = orthogonalization_dtype

    def _should_use_adamw(self, variable: Any) -> bool:
        # Keras leaves convolutions, which have four axes, to Adam.
        return len(variable.shape) < 2 or any(word in variable.path for word in self.exclude_layers)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable by its gradient, of the same shape."""
        # With TensorFlow, `variable` is not Keras's, which alone has a path.
        reference = self._trainable_variables[self._get_variable_index(variable)]
        if self._should_use_adamw(reference):
            self._adam_step(gradient, variable, reference.path, learning_rate)
            return
        momentum = self.adam_momentums[reference.path]
        accumulated = momentum * self.momentum + gradient
        self.assign(momentum, accumulated)
        inputs, parts, outputs = self._matrix_shape(reference)
        update = gradient + self.momentum * accumulated if self.nesterov else accumulated
        update = ops.reshape(update, (inputs, parts, outputs))
        matrices = [update[:, part] for part in range(parts)]
        update = ops.stack([self._orthogonal(matrix) for matrix in matrices], axis=1)
        update = ops.reshape(update, reference.shape)
        wide = max(1.0, outputs / inputs) ** 0.5
        self.assign_sub(variable, update * (ops.cast(learning_rate, update.dtype) * wide))

    def _orthogonal(self, matrix: Any) -> Any:
        """The orthogonal matrix nearest to a matrix [inputs, outputs], about."""
        # Of norm 1 before it is rounded, so that any dtype can hold it.
        x = ops.cast(matrix / (ops.norm(matrix) + 1e-7), self.orthogonalization_dtype)
        return ops.cast(self.zeropower_via_newtonschulz5(x, self.ns_steps), matrix.dtype)

    def _matrix_shape(self, kernel: Any) -> tuple[int, int, int]:
        """(inputs, projections side by side, outputs of each)."""
        shape = kernel.shape
        # `MultiHeadAttention` has [D, heads, width] to its heads, and [heads, width, D] from them.
        to_heads = len(shape) == 3 and "attention_output" not in kernel.path
        inputs = shape[0] if to_heads else math.prod(shape[:-1])
        parts = next((n for word, n in self.projections.items() if word in kernel.path), 1)
        return inputs, parts, math.prod(shape) // inputs // parts

    def _adam_step(self, gradient: Any, variable: Any, path: str, learning_rate: Any) -> None:
        momentum, velocity = self.adam_momentums[path], self.adam_velocities[path]
        step = ops.cast(self.iterations + 1, "float32")
        self.assign_add(momentum, (gradient - momentum) * (1 - self.adam_beta_1))
        self.assign_add(velocity, (ops.square(gradient) - velocity) * (1 - self.adam_beta_2))
        rate = ops.cast(learning_rate, "float32") * self.adam_lr_ratio
        rate *= ops.sqrt(1 - self.adam_beta_2**step) / (1 - self.adam_beta_1**step)
        self.assign_sub(variable, momentum * rate / (ops.sqrt(velocity) + self.epsilon))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "projections": dict(self.projections),
            "orthogonalization_dtype": self.orthogonalization_dtype,
        }
