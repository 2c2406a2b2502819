"""Training with JAX in one compiled program, from data that lie on the device."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainer import losses, precision, schedule
from trainer import weights as packed
from trainer.draws import epoch_draws
from trainer.network.mixing import Mixing
from trainer.network.model import build_model
from trainer.on_jax.packing import Packing
from trainer.optimizer import build_optimizer
from trainer.preset import Preset

_EVALUATED_AT_ONCE = 1000
# Far above what a layer draws in an epoch.
_DRAWS_PER_EPOCH = 1 << 20
# As `trainer.preprocessing` guards its division.
_EPSILON = 1e-7


class Split(NamedTuple):
    """Examples.

    Attributes:
      images: uint8 [N, H, W, 3].
      labels: Integers [N].
    """

    images: Any
    labels: Any


class Batch(NamedTuple):
    """Examples on the devices, to evaluate on.

    Attributes:
      images: uint8 [B, H, W, 3].
      labels: int32 [B].
      counts: float32 [B], 1 for an example and 0 for what fills up the batch.
    """

    images: jax.Array
    labels: jax.Array
    counts: jax.Array


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

    order: jax.Array
    seeds: jax.Array


class BatchSizeError(ValueError):
    """The devices cannot share a batch evenly; the message says what to do."""


@contextlib.contextmanager
def _on_host() -> Iterator[None]:
    """Computes on the CPU meanwhile, by programs that are compiled in no time and run once.

    That is for initial values and the like: each shape of a variable is a program of its own, a
    hundred in all, which an accelerator would compile for seconds.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


class Training:
    """A preset's network and optimizer, as compiled functions of a state.

    All local devices share each batch; the state and the training split lie on each of them.

    Args:
      preset: What to train; the devices must divide its batch_size.
      train: The training split.
      num_classes: Classes of the labels.
      seed: Of the weights, the order of the examples, augmentation and dropout.
      mean: Of each channel, in units of pixel values, [3].
      variance: Of each channel, in squared pixel values, [3].
      weights: To start from, in the order of the network's; None for random ones.
      other_classes: Whether they are of a model of other classes, whose classifier is not taken.
      plain: See `trainer.network.model.build_model`.

    Attributes:
      steps: Of an epoch; its last batch is filled up with the first examples of its order.
      network: With the variables' values of the last `assign`, compiled with the plain optimizer,
        as a checkpoint has it.

    Raises:
      BatchSizeError: See there.
    """

    def __init__(
        self,
        preset: Preset,
        train: Split,
        num_classes: int,
        seed: int,
        *,
        mean: Any,
        variance: Any,
        weights: Sequence[np.ndarray] | None = None,
        other_classes: bool = False,
        plain: bool = False,
    ):
        devices = jax.local_devices()
        if (size := preset.training.batch_size) % len(devices):
            raise BatchSizeError(
                f"batch_size is {size}, which {len(devices)} devices cannot share evenly: "
                f"give a multiple of {len(devices)} (--batch_size)."
            )
        mesh = Mesh(np.array(devices), ("batch",))
        self._on_each = NamedSharding(mesh, PartitionSpec())
        self._shared = NamedSharding(mesh, PartitionSpec("batch"))
        self._shared_steps = NamedSharding(mesh, PartitionSpec(None, "batch"))
        self.steps = math.ceil(len(train.labels) / preset.training.batch_size)
        self.preset, self.seed, self.num_classes = preset, seed, num_classes
        self.mean, self.variance = np.asarray(mean, "f4"), np.asarray(variance, "f4")
        with _on_host():
            shape = train.images.shape[1:]
            self.network = build_model(preset, shape, num_classes, seed=seed, plain=plain)
            if weights is not None:
                packed.load(self.network, weights, classifier=not other_classes)
            weights_of_classes = losses.class_weights(train.labels, num_classes)
            self.loss = losses.build_loss(preset, weights_of_classes)
            build = functools.partial(build_optimizer, preset.training, other_classes=other_classes)
            optimizer = build(steps_per_epoch=self.steps)
            # So that Keras saves the optimizer's state beside the weights.
            self.network.compile(optimizer, self.loss)
            optimizer.build(self.network.trainable_variables)
            self._packing = Packing(
                self.network,
                optimizer,
                functools.partial(build, steps_per_epoch=None),
            )
            self._mixing = (
                Mixing(preset.augmentation, num_classes)
                if preset.augmentation.mixes_labels
                else None
            )
        self._generators = {
            index: int(variable.value[0])
            for index, variable in enumerate(self.network.non_trainable_variables)
            if variable.name == "seed_generator_state"
        }
        self._train = jax.device_put(
            Split(train.images, np.asarray(train.labels, np.int32)), self._on_each
        )
        # Not on a CPU: of JAX 0.4.34's compilation cache, such a program corrupts the memory there.
        donated = () if devices[0].platform == "cpu" else (0,)
        self._run_steps = jax.jit(
            self.steps_of_an_epoch, donate_argnums=donated, out_shardings=self._on_each
        )
        self._sum_metrics = jax.jit(self._metrics, out_shardings=self._on_each)

    def state(self) -> State:
        """Copies the variables' values to the devices."""
        with _on_host():
            self._packing.load()
            state = State(
                self._packing.pack([v.value for v in self.network.trainable_variables]),
                [v.value for v in self.network.non_trainable_variables],
                [v.value for v in self._packing.optimizer.variables],
            )
        # Through NumPy: `device_put` may share what lies on the CPU already, and steps give it up.
        return jax.device_put(jax.tree.map(np.array, state), self._on_each)

    def assign(self, state: State) -> None:
        """Sets the variables to a state."""
        with _on_host():
            state = jax.tree.map(jnp.asarray, jax.device_get(state))
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

    def draws(self, epoch: int) -> Draws:
        """Draws what the steps of an epoch need."""
        order, draws = epoch_draws(self.seed, epoch, len(self._train.labels), self.steps)
        # Filled up from its beginning, as often as it takes.
        order = np.resize(order, (self.steps, self.preset.training.batch_size))
        seeds = np.zeros((self.steps, 2), np.uint32)
        seeds[:, 0] = draws
        return Draws(
            jax.device_put(order, self._shared_steps), jax.device_put(seeds, self._on_each)
        )

    def begin(self, state: State, epoch: int) -> State:
        """Sets the random generators of augmentation and dropout to an epoch's first draws."""
        values = list(state.non_trainable)
        for index, seed in self._generators.items():
            value = np.array([seed, epoch * _DRAWS_PER_EPOCH], values[index].dtype)
            values[index] = jax.device_put(value, self._on_each)
        return state._replace(non_trainable=values)

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
        rates, span = np.asarray(rates, np.float32), np.array([start, stop], np.int32)
        state, losses = self._run_steps(state, self._train, *draws, rates, span)
        return state, np.asarray(losses)[start:stop]

    def arguments(self, state: State, epoch: int) -> tuple[Any, ...]:
        """Those of `steps_of_an_epoch` for all steps of an epoch."""
        rates = schedule.learning_rates(self.preset.training, self.steps, epoch)
        span = np.array([0, self.steps], np.int32)
        return state, self._train, *self.draws(epoch), rates, span

    def batches(self, split: Split) -> list[Batch]:
        """Copies a split to the devices, to be evaluated on there."""
        devices, total = self._shared.mesh.size, len(split.labels)
        size = math.ceil(min(_EVALUATED_AT_ONCE, total) / devices) * devices
        batches = []
        for start in range(0, total, size):
            # Filled up, so that one compiled program does for all.
            which = np.minimum(np.arange(start, start + size), total - 1)
            counts = (np.arange(start, start + size) < total).astype("f4")
            batch = Batch(split.images[which], split.labels[which].astype(np.int32), counts)
            batches.append(jax.device_put(batch, self._shared))
        return batches

    def evaluate(self, state: State, batches: Sequence[Batch]) -> dict[str, float]:
        """Measures a state.

        Args:
          state: Not given up.
          batches: Of `batches`.

        Returns:
          `loss`, `top_1_accuracy` and `top_5_accuracy`.
        """
        sums = jax.device_get([self._sum_metrics(state, batch) for batch in batches])
        counted, *metrics = np.sum(sums, axis=0, dtype=np.float64).tolist()
        names = ("loss", "top_1_accuracy", "top_5_accuracy")
        return {name: value / counted for name, value in zip(names, metrics)}

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """What the network of the last `assign` answers, computed in float32.

        Args:
          images: uint8 [N, H, W, 3].

        Returns:
          The probability of each class, float32 [N, classes].
        """
        with _on_host():
            network = precision.in_float32(self.network, self.preset)
        values = [
            [np.asarray(variable.value) for variable in variables]
            for variables in (network.trainable_variables, network.non_trainable_variables)
        ]

        def answer(trainable: Any, non_trainable: Any, images: jax.Array) -> jax.Array:
            logits, _ = network.stateless_call(
                trainable, non_trainable, self._normalized(images), training=False
            )
            return jax.nn.softmax(logits)

        # A GPU's matrix products have 10 bits of mantissa by default; a server on a CPU has 23.
        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(answer)(*values, images))

    def _normalized(self, pixels: jax.Array) -> jax.Array:
        deviation = np.maximum(np.sqrt(self.variance), _EPSILON)
        return (pixels.astype(jnp.float32) - self.mean) / deviation

    def steps_of_an_epoch(
        self,
        state: State,
        train: Split,
        order: jax.Array,
        seeds: jax.Array,
        rates: jax.Array,
        span: jax.Array,
    ) -> tuple[State, jax.Array]:
        """What `run` computes, of arrays: see `arguments`."""

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

    def _metrics(self, state: State, batch: Batch) -> jax.Array:
        """Sums over a batch: its examples, their losses, top-1 hits and top-5 hits, [4]."""
        logits, _ = self.network.stateless_call(
            self._packing.unpack(state.trainable),
            state.non_trainable,
            self._normalized(batch.images),
            training=False,
        )
        of_label = jnp.take_along_axis(logits, batch.labels[:, None], axis=1)
        # Not the label itself: compared with itself it may be larger, where the compiler computes
        # either side by another order of additions. And NaN is no hit.
        others = jnp.arange(self.num_classes) != batch.labels[:, None]
        better = (others & ~(logits <= of_label)).sum(axis=1)
        values = (jnp.ones(len(logits)), self.loss.call(batch.labels, logits))
        return jnp.stack([(x * batch.counts).sum() for x in (*values, better < 1, better < 5)])
