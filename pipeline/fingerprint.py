"""Fingerprints of code, for cache keys.

TFX's cache key has the dotted path of a function, not the code behind it: without a fingerprint a
changed `trainer/` would leave its old results in use.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

from trainer import presets

# Their versions count as code: another line of TFX in the same place starts anew. JAX's does not,
# which need not be where a pipeline is compiled.
_LIBRARIES = ("tensorflow", "keras", "tensorflow-transform")
_TRAINER = Path(presets.__file__).parent


def preprocessing_code() -> str:
    """Identifies the code that Transform runs."""
    return _digest([_TRAINER / "preprocessing.py"])


def training_code() -> str:
    """Identifies the code that Trainer runs."""
    return _digest(sorted(_TRAINER.rglob("*.py")))


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for package in _LIBRARIES:
        digest.update(f"{package} {metadata.version(package)}\0".encode())
    for file in files:
        digest.update(str(file.relative_to(_TRAINER)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
