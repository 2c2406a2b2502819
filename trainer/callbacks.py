"""What happens beside the training steps: progress, time, random numbers, and the end of it.

On any backend; a training with JAX calls what is a callback of Keras itself.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import math
import sys
import time

import keras
import numpy as np

from trainer import schedule
from trainer.preset import Training

# Where there is no terminal to redraw a bar in (a file, a cluster's log), a line at most so often.
_SECONDS_PER_LINE = 30.0

# Far above the steps of an epoch, in each of which a generator draws once or twice.
_DRAWS_PER_EPOCH = 1 << 20


class NonFiniteLossError(RuntimeError):
    """The loss is no number any more, and no later step would make it one.

    Args:
      epoch: From 0.
      step: From 0; None for the validation after the epoch.
      loss: What it was.
    """

    def __init__(self, epoch: int, step: int | None, loss: float):
        where = "in the validation" if step is None else f"at step {step + 1}"
        super().__init__(
            f"the loss is {loss} {where} of epoch {epoch + 1}: train with a lower "
            "--learning_rate, or with a preset that has a gradient_clip_norm or float32 in place "
            "of mixed_precision."
        )


class FiniteLoss(keras.callbacks.Callback):
    """Ends a training whose loss is no number any more."""

    def __init__(self) -> None:
        super().__init__()
        self._epoch = 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Remembers which it is."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Looks at the epoch's mean so far, in which every loss is.

        Raises:
          NonFiniteLossError: It is not finite.
        """
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise NonFiniteLossError(self._epoch, batch, loss)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Looks at what the last step has made of the weights.

        Raises:
          NonFiniteLossError: The validation's loss is not finite.
        """
        loss = (logs or {}).get("val_loss", 0.0)
        if not math.isfinite(loss):
            raise NonFiniteLossError(epoch, None, loss)


def log_epochs(epochs: list[dict[str, float]], log_dir: str) -> None:
    """Writes finished epochs where Keras's TensorBoard callback writes those to come.

    Args:
      epochs: Of `trainer.checkpoint.History`.
      log_dir: The callback's.
    """
    import tensorflow as tf  # only where it is the backend

    for part, prefix in (("train", ""), ("validation", "val_")):
        with tf.summary.create_file_writer(f"{log_dir}/{part}").as_default():
            for metrics in epochs:
                for name in (key[4:] for key in metrics if key.startswith("val_")):
                    if prefix + name in metrics:
                        value, step = metrics[prefix + name], int(metrics["epoch"]) - 1
                        tf.summary.scalar(f"epoch_{name}", value, step=step)


def return_freed_memory() -> None:
    """Gives the system what was freed, which the C library keeps for its own later use.

    After the components before Trainer that is 0.3 GB, after training steps ten times as much.
    """
    gc.collect()
    if libc := ctypes.util.find_library("c"):
        trim = getattr(ctypes.CDLL(libc), "malloc_trim", None)  # glibc's
        if trim:
            trim(0)


class ReturnMemory(keras.callbacks.Callback):
    """Keeps what training steps have used from being added to what comes after them."""

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        """Makes room for validation."""
        return_freed_memory()

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        """Makes room for the export and the components behind Trainer."""
        return_freed_memory()


class EpochSeeds(keras.callbacks.Callback):
    """Makes the dropout and augmentation inside the model depend on seed and epoch alone.

    Keras does not save the state of its random generators with the weights: without this, training
    that continues from a checkpoint would repeat the draws of its first epochs. (The order of the
    images and what they are mixed with are the data set's: see `trainer.draws`.)
    """

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Moves every generator of the model to the epoch's part of its stream."""
        for variable in self.model.variables:
            if variable.name == "seed_generator_state":  # (seed, number of draws so far)
                seed, _ = keras.ops.convert_to_numpy(variable)
                variable.assign([seed, epoch * _DRAWS_PER_EPOCH])


class TimeBudget(keras.callbacks.Callback):
    """Trains for so many minutes, and no longer: learning rate by the clock, then the end.

    What counts is the time of training steps, not that of validation and checkpoints, nor of the
    first step after a start, which builds the graph.

    Args:
      training: With `train_minutes`.
      spent: Seconds that were trained before an interruption.
    """

    def __init__(self, training: Training, spent: float = 0.0):
        super().__init__()
        self._training = training
        self._total = 60 * training.train_minutes
        self._seconds = spent
        self._last: float | None = None

    @property
    def progress(self) -> float:
        """How much of the time has passed, 0 to 1."""
        return min(1.0, self._seconds / self._total)

    @property
    def seconds_left(self) -> float:
        """How much of the time has not."""
        return max(0.0, self._total - self._seconds)

    def add(self, seconds: float) -> None:
        """Counts steps that were not seen here."""
        self._seconds += seconds

    def learning_rates(self, steps: int, seconds_per_step: float) -> np.ndarray:
        """The learning rates of the next steps, float32 [steps], if each takes so long."""
        progress = (self._seconds + np.arange(steps) * seconds_per_step) / self._total
        rates: np.ndarray = schedule.learning_rate_at(self._training, np.minimum(1.0, progress))
        return rates.astype(np.float32)

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Sets the clock to the first step's."""
        self._last = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Starts the clock again."""
        if self._last is not None:
            self._last = time.monotonic()

    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Sets the step's learning rate."""
        rate = schedule.learning_rate_at(self._training, self.progress)
        self.model.optimizer.learning_rate = float(rate)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Counts the step, and ends the training with the last one."""
        now = time.monotonic()
        if self._last is not None:
            self._seconds += now - self._last
        self._last = now
        if self.progress == 1.0:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Adds `training_seconds`, from the beginning of the training, to the epoch's metrics."""
        if logs is not None:
            logs["training_seconds"] = self._seconds


class ProgressLines(keras.callbacks.Callback):
    """A line now and then, for output that is not a terminal.

    Args:
      budget: What ends the training, where it is not the number of epochs.
    """

    def __init__(self, budget: TimeBudget | None = None) -> None:
        super().__init__()
        self._budget = budget
        self._epoch = 0
        self._began = 0.0  # of the epoch
        self._first: tuple[int, float] | None = None  # its first step's number, and end
        self._last = 0.0  # line

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Starts the epoch's clock."""
        self._epoch = epoch + 1
        self._began = time.monotonic()
        self._first = None

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Prints where training stands, if the last line is old enough."""
        now = time.monotonic()
        if self._first is None:
            self._first = batch, now  # building the graph says nothing about later steps
            self._last = now
        if now - self._last < _SECONDS_PER_LINE:
            return
        self._last = now
        steps = self.params["steps"]
        first, then = self._first
        remaining = (now - then) / (batch - first) * (steps - batch - 1)
        left = f"{remaining:.0f} s left"
        if self._budget:
            left = f"{self._budget.progress:.0%} of the time"
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in (logs or {}).items())
        print(
            f"  epoch {self._of(self._epoch)}  step {batch + 1}/{steps}  {left}  {metrics}",
            flush=True,
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Prints the epoch's metrics."""
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in (logs or {}).items())
        seconds = time.monotonic() - self._began
        print(
            f"  epoch {self._of(epoch + 1)} took {seconds:.0f} s  {metrics}",
            flush=True,
        )

    def _of(self, epoch: int) -> str:
        return str(epoch) if self._budget else f"{epoch}/{self.params['epochs']}"


def progress(budget: TimeBudget | None = None) -> tuple[int, list[keras.callbacks.Callback]]:
    """Chooses how training shows where it stands.

    Args:
      budget: See `ProgressLines`.

    Returns:
      (`verbose` for `fit`, callbacks to add): Keras's progress bar on a terminal, else lines; with
      a budget lines as well, as the bar would count towards a number of epochs.
    """
    if sys.stdout.isatty() and not budget:
        return 1, []
    return 0, [ProgressLines(budget)]
