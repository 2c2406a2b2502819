"""The course of a training with JAX: epochs, progress, checkpoints, and what is left at the end."""

from __future__ import annotations

import math
import time
from importlib import metadata

import jax
import numpy as np

from trainer import callbacks, precision, schedule, weights
from trainer.checkpoint import Checkpoint, History
from trainer.on_jax.job import SPLITS, Folder, Result
from trainer.on_jax.training import Split, State, Training
from trainer.preset import Preset

# A compiled program runs for so long, before this process looks at losses and clock again.
_SECONDS_PER_SPAN = 10.0
# Of spans, each to the one before, since a few steps tell little of the pace.
_LARGEST_GROWTH = 10
# Epochs may take less than a second, and a checkpoint nearly as much.
_SECONDS_PER_CHECKPOINT = 10.0
_KNOWN_ANSWERS = 32


def run(folder: Folder) -> None:
    """Trains what a folder says, or goes on with it, and leaves the result there.

    A checkpoint is written after an epoch if the last one is ten seconds old, and after the last.

    Args:
      folder: With job and splits.

    Raises:
      trainer.checkpoint.CheckpointError: The disk is full or not writable.
      trainer.callbacks.NonFiniteLossError: See there.
      trainer.on_jax.training.BatchSizeError: See there.
    """
    job, start = folder.read_job()
    train, validation = (Split(*folder.read_split(name)) for name in SPLITS)
    policy = _policy_name(job.preset)
    with precision.dtype_policy(policy):
        training = Training(
            job.preset,
            train,
            job.num_classes,
            job.seed,
            mean=job.mean,
            variance=job.variance,
            weights=None if start is None else weights.unpack(start),
            other_classes=job.other_classes,
        )
        history = fit(training, validation, job.checkpoints)
    devices = jax.local_devices()
    result = Result(
        history=history,
        precision=policy,
        device=devices[0].device_kind,
        devices=len(devices),
        versions={name: metadata.version(name) for name in ("jax", "jaxlib")},
        probabilities=training.probabilities(validation.images[:_KNOWN_ANSWERS]).tolist(),
    )
    folder.write_result(result, weights.pack(training.network))


def fit(training: Training, validation: Split, checkpoints: str) -> list[dict[str, float]]:
    """Trains as long as the preset says, or what was left of that by an interruption.

    Args:
      training: Its network ends with the weights to export.
      validation: Is measured after each epoch.
      checkpoints: Folder of the checkpoints.

    Returns:
      Metrics of all epochs.
    """
    settings = training.preset.training
    history = History()
    checkpoint = Checkpoint(checkpoints, history)
    checkpoint.set_model(training.network)
    finished, spent = checkpoint.restore(training.network), 0.0
    if finished:
        spent = history.epochs[-1].get("training_seconds", 0.0)
    budget = callbacks.TimeBudget(settings, spent) if settings.train_minutes else None
    lines = callbacks.ProgressLines(budget)
    lines.set_params({"epochs": settings.epochs, "steps": training.steps})
    pace, batches = _Pace(), training.batches(validation)
    state, epoch, saved_at = training.state(), finished, time.monotonic()

    def goes_on() -> bool:
        return budget.progress < 1.0 if budget else epoch < settings.epochs

    while goes_on():
        history.on_epoch_begin(epoch)
        lines.on_epoch_begin(epoch)
        state, loss = _train_epoch(training, state, epoch, pace, budget, lines)
        measured = training.evaluate(training.averaged(state), batches)
        if not math.isfinite(measured["loss"]):
            raise callbacks.NonFiniteLossError(epoch, None, measured["loss"])
        logs = {"loss": loss, **{f"val_{name}": value for name, value in measured.items()}}
        if budget:
            budget.on_epoch_end(epoch, logs)
        history.on_epoch_end(epoch, logs)
        epoch += 1
        if not goes_on() or time.monotonic() - saved_at >= _SECONDS_PER_CHECKPOINT:
            training.assign(state)
            checkpoint.on_epoch_end(epoch - 1)
            saved_at = time.monotonic()
        lines.on_epoch_end(epoch - 1, logs)
    training.assign(training.averaged(state))
    return history.epochs


class _Pace:
    """How long a step takes, and so how many of them to compute at once."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._steps = 0

    def span(self, steps: int, seconds: float) -> int:
        """Chooses a number of steps.

        Args:
          steps: At most.
          seconds: How long they may take, about.
        """
        if self.seconds is None:
            return 1
        fitting = int(min(seconds, _SECONDS_PER_SPAN) / self.seconds)
        return max(1, min(steps, fitting, _LARGEST_GROWTH * self._steps))

    def add(self, steps: int, seconds: float) -> bool:
        """Learns from a span; returns whether it counts, as all but the first, which compiles."""
        counts, self._steps = self._steps > 0, steps
        if counts:
            self.seconds = seconds / steps
        return counts


def _train_epoch(
    training: Training,
    state: State,
    epoch: int,
    pace: _Pace,
    budget: callbacks.TimeBudget | None,
    lines: callbacks.ProgressLines,
) -> tuple[State, float]:
    """Trains for an epoch, or until the time is over; returns the mean loss with the new state."""
    draws = training.draws(epoch)
    state = training.begin(state, epoch)
    if budget:
        rates = np.zeros(training.steps, np.float32)
    else:
        rates = schedule.learning_rates(training.preset.training, training.steps, epoch)
    losses = np.zeros(0, np.float32)
    while (step := len(losses)) < training.steps and not (budget and budget.progress == 1.0):
        left = budget.seconds_left if budget else _SECONDS_PER_SPAN
        stop = step + pace.span(training.steps - step, left)
        if budget:
            rates[step:stop] = budget.learning_rates(stop - step, pace.seconds or 0.0)
        began = time.monotonic()
        state, new = training.run(state, draws, rates, step, stop)
        seconds = time.monotonic() - began
        if not (finite := np.isfinite(new)).all():
            first = int(finite.argmin())
            raise callbacks.NonFiniteLossError(epoch, step + first, float(new[first]))
        losses = np.concatenate([losses, new])
        if pace.add(stop - step, seconds) and budget:
            budget.add(seconds)
        lines.on_train_batch_end(stop - 1, {"loss": float(losses.mean())})
    return state, float(losses.mean(dtype=np.float64))


def _policy_name(preset: Preset) -> str:
    """The Keras dtype policy to train with: bfloat16 where the preset and the device have it.

    That is on TPUs, and on NVIDIA's GPUs since compute capability 8. On CPUs it is float32, as
    XLA has no fast products in bfloat16 for most of them.
    """
    device = jax.local_devices()[0]
    capability = float(getattr(device, "compute_capability", 0.0))
    fast = device.platform == "tpu" or (device.platform == "gpu" and capability >= 8.0)
    return "mixed_bfloat16" if preset.training.mixed_precision and fast else "float32"
