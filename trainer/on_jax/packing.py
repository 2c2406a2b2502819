"""A network's variables in few arrays, so that an optimizer's step is few kernels.

On a GPU a small kernel takes some microseconds however little it does, and an optimizer's step is
several for each variable. Here all variables that are updated alike lie in one flat vector; the
optimizer is Keras's own, or `Muon`, built on those. Elementwise updates and the norm of all
gradients do not depend on how variables are grouped, and matrices are made orthogonal in batches
all the same, so the mathematics does not change but for rounding.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras

from trainer.muon import CLASSIFIER, Muon

# What a batch of matrices costs however small they are (five iterations of five kernels), in
# multiply-accumulates that a GPU does in that time: of more than that zeros are not worth it.
_BATCH_COST = 6e9


class Group(NamedTuple):
    """Variables that lie in one flat vector.

    Attributes:
      name: Of the packed variable.
      members: Indices of the network's trainable variables, in order.
    """

    name: str
    members: list[int]


class Packing:
    """Where each variable of a network lies.

    Args:
      network: Whose trainable variables are packed.
      plain: The network's optimizer, built: as a checkpoint has it.
      build_optimizer: Makes an optimizer of the same settings; see
        `trainer.optimizer.build_optimizer` for its argument `muon`.

    Attributes:
      plain: See above.
      optimizer: That of the packed variables.
      groups: What lies together.
    """

    def __init__(
        self,
        network: keras.Model,
        plain: keras.optimizers.Optimizer,
        build_optimizer: Callable[..., keras.optimizers.Optimizer],
    ) -> None:
        self._variables = network.trainable_variables
        self.plain = plain
        self.groups = self._grouped()
        members = {
            group.name: [self._variables[index] for index in group.members]
            for group in self.groups
            if "matrices" in group.name
        }
        self.optimizer = build_optimizer(muon=functools.partial(_PackedMuon, plain, members))
        self.optimizer.exclude_from_weight_decay(var_names=["undecayed"])
        packed = self.pack([variable.value for variable in self._variables])
        self.optimizer.build(
            [keras.Variable(value, name=group.name) for group, value in zip(self.groups, packed)]
        )

    def pack(self, values: Sequence[Any]) -> list[jax.Array]:
        """Joins one array for each variable, of its shape, to one for each group, float32."""
        return [self._pack(group, values) for group in self.groups]

    def unpack(self, packed: Sequence[jax.Array]) -> list[jax.Array]:
        """Takes one array for each group apart into what `pack` has joined to it."""
        values: list[Any] = [None] * len(self._variables)
        for group, array in zip(self.groups, packed):
            for index, value in self._unpack(group, array):
                values[index] = value
        return values

    def load(self) -> None:
        """Sets the packed optimizer's variables to what the plain one's are."""
        self.optimizer.iterations.assign(self.plain.iterations)
        for packed, plain in self._slots():
            for group, variable in zip(self.groups, packed):
                if variable is not None:
                    variable.assign(self._pack(group, plain))

    def store(self) -> None:
        """Sets the plain optimizer's variables to what the packed one's are."""
        self.plain.iterations.assign(self.optimizer.iterations)
        for packed, plain in self._slots():
            for group, variable in zip(self.groups, packed):
                if variable is not None:
                    for index, value in self._unpack(group, variable.value):
                        plain[index].assign(value)

    def _pack(self, group: Group, values: Sequence[Any]) -> jax.Array:
        parts = [jnp.ravel(jnp.asarray(values[index])) for index in group.members]
        return jnp.concatenate([part.astype(jnp.float32) for part in parts])

    def _unpack(self, group: Group, array: jax.Array) -> Iterator[tuple[int, jax.Array]]:
        start = 0
        for index in group.members:
            shape = self._variables[index].shape
            end = start + math.prod(shape)
            yield index, array[start:end].reshape(shape)
            start = end

    def _slots(self) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
        """What either optimizer keeps for each of its variables: the packed one's, the plain's."""
        names = ["_momentums", "_velocities"]
        if self.plain.use_ema:
            names.append("_model_variables_moving_average")
        for name in names:
            yield getattr(self.optimizer, name), getattr(self.plain, name)

    def _grouped(self) -> list[Group]:
        members: dict[str, list[int]] = defaultdict(list)
        for index, variable in enumerate(self._variables):
            name = "decayed" if self.plain._use_weight_decay(variable) else "undecayed"
            if isinstance(self.plain, Muon) and not self.plain.is_adams(variable):
                name += "_matrices"
            if self.plain.base_ratio != 1 and CLASSIFIER in variable.path:
                name += f"_{CLASSIFIER}"
            members[name].append(index)
        return [Group(name, indices) for name, indices in members.items()]


class _PackedMuon(Muon):
    """`Muon` on the flat vectors of a `Packing`.

    Args:
      plain: Knows the matrices of each kernel.
      members: Name of a vector of matrices -> the kernels in it, in order.
      *args: `Muon` arguments.
      **kwargs: `Muon` arguments.
    """

    def __init__(
        self, plain: Muon, members: dict[str, list[keras.Variable]], *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        # In a function, as Keras takes all variables that it finds in an attribute for its own.
        self._packed = lambda: (plain, members)

    def is_adams(self, variable: Any) -> bool:
        return variable.name not in self._packed()[1]

    def orthogonal_update(self, variable: Any, update: Any) -> Any:
        """Does so for all matrices of a vector, batch by batch."""
        plain, members = self._packed()
        kernels, start = members[variable.name], 0
        cut = []  # [parts, smaller, larger] of each kernel
        for kernel in kernels:
            end = start + math.prod(kernel.shape)
            matrices = plain.matrices(kernel, update[start:end].reshape(kernel.shape))
            cut.append(matrices.swapaxes(1, 2) if _is_tall(plain, kernel) else matrices)
            start = end
        result: list[Any] = [None] * len(kernels)
        for batch in batches([matrices.shape for matrices in cut]):
            height, width = (max(cut[i].shape[axis] for i in batch) for axis in (1, 2))
            # Zeros around a matrix stay zeros, and change nothing in it.
            stack = jnp.concatenate([_padded(cut[i], height, width) for i in batch])
            stack, start = self.orthogonal(stack), 0
            for i in batch:
                number, rows, columns = cut[i].shape
                part = stack[start : start + number, :rows, :columns]
                part = part.swapaxes(1, 2) if _is_tall(plain, kernels[i]) else part
                scale = plain.scale(kernels[i])
                result[i] = plain.values(kernels[i], part * scale).ravel()
                start += number
        return jnp.concatenate(result)


def _is_tall(plain: Muon, kernel: Any) -> bool:
    inputs, _, outputs = plain.matrix_shape(kernel)
    return inputs > outputs


def _padded(matrices: jax.Array, height: int, width: int) -> jax.Array:
    _, rows, columns = matrices.shape
    return jnp.pad(matrices, ((0, 0), (0, height - rows), (0, width - columns)))


def batches(shapes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Groups matrices so that computing them, padded to the largest of a group, costs least.

    Args:
      shapes: (number, rows, columns) of each kernel's matrices, rows <= columns.

    Returns:
      Indices of the kernels in each batch.
    """

    def cost(batch: list[int]) -> float:
        rows, columns = (max(shapes[i][axis] for i in batch) for axis in (1, 2))
        number = sum(shapes[i][0] for i in batch)
        return _BATCH_COST + 5 * number * rows**2 * (2 * columns + rows)

    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, shape in enumerate(shapes):
        by_size[tuple(shape[1:])].append(i)
    found = list(by_size.values())
    while len(found) > 1:
        gains = {
            (i, j): cost(found[i]) + cost(found[j]) - cost(found[i] + found[j])
            for j in range(len(found))
            for i in range(j)
        }
        (i, j), gain = max(gains.items(), key=lambda item: item[1])
        if gain <= 0:
            break
        found[i] += found.pop(j)
    return found
