"""The training report: how a model was trained, written with its export and read by everybody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from trainer.preset import Preset

# In the export's assets.extra.
REPORT_FILE = "training.json"

_STRICT = ConfigDict(extra="forbid")


class ReportError(ValueError):
    """A file is no training report that this version reads."""


@dataclass(frozen=True, config=_STRICT)
class Start:
    """The model that a training has started from.

    Attributes:
      epochs: That have led to it, those of the models before it included.
      val_top_1_accuracy: What it has before the first step, a fraction.
    """

    epochs: int
    val_top_1_accuracy: float


@dataclass(frozen=True, config=_STRICT)
class Normalization:
    """Of each channel.

    Attributes:
      mean: In units of pixel values.
      variance: In squared pixel values.
    """

    mean: tuple[float, ...]
    variance: tuple[float, ...]


@dataclass(frozen=True, config=_STRICT)
class TrainingReport:
    """How a model was trained.

    Attributes:
      dataset: The data card's name.
      limit: The data card's.
      subset: The data card's.
      train_examples: Images that were trained on.
      preset: With all that a run, or a Tuner, has set otherwise.
      tuned: What a Tuner has chosen, by `trainer.hyperparameters`' names; None without one.
      base_model: The model that it has started from; None for random weights.
      seed: Of everything random.
      engine: What has trained, of `trainer.engines`.
      precision: The dtype policy that it was trained under.
      device: The name of what it was trained on.
      devices: How many of these.
      versions: Library -> version.
      trainable_parameters: How many.
      normalization: What images are shifted and scaled by.
      history: Metrics of each epoch, as `trainer.checkpoint.History` has them.
    """

    dataset: str
    limit: int | None
    subset: bool
    train_examples: int
    preset: Preset
    tuned: Mapping[str, Any] | None
    base_model: Start | None
    seed: int
    engine: str
    precision: str
    device: str
    devices: int
    versions: Mapping[str, str]
    trainable_parameters: int
    normalization: Normalization
    history: list[dict[str, int | float]]

    @property
    def epochs(self) -> int:
        """Epochs that have led to the model, those of the models before it included."""
        return len(self.history) + (self.base_model.epochs if self.base_model else 0)

    def to_json(self) -> str:
        """Writes the report, to be read by `from_json`."""
        return _ADAPTER.dump_json(self, indent=1).decode() + "\n"


_ADAPTER: TypeAdapter[TrainingReport] = TypeAdapter(TrainingReport)


def from_json(text: str | bytes, where: str) -> TrainingReport:
    """Reads a report.

    Args:
      text: What `TrainingReport.to_json` has written.
      where: It is from, for the message.

    Raises:
      ReportError: It is not JSON, a key is missing or unknown, or a value does not fit.
    """
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(map(str, first["loc"])) or "it"
        raise ReportError(
            f"{where} is not the training report that this version reads ({what}: {first['msg']}): "
            "train the model again, or use the version that wrote it"
        ) from None
