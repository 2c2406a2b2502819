"""What the pipeline's process and the one that trains with JAX hand to each other, in a folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.preset import ADAPTER, Preset

_JOB = "job.json"
_RESULT = "result.json"
_ERROR = "error.json"
_START_WEIGHTS = "start.npz"
_TRAINED_WEIGHTS = "trained.npz"
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
      preset: What to train, and how.
      num_classes: Classes of the labels.
      seed: Of everything random.
      mean: Of each channel, in units of pixel values.
      variance: Of each channel, in squared pixel values.
      checkpoints: Folder of this training's checkpoints; it goes on from these.
      other_classes: Whether the weights to start from are of a model of other classes.
    """

    preset: Preset
    num_classes: int
    seed: int
    mean: list[float]
    variance: list[float]
    checkpoints: str
    other_classes: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a training.

    Attributes:
      history: Metrics of each epoch, as `trainer.checkpoint.History` has them.
      precision: The dtype policy that it was trained under.
      device: The name of what it was trained on.
      devices: How many of these.
      versions: Library -> version.
      probabilities: Of the classes, for each of the first images of the validation split, computed
        in float32.
    """

    history: list[dict[str, float]]
    precision: str
    device: str
    devices: int
    versions: dict[str, str]
    probabilities: list[list[float]]


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a training has failed.

    Attributes:
      message: A line for people.
      traceback: For the log.
      of_memory: Whether the device's memory was too small.
    """

    message: str
    traceback: str
    of_memory: bool


class Folder:
    """Where a job, its data and its result are.

    Args:
      path: An existing folder of this job alone.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write_split(self, name: str, images: np.ndarray, labels: np.ndarray) -> None:
        """Writes one of `SPLITS`: images, uint8 [N, H, W, 3], and labels, integers [N]."""
        np.save(self.path / f"{name}_images.npy", images)
        np.save(self.path / f"{name}_labels.npy", labels)

    def read_split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Reads what `write_split` has written."""
        images, labels = (np.load(self.path / f"{name}_{x}.npy") for x in ("images", "labels"))
        return images, labels

    def write_job(self, job: Job, weights: bytes | None) -> None:
        """Writes what is to be done.

        Args:
          job: The training.
          weights: To start from (see `trainer.weights`); None for random ones.
        """
        if weights is not None:
            (self.path / _START_WEIGHTS).write_bytes(weights)
        self._write(_JOB, dataclasses.asdict(job))

    def read_job(self) -> tuple[Job, bytes | None]:
        """Reads what `write_job` has written."""
        fields = self._read(_JOB)
        fields["preset"] = ADAPTER.validate_python(fields["preset"])
        weights = self.path / _START_WEIGHTS
        return Job(**fields), weights.read_bytes() if weights.exists() else None

    def write_result(self, result: Result, weights: bytes) -> None:
        """Writes the trained weights, then what else became of it."""
        (self.path / _TRAINED_WEIGHTS).write_bytes(weights)
        self._write(_RESULT, dataclasses.asdict(result))

    def read_result(self) -> tuple[Result, bytes]:
        """Reads what `write_result` has written."""
        return Result(**self._read(_RESULT)), (self.path / _TRAINED_WEIGHTS).read_bytes()

    def write_failure(self, failure: Failure) -> None:
        """Writes why there will be no result."""
        self._write(_ERROR, dataclasses.asdict(failure))

    def read_failure(self) -> Failure | None:
        """Reads why; None where nothing was written."""
        return Failure(**self._read(_ERROR)) if (self.path / _ERROR).exists() else None

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(value, indent=1) + "\n")

    def _read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())
