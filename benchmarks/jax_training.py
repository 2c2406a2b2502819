"""Training with JAX in programs of an epoch each, from data that lie on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trainer import schedule
from trainer.mixing import Mixing
from trainer.model import build_model
from trainer.preset import Preset

_EVALUATED_AT_ONCE = 1000
# Far above what a layer draws in an epoch.
_DRAWS_PER_EPOCH = 1 << 20


class Split(NamedTuple):
    """Examples.

    Attributes:
      images: uint8 [N, 32, 32, 3].
      labels: Integers [N].
    """

    images: Any
    labels: Any

    def on_device(self) -> Split:
        """Copies it to the device."""
        return Split(jnp.asarray(self.images), jnp.asarray(self.labels, jnp.int32))


class State(NamedTuple):
    """What a training step changes, each a list of arrays in the order of Keras's variables.

    Attributes:
      trainable: The network's trainable variables.
      non_trainable: Its others: moving averages and random generators.
      optimizer: The optimizer's.
    """

    trainable: list[jax.Array]
    non_trainable: list[jax.Array]
    optimizer: list[jax.Array]


class Training:
    """A preset's network and optimizer, as compiled functions of a state.

    Args:
      preset: What to train; its batch_size must not be larger than the split.
      train: The training split.
      num_classes: Classes of the labels.
      seed: Of the weights, the order of the examples, augmentation and dropout.
      plain: See `trainer.model.build_model`.

    Raises:
      ValueError: There are fewer examples than a batch has.
    """

    def __init__(
        self, preset: Preset, train: Split, num_classes: int, seed: int, *, plain: bool = False
    ):
        self.steps = len(train.labels) // preset.batch_size
        self.preset, self.seed, self.num_classes = preset, seed, num_classes
        self.network = build_model(preset, num_classes=num_classes, seed=seed, plain=plain)
        self.optimizer = schedule.build_optimizer(preset, steps_per_epoch=self.steps)
        self.loss = schedule.build_loss(preset)
        # So that Keras saves the optimizer's state beside the weights.
        self.network.compile(self.optimizer, self.loss)
        self.optimizer.build(self.network.trainable_variables)
        self._mixing = Mixing(preset, num_classes) if preset.mixes_labels else None
        # In one pass over whole numbers: 50,000 images as floats would be half a gigabyte.
        levels = np.arange(256)
        counts = np.stack(
            [np.bincount(train.images[..., c].ravel(), minlength=256) for c in (0, 1, 2)]
        )
        shares = counts / counts.sum(axis=1, keepdims=True)
        self.mean = shares @ levels
        self.variance = shares @ levels**2 - self.mean**2
        self._train = train.on_device()
        self._run_epoch = jax.jit(self._epoch, donate_argnums=0)
        self._count_hits = jax.jit(self._hits)

    def state(self) -> State:
        """Copies the variables' values."""
        return State(
            *(
                [jnp.array(v.value) for v in variables]
                for variables in (
                    self.network.trainable_variables,
                    self.network.non_trainable_variables,
                    self.optimizer.variables,
                )
            )
        )

    def assign(self, state: State) -> None:
        """Sets the variables to a state."""
        for variables, values in (
            (self.network.trainable_variables, state.trainable),
            (self.network.non_trainable_variables, state.non_trainable),
            (self.optimizer.variables, state.optimizer),
        ):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

    def averaged(self, state: State) -> State:
        """The state with the moving averages of the weights in their place, if there are any."""
        if not self.optimizer.use_ema:
            return state
        self.assign(state)
        self.optimizer.finalize_variable_values(self.network.trainable_variables)
        return self.state()

    def epoch(self, state: State, epoch: int) -> tuple[State, float]:
        """Trains for one epoch.

        Args:
          state: Given up.
          epoch: Which, from 0: the order of the examples and all draws depend on it and the seed.

        Returns:
          The new state and the mean loss.
        """
        draw = np.random.default_rng((self.seed, epoch))
        order = draw.permutation(len(self._train.labels))[: self.steps * self.preset.batch_size]
        order = order.reshape(self.steps, self.preset.batch_size).astype(np.int32)
        seeds = np.zeros((self.steps, 2), np.uint32)
        seeds[:, 0] = draw.integers(2**32, size=self.steps)
        generators = [
            jnp.array([value[0], epoch * _DRAWS_PER_EPOCH], value.dtype)
            if variable.name == "seed_generator_state"
            else value
            for variable, value in zip(self.network.non_trainable_variables, state.non_trainable)
        ]
        state = state._replace(non_trainable=generators)
        state, losses = self._run_epoch(state, self._train, order, seeds)
        return state, float(losses.mean())

    def evaluate(self, state: State, split: Split) -> tuple[float, float]:
        """Returns the top-1 and top-5 accuracy on a split."""
        hits = np.zeros(2)
        for start in range(0, len(split.labels), _EVALUATED_AT_ONCE):
            part = slice(start, start + _EVALUATED_AT_ONCE)
            hits += self._count_hits(state, split.images[part], split.labels[part])
        top_1, top_5 = hits / len(split.labels)
        return float(top_1), float(top_5)

    def _normalized(self, pixels: jax.Array) -> jax.Array:
        mean, deviation = self.mean.astype("f4"), np.sqrt(self.variance).astype("f4")
        return (pixels.astype(jnp.float32) - mean) / np.maximum(deviation, 1e-7)

    def _epoch(
        self, state: State, train: Split, order: jax.Array, seeds: jax.Array
    ) -> tuple[State, jax.Array]:
        def step(state: State, batch: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
            which, seed = batch
            images, labels = self._normalized(train.images[which]), train.labels[which]
            if self._mixing:
                images, labels = self._mixing(images, labels, seed)

            def loss(trainable: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
                logits, non_trainable = self.network.stateless_call(
                    trainable, state.non_trainable, images, training=True
                )
                return self.loss(labels, logits), non_trainable

            (value, non_trainable), gradients = jax.value_and_grad(loss, has_aux=True)(
                state.trainable
            )
            trainable, optimizer = self.optimizer.stateless_apply(
                state.optimizer, gradients, state.trainable
            )
            return State(trainable, non_trainable, optimizer), value

        return jax.lax.scan(step, state, (order, seeds))

    def _hits(self, state: State, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits, _ = self.network.stateless_call(
            state.trainable, state.non_trainable, self._normalized(images), training=False
        )
        of_label = jnp.take_along_axis(logits, labels[:, None].astype(jnp.int32), axis=1)
        better = (~(logits <= of_label)).sum(axis=1)  # so that NaN is no hit
        return jnp.stack([(better < 1).sum(), (better < 5).sum()])
