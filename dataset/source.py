"""Opens a data set, of whichever kind it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dataset import format as binary
from dataset import storage
from dataset.cifar import KIND as CIFAR
from dataset.cifar import open_cifar
from dataset.folders import KIND as FOLDERS
from dataset.folders import open_folders
from dataset.format import DataError
from dataset.interface import Options, Source
from dataset.manifest import KIND as MANIFEST
from dataset.manifest import SUFFIXES as MANIFEST_SUFFIXES
from dataset.manifest import find_manifest, open_manifest
from dataset.parquet import KIND as PARQUET
from dataset.parquet import SUFFIX as PARQUET_SUFFIX
from dataset.parquet import find_files, is_parquet, open_parquet
from dataset.synthetic_names import NAME as SYNTHETIC

_OPENERS: dict[str, Callable[[str, Options, str], Source]] = {
    FOLDERS: open_folders,
    MANIFEST: open_manifest,
    PARQUET: open_parquet,
}
# Data sets that are called otherwise by people.
TITLES = {
    SYNTHETIC: "synthetic data",
    binary.CIFAR_100.name: "CIFAR-100",
    binary.CIFAR_10.name: "CIFAR-10",
}
# What a location can be, for people.
KINDS = {
    CIFAR: "CIFAR's binary layout",
    FOLDERS: "class folders",
    MANIFEST: "a manifest (CSV, TSV or JSON lines)",
    PARQUET: "Parquet files",
}


def kind_of(location: str) -> str:
    """Tells which kind of source a location is.

    Args:
      location: A path or a URI.

    Returns:
      Of `KINDS`.

    Raises:
      DataError: It does not exist, or is of no kind.
    """
    if not is_known_file(location) and is_cifar(location):
        return CIFAR
    folder = not storage.is_uri(location) and os.path.isdir(location)
    if location.lower().endswith(MANIFEST_SUFFIXES) or (folder and find_manifest(location)):
        return MANIFEST
    is_one = location.lower().endswith(PARQUET_SUFFIX)
    if is_one or (is_parquet(location) if folder else find_files(location)):
        return PARQUET
    if not folder:
        raise DataError(f"{location} is no data set that is read here: {', '.join(KINDS.values())}")
    return FOLDERS


def is_known_file(path: str) -> bool:
    """Tells whether a file is of a kind that is told by its name, and so no archive."""
    return path.lower().endswith((*MANIFEST_SUFFIXES, PARQUET_SUFFIX))


def is_cifar(location: str) -> bool:
    """Tells whether a location is a folder in CIFAR's binary layout, whole or not."""
    exists = storage.is_file if storage.is_uri(location) else os.path.isfile
    return any(
        exists(f"{location}/{file}")
        for layout in binary.LAYOUTS
        for file in (*layout.train, layout.test)
    )


def open_source(
    location: str, options: Options | None = None, *, name: str | None = None
) -> Source:
    """Opens a data set: its card is known then, no pixel is decoded yet.

    Args:
      location: A folder or file, by path or URI. CIFAR is unpacked already, see `dataset.locate`.
      options: The user's.
      name: Of the data set; None: by what it is, or by the last part of the location.

    Raises:
      DataError: It is missing, damaged, or a model cannot be made of it.
    """
    kind = kind_of(location)
    if kind == CIFAR:
        return open_cifar(location, options or Options(), name)
    path = Path(location)
    own_name = path.stem if is_known_file(location) else path.name
    return _OPENERS[kind](location, options or Options(), name or own_name)
