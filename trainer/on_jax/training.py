"""Training with JAX in one compiled program, from data that lie on the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trainer import schedule
from trainer.mixing import Mixing
from trainer.model import build_model
from trainer.on_jax.packing import Packing
from trainer.preset import Preset

_EVALUATED_AT_ONCE = 1000
# Far above what a layer draws in an epoch.
_DRAWS_PER_EPOCH = 1 << 20


class Split(NamedTuple):
    """Examples.

    Attributes:
      images: uint8 [N, H, W, 3].
      labels: Integers [N].
    """

    images: Any
    labels: Any

    def on_device(self) -> Split:
        """Copies it to the device."""
        split = Split(self.images, np.asarray(self.labels, np.int32))
        return jax.device_put(split, jax.devices()[0])


class State(NamedTuple):
    """What a training step changes.

    Attributes:
      trainable: The network's trainable variables, packed (see `trainer.on_jax.packing`).
      non_trainable: Its others: moving averages and random generators.
      optimizer: The packed optimizer's variables.
    """

    trainable: list[jax.Array]
    non_trainable: list[jax.Array]
    optimizer: list[jax.Array]


class Draws(NamedTuple):
    """What an epoch draws before it begins, from the seed and the epoch's number.

    Attributes:
      order: Which images each step trains on, int32 [steps, batch_size].
      seeds: Of each step's mixing, uint32 [steps, 2].
    """

    order: np.ndarray
    seeds: np.ndarray


@contextlib.contextmanager
def _on_host() -> Iterator[None]:
    """Computes on the CPU meanwhile, by programs that are compiled in no time and run once.

    That is for initial values: each is a program of its own, a hundred in all.
    """
    quickly = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.default_device(jax.devices("cpu")[0]):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", quickly)


class Training:
    """A preset's network and optimizer, as compiled functions of a state.

    Args:
      preset: What to train; its batch_size must not be larger than the split.
      train: The training split.
      num_classes: Classes of the labels.
      seed: Of the weights, the order of the examples, augmentation and dropout.
      plain: See `trainer.model.build_model`.

    Attributes:
      steps: Of an epoch; what is left over of the examples, less than a batch, waits for another
        epoch's order.
      network: With the variables' values of the last `assign`, compiled with the plain optimizer,
        as a checkpoint has it.

    Raises:
      ValueError: There are fewer examples than a batch has.
    """

    def __init__(
        self, preset: Preset, train: Split, num_classes: int, seed: int, *, plain: bool = False
    ):
        self.steps = len(train.labels) // preset.batch_size
        self.preset, self.seed, self.num_classes = preset, seed, num_classes
        self.loss = schedule.build_loss(preset)
        optimizer = schedule.build_optimizer(preset, steps_per_epoch=self.steps)
        with _on_host():
            self.network = build_model(preset, num_classes=num_classes, seed=seed, plain=plain)
            # So that Keras saves the optimizer's state beside the weights.
            self.network.compile(optimizer, self.loss)
            optimizer.build(self.network.trainable_variables)
            self._packing = Packing(
                self.network,
                optimizer,
                functools.partial(schedule.build_optimizer, preset, steps_per_epoch=None),
            )
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
        self._run_steps = jax.jit(self._steps, donate_argnums=0)
        self._count_hits = jax.jit(self._hits)

    def state(self) -> State:
        """Copies the variables' values to the device."""
        with _on_host():
            self._packing.load()
            state = State(
                self._packing.pack([v.value for v in self.network.trainable_variables]),
                [jnp.array(v.value) for v in self.network.non_trainable_variables],
                [jnp.array(v.value) for v in self._packing.optimizer.variables],
            )
        return jax.device_put(state, jax.devices()[0])

    def assign(self, state: State) -> None:
        """Sets the variables to a state."""
        for variables, values in (
            (self.network.trainable_variables, self._packing.unpack(state.trainable)),
            (self.network.non_trainable_variables, state.non_trainable),
            (self._packing.optimizer.variables, state.optimizer),
        ):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        self._packing.store()

    def averaged(self, state: State) -> State:
        """The state with the moving averages of the weights in their place, if there are any."""
        optimizer = self._packing.optimizer
        if not optimizer.use_ema:
            return state
        averages = {id(v): i for i, v in enumerate(optimizer.variables)}
        return state._replace(
            trainable=[
                state.optimizer[averages[id(average)]]
                for average in optimizer._model_variables_moving_average
            ]
        )

    def epoch(self, state: State, epoch: int) -> tuple[State, float]:
        """Trains for one epoch.

        Args:
          state: Given up.
          epoch: Which, from 0: the order of the examples and all draws depend on it and the seed.

        Returns:
          The new state and the mean loss.
        """
        rates = schedule.learning_rates(self.preset, self.steps, epoch)
        state = self.begin(state, epoch)
        state, losses = self.run(state, self.draws(epoch), rates, 0, self.steps)
        return state, float(losses.mean())

    def draws(self, epoch: int) -> Draws:
        """Draws what the steps of an epoch need."""
        draw = np.random.default_rng((self.seed, epoch))
        order = draw.permutation(len(self._train.labels))[: self.steps * self.preset.batch_size]
        seeds = np.zeros((self.steps, 2), np.uint32)
        seeds[:, 0] = draw.integers(2**32, size=self.steps)
        return Draws(order.reshape(self.steps, self.preset.batch_size).astype(np.int32), seeds)

    def begin(self, state: State, epoch: int) -> State:
        """Sets the random generators of augmentation and dropout to an epoch's first draws."""
        generators = [
            value.at[1].set(epoch * _DRAWS_PER_EPOCH)
            if variable.name == "seed_generator_state"
            else value
            for variable, value in zip(self.network.non_trainable_variables, state.non_trainable)
        ]
        return state._replace(non_trainable=generators)

    def run(
        self, state: State, draws: Draws, rates: np.ndarray, start: int, stop: int
    ) -> tuple[State, np.ndarray]:
        """Trains for some steps of an epoch.

        Args:
          state: Given up; of `begin`, or what earlier steps of the epoch have left.
          draws: The epoch's.
          rates: Learning rate of each of its steps, float32 [steps].
          start: The first step.
          stop: One past the last.

        Returns:
          The new state and the loss of each step, float32 [stop - start].
        """
        state, losses = self._run_steps(
            state, self._train, *draws, np.asarray(rates, np.float32), np.array([start, stop])
        )
        return state, np.asarray(losses[start:stop])

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

    def _steps(
        self,
        state: State,
        train: Split,
        order: jax.Array,
        seeds: jax.Array,
        rates: jax.Array,
        span: jax.Array,
    ) -> tuple[State, jax.Array]:
        def step(index: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            state, losses = carry
            which = order[index]
            images, labels = self._normalized(train.images[which]), train.labels[which]
            if self._mixing:
                images, labels = self._mixing(images, labels, seeds[index])
            state, loss = self._step(state, images, labels, rates[index])
            return state, losses.at[index].set(loss)

        # Not a scan: its number of steps would be a constant of the program.
        return jax.lax.fori_loop(span[0], span[1], step, (state, jnp.zeros(len(order))))

    def _step(
        self, state: State, images: jax.Array, labels: jax.Array, rate: jax.Array
    ) -> tuple[State, jax.Array]:
        def loss(variables: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
            logits, non_trainable = self.network.stateless_call(
                variables, state.non_trainable, images, training=True
            )
            return self.loss(labels, logits), non_trainable

        variables = self._packing.unpack(state.trainable)
        (value, non_trainable), gradients = jax.value_and_grad(loss, has_aux=True)(variables)
        trainable, optimizer = self._packing.optimizer.stateless_apply(
            self._with_rate(state.optimizer, rate),
            self._packing.pack(gradients),
            state.trainable,
        )
        return State(trainable, non_trainable, optimizer), value

    def _with_rate(self, values: list[jax.Array], rate: jax.Array) -> list[jax.Array]:
        optimizer = self._packing.optimizer
        return [
            rate if variable is optimizer._learning_rate else value
            for variable, value in zip(optimizer.variables, values)
        ]

    def _hits(self, state: State, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits, _ = self.network.stateless_call(
            self._packing.unpack(state.trainable),
            state.non_trainable,
            self._normalized(images),
            training=False,
        )
        of_label = jnp.take_along_axis(logits, labels[:, None].astype(jnp.int32), axis=1)
        better = (~(logits <= of_label)).sum(axis=1)  # so that NaN is no hit
        return jnp.stack([(better < 1).sum(), (better < 5).sum()])
