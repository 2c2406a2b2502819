"""Training that goes on from the weights of an exported model, in place of random ones."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import keras
import tensorflow as tf

from dataset import card as data_card
from dataset.card import DataCard
from dataset.format import DataError
from trainer import export, weights
from trainer import report as reports
from trainer.preset import Architecture, Preset, replace
from trainer.report import TrainingReport


class WarmStartError(RuntimeError):
    """A model cannot be trained on; the message says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """An exported model to start from.

    Attributes:
      weights: Path of its weights.
      report: How it was trained.
      card: What it was trained on (`dataset.card`).
    """

    weights: str
    report: TrainingReport
    card: DataCard

    @property
    def tuned_architecture(self) -> dict[str, Any]:
        """What a Tuner has chosen of its architecture, in place of its preset's."""
        names = {field.name for field in dataclasses.fields(Architecture)}
        return {name: value for name, value in (self.report.tuned or {}).items() if name in names}

    def packed_weights(self) -> bytes:
        """Reads its weights, as `trainer.weights` has them."""
        with tf.io.gfile.GFile(self.weights, "rb") as file:
            packed: bytes = file.read()
        return packed

    def fingerprint(self) -> str:
        """Identifies its weights."""
        return hashlib.sha256(self.packed_weights()).hexdigest()[:16]

    def adapt(self, preset: Preset, card: DataCard) -> Preset:
        """Gives a preset what a Tuner chose of this model's architecture, and sees if they fit.

        Args:
          preset: What is to be trained.
          card: What it is to be trained on.

        Returns:
          The preset, with this model's number of blocks if a Tuner has chosen that for it.

        Raises:
          WarmStartError: The architecture is another one.
        """
        theirs = self.report.preset
        if theirs.name == preset.name:
            preset = replace(preset, **self.tuned_architecture)
        ours = dataclasses.asdict(preset.architecture)
        differences = [
            f"{name} is {value} there and {ours[name]} here"
            for name, value in dataclasses.asdict(theirs.architecture).items()
            if value != ours[name]
        ]
        if not theirs.architecture.resize and self.card.shape != card.shape:
            differences.append(f"images are {self.card.shape} there and {card.shape} here")
        if differences:
            raise WarmStartError(
                f"training of preset {preset.name!r} cannot start from the model pushed last, "
                f"which is of preset {theirs.name!r}: {'; '.join(differences)}. Train that "
                "preset (--preset), or from scratch (without --warm_start)."
            )
        return preset

    def has_other_classes(self, card: DataCard) -> bool:
        """Whether its classifier is of no use for some data."""
        return self.card.classes != card.classes


def read_base_model(folder: str | None) -> BaseModel | None:
    """Looks at the model that TFX's Trainer or Tuner was given to start from.

    Args:
      folder: A model that `trainer.export` has written; it need not exist.

    Returns:
      The model; None where there is none, as before the first one was pushed.

    Raises:
      WarmStartError: It was exported without its weights, or by another version.
    """
    if folder is None or not tf.io.gfile.exists(folder):
        return None
    extra = f"{folder}/{export.EXTRA_ASSETS}"
    weights = f"{extra}/{export.WEIGHTS_FILE}"
    if not tf.io.gfile.exists(weights):
        raise WarmStartError(
            f"the model pushed last has no {export.WEIGHTS_FILE} ({extra}): a version of this "
            "project that did not keep the trained weights has exported it. Train once from "
            "scratch (without --warm_start)."
        )
    report, card = f"{extra}/{reports.REPORT_FILE}", f"{extra}/{data_card.CARD_FILE}"
    try:
        return BaseModel(
            weights,
            reports.from_json(_read(report), report),
            data_card.from_json(_read(card), card),
        )
    except (reports.ReportError, DataError) as error:
        raise WarmStartError(
            f"training cannot start from the model pushed last: {error}. Or train once from "
            "scratch (without --warm_start)."
        ) from error


def load_weights(network: keras.Model, base: BaseModel, card: DataCard) -> None:
    """Gives a network the weights of a model; its classifier's only where the classes are the same.

    Args:
      network: Of the same architecture (see `BaseModel.adapt`).
      base: The model.
      card: What is to be trained on.

    Raises:
      WarmStartError: They do not fit: the code behind an architecture has changed.
    """
    arrays = weights.unpack(base.packed_weights())
    try:
        weights.load(network, arrays, classifier=not base.has_other_classes(card))
    except ValueError as error:
        raise WarmStartError(
            f"the weights of the model pushed last ({base.weights}) do not fit: {error}. The code "
            "has changed since; train once from scratch (without --warm_start)."
        ) from error


def _read(path: str) -> str:
    with tf.io.gfile.GFile(path) as file:
        text: str = file.read()
    return text
