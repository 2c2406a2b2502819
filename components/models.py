"""Models where they are served from: versions in a TF Serving model base path."""

from __future__ import annotations

import json
import os
from typing import Any

from tfx import types
from tfx.dsl.io import fileio
from tfx.utils import path_utils

_SAVED_MODEL_FILE = "saved_model.pb"
# TensorFlow writes a new random identifier into it each time that it saves a model.
IDENTITY_FILE = "fingerprint.pb"
# What Evaluator has measured of a pushed version.
MEASURED_FILE = os.path.join("assets.extra", "measured.json")


def versions(serving_dir: str) -> list[str]:
    """Lists the complete versions under a TF Serving model base path.

    Args:
      serving_dir: The base path; it need not exist.

    Returns:
      The folders' names, the oldest first.
    """
    if not fileio.exists(serving_dir):
        return []
    # Some file systems list folders with a trailing slash.
    names = [str(name).rstrip("/") for name in fileio.listdir(serving_dir)]
    complete = [
        name
        for name in names
        if name.isdecimal() and fileio.exists(os.path.join(serving_dir, name, _SAVED_MODEL_FILE))
    ]
    return sorted(complete, key=int)


def read_json(path: str) -> Any:
    """Reads a JSON file; None if there is none, or it is damaged."""
    content = _read(path)
    try:
        return None if content is None else json.loads(content)
    except ValueError:
        return None


def has_model(artifact: types.Artifact) -> bool:
    """Whether a Model artifact holds a SavedModel for serving."""
    folder = path_utils.serving_model_dir(artifact.uri)
    return fileio.exists(os.path.join(folder, _SAVED_MODEL_FILE))


def is_same_model(folder: str, artifact: types.Artifact) -> bool:
    """Whether a SavedModel is a copy of the one in a Model artifact."""
    return has_same_file(folder, path_utils.serving_model_dir(artifact.uri), IDENTITY_FILE)


def has_same_file(folder: str, other: str, name: str) -> bool:
    """Whether two SavedModels both have a file, with the same contents."""
    contents = _read(os.path.join(folder, name))
    return contents is not None and contents == _read(os.path.join(other, name))


def _read(path: str) -> bytes | None:
    if not fileio.exists(path):
        return None
    with fileio.open(path, "rb") as file:
        return file.read()
