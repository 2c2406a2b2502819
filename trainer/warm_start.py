"""Training that goes on from the weights of an exported model, in place of random ones."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from dataset import card as data_card
from dataset.card import DataCard
from trainer import export, weights
from trainer.preset import ARCHITECTURE, Preset


class WarmStartError(RuntimeError):
    """A model cannot be trained on; the message says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """An exported model to start from.

    Attributes:
      weights: Path of its weights.
      report: How it was trained (`trainer.export.TRAINING_REPORT_FILE`).
      card: What it was trained on (`dataset.card`).
    """

    weights: str
    report: Mapping[str, Any]
    card: DataCard

    @property
    def epochs(self) -> int:
        """Epochs that have led to it, those of the models that it was started from included."""
        earlier = self.report.get("base_model")
        return len(self.report["history"]) + (earlier["epochs"] if earlier else 0)

    @property
    def tuned_architecture(self) -> dict[str, Any]:
        """What a Tuner has chosen of its architecture, in place of its preset's."""
        tuned = self.report.get("tuned") or {}
        return {name: value for name, value in tuned.items() if name in ARCHITECTURE}

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
          WarmStartError: The architecture is another one, or the classes are.
        """
        theirs = self.report["preset"]
        if theirs["name"] == preset.name:
            preset = dataclasses.replace(preset, **self.tuned_architecture)
        ours = json.loads(json.dumps(dataclasses.asdict(preset)))  # lists for tuples, as there
        # A field that is newer than the model has the value that leaves all as it was.
        defaults = {field.name: field.default for field in dataclasses.fields(Preset)}
        defaults = json.loads(json.dumps(defaults, default=str))
        differences = [
            f"{name} is {theirs.get(name, defaults[name])} there and {ours[name]} here"
            for name in ARCHITECTURE
            if theirs.get(name, defaults[name]) != ours[name]
        ]
        if differences:
            raise WarmStartError(
                f"training of preset {preset.name!r} cannot start from the model pushed last, "
                f"which is of preset {theirs['name']!r}: {'; '.join(differences)}. Train that "
                "preset (--preset), or from scratch (without --warm_start)."
            )
        names, here = self.card.classes, card.classes
        if names != here:
            pairs = itertools.zip_longest(names, here)
            index, (theirs, ours) = next(
                (index, pair) for index, pair in enumerate(pairs) if pair[0] != pair[1]
            )
            raise WarmStartError(
                f"training cannot start from the model pushed last, which knows other classes than "
                f"the data: {len(names)} there and {len(here)} here, and class {index} is "
                f"{theirs!r} there and {ours!r} here. Train from scratch (without --warm_start)."
            )
        return preset


def read_base_model(folder: str | None) -> BaseModel | None:
    """Looks at the model that TFX's Trainer or Tuner was given to start from.

    Args:
      folder: A model that `trainer.export` has written; it need not exist.

    Returns:
      The model; None where there is none, as before the first one was pushed.

    Raises:
      WarmStartError: It was exported without its weights.
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
    report = json.loads(_read(f"{extra}/{export.TRAINING_REPORT_FILE}"))
    path = f"{extra}/{data_card.CARD_FILE}"
    return BaseModel(weights, report, data_card.from_json(_read(path), path))


def load_weights(network: keras.Model, base: BaseModel) -> None:
    """Gives a network the weights of a model.

    Args:
      network: Of the same architecture (see `BaseModel.adapt`).
      base: The model.

    Raises:
      WarmStartError: They do not fit: the code behind an architecture has changed.
    """
    arrays = weights.unpack(base.packed_weights())
    theirs, ours = ([tuple(x.shape) for x in each] for each in (arrays, network.weights))
    if theirs != ours:
        raise WarmStartError(
            f"the weights of the model pushed last ({base.weights}) do not fit: it has "
            f"{len(theirs)} of them, the model here {len(ours)}, or of other shapes. The code has "
            "changed since; train once from scratch (without --warm_start)."
        )
    network.set_weights(arrays)


def _read(path: str) -> str:
    with tf.io.gfile.GFile(path) as file:
        text: str = file.read()
    return text
