"""A trained model in a folder: what `benchmarks/gpu_train.py` leaves and any backend loads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from trainer.model import build_model
from trainer.preset import Preset

WEIGHTS_FILE = "model.weights.h5"
REPORT_FILE = "training.json"


def load(folder: str | os.PathLike[str]) -> tuple[keras.Model, dict[str, Any]]:
    """Builds the model that a folder tells of, with its weights.

    Args:
        folder: With `model.weights.h5`, Keras's format, and `training.json`, whose keys `preset`
            (all fields) and `num_classes` say what they are the weights of.

    Returns:
        The model, uncompiled, and the contents of `training.json`.

    Raises:
        ValueError: A file is missing, or the weights are not those of the preset.
    """
    folder = Path(folder)
    for name in (REPORT_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: give the folder of a finished training.")
    report = json.loads((folder / REPORT_FILE).read_text())
    network = build_model(preset_from(report["preset"]), num_classes=report["num_classes"])
    try:
        network.load_weights(folder / WEIGHTS_FILE)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} does not fit the preset in {REPORT_FILE} beside it: {error}"
        ) from error
    return network, report


def save(network: keras.Model, report: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
    """Writes what `load` reads; each file appears when it is whole, the report last.

    Args:
        network: Of `trainer.model.build_model`, with an optimizer or without.
        report: See `load`.
        folder: Made when needed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bare = keras.Model(network.inputs, network.outputs)  # without the optimizer's state
    save_weights(bare, folder / WEIGHTS_FILE)
    write_json(report, folder / REPORT_FILE)


def save_weights(network: keras.Model, path: Path) -> None:
    """Writes weights, and the optimizer's state if the network is compiled, whole or not at all.

    Args:
        network: Any model.
        path: Its name ends with `.weights.h5`; replaced if it exists.
    """
    partial = path.with_name(f"partial.{path.name}")
    try:
        network.save_weights(partial, overwrite=True)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Writes a JSON file, whole or not at all."""
    partial = path.with_name(f"partial.{path.name}")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def preset_from(fields: Mapping[str, Any]) -> Preset:
    """Makes a preset of its fields as JSON has them, with lists in place of tuples.

    Raises:
        ValueError: A field is unknown or out of range.
    """
    values: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()
    }
    try:
        return Preset(**values)
    except TypeError as error:
        raise ValueError(f"The preset is of another version of this program: {error}") from error
