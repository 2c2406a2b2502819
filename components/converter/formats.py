"""The formats that `--export` offers: their files, and how well each has to agree with the model.

Cheap to import: the command line is checked with it.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

TFLITE = "tflite"
ONNX = "onnx"

# Where the files are in a pushed version. Model servers do not look there.
EXPORTS_FOLDER = os.path.join("assets.extra", "exports")
LABELS_FILE = "labels.txt"
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class ExportedFile:
    """A file that a format consists of.

    Attributes:
      name: Its name.
      min_agreement: For how many of the test images its most probable class must be that of the
        SavedModel, as a fraction.
    """

    name: str
    min_agreement: float


FLOAT16 = ExportedFile("model.float16.tflite", 0.99)
INT8 = ExportedFile("model.int8.tflite", 0.9)
ONNX_MODEL = ExportedFile("model.onnx", 0.999)

FORMATS = (TFLITE, ONNX)

_PACKAGES = {TFLITE: (), ONNX: ("onnx", "onnxruntime", "tf2onnx")}


class MissingPackagesError(RuntimeError):
    """What a format needs is not installed."""


def parse(text: str) -> tuple[str, ...]:
    """Reads a list of formats.

    Args:
      text: Names separated by commas.

    Returns:
      Of `FORMATS`, each once, in that order.

    Raises:
      ValueError: A name is unknown or missing.
    """
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise ValueError(f"a name is missing: there are {', '.join(FORMATS)}")
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no format: there are {', '.join(FORMATS)}")
    return tuple(name for name in FORMATS if name in names)


def check_installed(formats: tuple[str, ...]) -> None:
    """Finds out whether what the formats need is installed, without importing it.

    Raises:
      MissingPackagesError: It is not.
    """
    for name in formats:
        missing = [package for package in _PACKAGES[name] if not importlib.util.find_spec(package)]
        if missing:
            raise MissingPackagesError(
                f"--export {name} needs {', '.join(missing)}: install the package's extra with "
                "`pip install .[onnx]`, or run `make setup`."
            )
