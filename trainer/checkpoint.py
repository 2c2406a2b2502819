"""What an interrupted training continues from: one file after each epoch, with all that it needs.

On any backend, and from one to the other: arrays are in the order of the network's weights and of
its optimizer's variables.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

_HISTORY = "history"
# The one before the newest stays, for when the disk damages the newest.
_KEPT = 2
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class CheckpointError(RuntimeError):
    """What a training continues from could not be written."""


class History(keras.callbacks.Callback):
    """The metrics of every finished epoch, also of those before an interruption.

    Attributes:
      epochs: An object of metrics for each, with `epoch`, from 1, and `seconds`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[dict[str, float]] = []
        self._epoch_began = 0.0

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        """Starts the epoch's clock."""
        self._epoch_began = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        """Appends the epoch."""
        seconds = time.monotonic() - self._epoch_began
        metrics = {name: round(float(value), 6) for name, value in (logs or {}).items()}
        self.epochs.append({"epoch": epoch + 1, **metrics, "seconds": round(seconds, 1)})


class Checkpoint(keras.callbacks.Callback):
    """Saves weights, optimizer and history after every epoch, in a file that is whole or not there.

    It is made in memory and written as plain bytes: HDF5, in which Keras saves, ends the process by
    a segmentation fault where the disk is full. (Keras's BackupAndRestore also writes over its file
    in place.)

    Args:
      folder: Of this training alone; made when needed.
      history: To be saved with it; in the list of callbacks before this one.
    """

    def __init__(self, folder: str, history: History):
        super().__init__()
        self._folder = Path(folder)
        self._history = history

    def restore(self, model: keras.Model) -> int:
        """Loads what the last finished epoch has left, and says which that was.

        A damaged file is named, and passed over for the one before it.

        Args:
          model: Compiled.

        Returns:
          How many epochs are finished; 0 when there is nothing to load.
        """
        model.optimizer.build(model.trainable_variables)  # or it would have no state to set
        variables = _variables(model)
        saved = self._saved()
        for path in reversed(saved):
            try:
                arrays, self._history.epochs = _read(path)
                if [a.shape for a in arrays] != [tuple(v.shape) for v in variables]:
                    raise ValueError("it is of another network")
            except (
                OSError,
                ValueError,
                KeyError,
                EOFError,
                zipfile.BadZipFile,
                zlib.error,
            ) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                print(f"  the checkpoint {path} is damaged: {reason}", flush=True)
                continue
            for variable, array in zip(variables, arrays):
                variable.assign(array)
            epochs = len(self._history.epochs)
            print(f"  continuing after epoch {epochs}", flush=True)
            return epochs
        if saved:
            print("  no checkpoint is whole: training anew", flush=True)
        self._history.epochs = []
        return 0

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        """Saves, then removes all files but the newest and the one before it.

        Raises:
          CheckpointError: The disk is full or not writable; earlier files are kept.
        """
        arrays: dict[str, Any] = {
            f"{index:05}/{variable.path}": variable.numpy()
            for index, variable in enumerate(_variables(self.model))
        }
        buffer = io.BytesIO()
        arrays[_HISTORY] = np.array(json.dumps(self._history.epochs))
        np.savez(buffer, **arrays)
        partial = self._folder / "partial"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(buffer.getbuffer())
            os.replace(partial, self._folder / f"epoch-{epoch + 1:06}.npz")
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise CheckpointError(
                f"the checkpoint of epoch {epoch + 1} could not be written to {self._folder}: "
                f"{error.strerror}. Free space on that disk or make the folder writable, and run "
                f"again: training goes on after epoch {epoch if self._saved() else 0}."
            ) from error
        for path in self._saved()[:-_KEPT]:
            path.unlink()

    def _saved(self) -> list[Path]:
        return sorted(self._folder.glob("epoch-*.npz"))


def _variables(model: keras.Model) -> list[keras.Variable]:
    return [*model.weights, *model.optimizer.variables]


def _read(path: Path) -> tuple[list[np.ndarray], list[dict[str, float]]]:
    """Arrays and history; every byte is read, and so checked."""
    with np.load(path) as file:
        history = json.loads(str(file[_HISTORY]))
        return [file[name] for name in sorted(set(file.files) - {_HISTORY})], history
