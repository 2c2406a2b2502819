"""Muon, for whole models: with convolutions, fused projections and TensorFlow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

# Of the quintic iteration, from the source: steep at 0, and not quite settling at 1.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# In the paths of the classifier's variables, which are new where the classes are others.
CLASSIFIER = "logits"


@keras.saving.register_keras_serializable(package="vit")
class Muon(keras.optimizers.Optimizer):
    """Momentum whose update of a matrix is made orthogonal; Adam for what is not a matrix.

    Matrices are kernels of dense layers, [inputs, outputs]; those of convolutions, as [height x
    width x channels, filters]; and each of the projections that share a kernel by itself. Weight
    decay is Keras's, for all variables alike.

    `keras.optimizers.Muon` is not used: in Keras 3.12 it does not run with TensorFlow (it looks for
    a layer's name in a variable that has none there), in 3.15 it decays Adam's variables by
    another rate; both leave convolutions to Adam, and scale updates for kernels that lie the other
    way round.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
    https://kellerjordan.github.io/posts/muon/.

    Args:
        learning_rate: Of matrices; Adam's is `adam_lr_ratio` times that.
        momentum: Of matrices, in Nesterov's form.
        ns_steps: Of the Newton-Schulz iteration that makes an update orthogonal, about.
        exclude_layers: What is in the paths of variables that are left to Adam, besides those of
            less than two axes: embeddings and the classifier.
        projections: What is in the path of a kernel -> how many projections lie in it side by side.
        orthogonalization_dtype: To compute the orthogonal update in; bfloat16 is enough.
        adam_lr_ratio: See `learning_rate`.
        adam_beta_1: Adam's β₁.
        adam_beta_2: Adam's β₂.
        epsilon: Adam's ε.
        base_ratio: Factor of the learning rate of all variables but the classifier's.
        name: The optimizer's.
        **kwargs: `keras.optimizers.Optimizer` arguments.
    """

    def __init__(
        self,
        learning_rate: Any = 0.02,
        momentum: float = 0.95,
        ns_steps: int = 5,
        exclude_layers: Sequence[str] = (),
        projections: Mapping[str, int] | None = None,
        orthogonalization_dtype: str = "float32",
        adam_lr_ratio: float = 0.1,
        adam_beta_1: float = 0.9,
        adam_beta_2: float = 0.999,
        epsilon: float = 1e-7,
        base_ratio: float = 1.0,
        name: str = "muon",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, name=name, **kwargs)
        self.momentum = momentum
        self.ns_steps = ns_steps
        self.exclude_layers = list(exclude_layers)
        self.projections = dict(projections or {})
        self.orthogonalization_dtype = orthogonalization_dtype
        self.adam_lr_ratio = adam_lr_ratio
        self.adam_beta_1 = adam_beta_1
        self.adam_beta_2 = adam_beta_2
        self.epsilon = epsilon
        self.base_ratio = base_ratio

    def build(self, variables: list[Any]) -> None:
        """Creates a momentum for each variable, and a velocity for those of Adam."""
        if self.built:
            return
        super().build(variables)
        self._momentums = [self.add_variable_from_reference(v, "momentum") for v in variables]
        self._velocities = [
            self.add_variable_from_reference(v, "velocity") if self.is_adams(v) else None
            for v in variables
        ]

    def is_adams(self, variable: Any) -> bool:
        """Whether Adam updates a variable of the model."""
        return len(variable.shape) < 2 or any(word in variable.path for word in self.exclude_layers)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable by its gradient, of the same shape."""
        index = self._get_variable_index(variable)
        # With TensorFlow, `variable` is not Keras's, which alone has a path.
        reference = self._trainable_variables[index]
        if CLASSIFIER not in reference.path:
            learning_rate = learning_rate * self.base_ratio
        if self.is_adams(reference):
            self._adam_step(gradient, variable, index, learning_rate)
            return
        momentum = self._momentums[index]
        accumulated = momentum * self.momentum + gradient
        self.assign(momentum, accumulated)
        update = self.orthogonal_update(reference, gradient + self.momentum * accumulated)
        self.assign_sub(variable, update * ops.cast(learning_rate, update.dtype))

    def orthogonal_update(self, variable: Any, update: Any) -> Any:
        """Makes the update of a variable's matrices orthogonal, and as large as they are wide.

        Args:
            variable: One that is not Adam's.
            update: Of its shape.

        Returns:
            What to subtract for each unit of the learning rate, of the same shape.
        """
        matrices = self.matrices(variable, update)
        return self.values(variable, self.orthogonal(matrices) * self.scale(variable))

    def orthogonal(self, matrices: Any) -> Any:
        """The orthogonal matrix nearest to each of [number, inputs, outputs], about."""
        # Of norm 1 before they are rounded, so that any dtype can hold them.
        norms = ops.sqrt(ops.sum(ops.square(matrices), axis=(1, 2), keepdims=True))
        x = ops.cast(matrices / (norms + 1e-7), self.orthogonalization_dtype)
        is_tall = matrices.shape[1] > matrices.shape[2]  # then the other product is the smaller one
        if is_tall:
            x = ops.transpose(x, (0, 2, 1))
        a, b, c = _NEWTON_SCHULZ
        for _ in range(self.ns_steps):
            gram = ops.matmul(x, ops.transpose(x, (0, 2, 1)))
            x = a * x + ops.matmul(b * gram + c * ops.matmul(gram, gram), x)
        return ops.cast(ops.transpose(x, (0, 2, 1)) if is_tall else x, matrices.dtype)

    def matrices(self, kernel: Any, values: Any) -> Any:
        """Cuts a kernel's values into its matrices.

        Args:
            kernel: A variable that is not Adam's.
            values: Of its shape.

        Returns:
            [projections side by side, inputs, outputs of each].
        """
        parts_last = ops.reshape(values, self.matrix_shape(kernel))
        return ops.transpose(parts_last, (1, 0, 2))

    def values(self, kernel: Any, matrices: Any) -> Any:
        """Joins what `matrices` has cut to the kernel's shape."""
        return ops.reshape(ops.transpose(matrices, (1, 0, 2)), kernel.shape)

    def scale(self, kernel: Any) -> float:
        """Factor of the update of a kernel's matrices: √max(1, outputs / inputs)."""
        inputs, _, outputs = self.matrix_shape(kernel)
        return max(1.0, outputs / inputs) ** 0.5

    def matrix_shape(self, kernel: Any) -> tuple[int, int, int]:
        """(inputs, projections side by side, outputs of each)."""
        shape = kernel.shape
        # `MultiHeadAttention` has [D, heads, width] to its heads, and [heads, width, D] from them.
        to_heads = len(shape) == 3 and "attention_output" not in kernel.path
        inputs = shape[0] if to_heads else math.prod(shape[:-1])
        parts = next((n for word, n in self.projections.items() if word in kernel.path), 1)
        return inputs, parts, math.prod(shape) // inputs // parts

    def _adam_step(self, gradient: Any, variable: Any, index: int, learning_rate: Any) -> None:
        momentum, velocity = self._momentums[index], self._velocities[index]
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
            "momentum": self.momentum,
            "ns_steps": self.ns_steps,
            "exclude_layers": list(self.exclude_layers),
            "projections": dict(self.projections),
            "orthogonalization_dtype": self.orthogonalization_dtype,
            "adam_lr_ratio": self.adam_lr_ratio,
            "adam_beta_1": self.adam_beta_1,
            "adam_beta_2": self.adam_beta_2,
            "epsilon": self.epsilon,
            "base_ratio": self.base_ratio,
        }
