"""A network's variables in few arrays, so that an optimizer's step is few kernels.

On a GPU a small kernel takes some microseconds however little it does, and an optimizer's step is
several for each variable. Here all variables that are updated element by element lie in one flat
vector, and Muon's matrices in one stack for each size; the optimizer is Keras's own, or `Muon`,
built on those. Elementwise updates, the norm of all gradients and batched matrix products do not
depend on how variables are grouped, so the mathematics is the same up to rounding.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras

from trainer.muon import Muon


class Group(NamedTuple):
    """Variables that lie in one array.

    Attributes:
      name: Of the packed variable.
      members: Indices of the network's trainable variables, in order.
      size: (n, m) of the matrices of a stack, n <= m; None for a flat vector.
    """

    name: str
    members: list[int]
    size: tuple[int, int] | None


class Packing:
    """Where each variable of a network lies.

    Args:
      network: Whose trainable variables are packed.
      plain: The network's optimizer, built: as a checkpoint has it.
      build_optimizer: Makes an optimizer of the same settings for packed variables. Gets the
        factors of Muon's updates, see `trainer.muon.Muon`.

    Attributes:
      plain: See above.
      optimizer: That of the packed variables.
      groups: What lies together.
    """

    def __init__(
        self,
        network: keras.Model,
        plain: keras.optimizers.Optimizer,
        build_optimizer: Callable[[dict[str, list[float]]], keras.optimizers.Optimizer],
    ) -> None:
        self._variables = network.trainable_variables
        self.plain = plain
        self.groups = self._grouped()
        self.optimizer = build_optimizer(
            {group.name: self._scales(group) for group in self.groups if group.size}
        )
        self.optimizer.exclude_from_weight_decay(var_names=["undecayed"])
        packed = self.pack([variable.value for variable in self._variables])
        self.optimizer.build(
            [keras.Variable(value, name=group.name) for group, value in zip(self.groups, packed)]
        )

    def pack(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """Joins one array for each variable, of its shape, to one for each group, float32."""
        return [self._pack(group, values) for group in self.groups]

    def _pack(self, group: Group, values: Sequence[Any]) -> jax.Array:
        parts = []
        for index in group.members:
            value = jnp.asarray(values[index]).astype(jnp.float32)
            if group.size is None:
                parts.append(value.ravel())
                continue
            matrices = self._muon.matrices(self._variables[index], value)
            is_tall = matrices.shape[1] > matrices.shape[2]
            parts.append(matrices.swapaxes(1, 2) if is_tall else matrices)
        return jnp.concatenate(parts)

    def unpack(
        self, packed: Sequence[jax.Array], dtypes: Sequence[Any] | None = None
    ) -> list[jax.Array]:
        """Takes apart what `pack` joins.

        Args:
          packed: One array for each group.
          dtypes: Of each variable; float32 by default. A group is cast as a whole.

        Returns:
          One array for each variable, of its shape.
        """
        values: list[Any] = [None] * len(self._variables)
        for group, array in zip(self.groups, packed):
            for index, value in self._unpack(group, array, dtypes):
                values[index] = value
        return values

    def _unpack(
        self, group: Group, array: jax.Array, dtypes: Sequence[Any] | None = None
    ) -> Iterator[tuple[int, jax.Array]]:
        wanted = {index: dtypes[index] if dtypes else array.dtype for index in group.members}
        cast = {dtype: array.astype(dtype) for dtype in set(wanted.values())}
        start = 0
        for index in group.members:
            shape = self._variables[index].shape
            if group.size is None:
                number = math.prod(shape)
                value = cast[wanted[index]][start : start + number]
            else:
                inputs, number, outputs = self._muon.matrix_shape(self._variables[index])
                value = cast[wanted[index]][start : start + number]
                if inputs > outputs:
                    value = value.swapaxes(1, 2)
                value = value.transpose(1, 0, 2)
            yield index, value.reshape(shape)
            start += number

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

    def _slots(self) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
        """What either optimizer keeps for each of its variables: the packed one's, the plain's."""
        names = ["_momentums", "_velocities"]
        if self.plain.use_ema:
            names.append("_model_variables_moving_average")
        for name in names:
            yield getattr(self.optimizer, name), getattr(self.plain, name)

    @property
    def _muon(self) -> Muon:
        assert isinstance(self.plain, Muon)
        return self.plain

    def _scales(self, group: Group) -> list[float]:
        scales: list[float] = []
        for index in group.members:
            inputs, parts, outputs = self._muon.matrix_shape(self._variables[index])
            scales += parts * [max(1.0, outputs / inputs) ** 0.5]
        return scales

    def _grouped(self) -> list[Group]:
        members: dict[tuple[str, tuple[int, int] | None], list[int]] = defaultdict(list)
        for index, variable in enumerate(self._variables):
            decayed = "decayed" if self.plain._use_weight_decay(variable) else "undecayed"
            size = None
            if isinstance(self.plain, Muon) and not self.plain.is_adams(variable):
                inputs, _, outputs = self.plain.matrix_shape(variable)
                size = (min(inputs, outputs), max(inputs, outputs))
            members[decayed, size].append(index)
        return [
            Group(decayed if size is None else f"{decayed}_{size[0]}x{size[1]}", indices, size)
            for (decayed, size), indices in members.items()
        ]
