"""CIFAR's binary folders as a source: in place, in the order of the records."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dataset import format as binary
from dataset import storage
from dataset.card import SPLITS, TEST, TRAIN, VALIDATION, DataCard, SourceInfo, Split, Superclasses
from dataset.format import DataError
from dataset.hashing import Digest
from dataset.index import shown
from dataset.interface import Item, Options, Unreadable, quotas, shard_length, stored_size
from dataset.synthetic_names import LABEL_NAMES
from dataset.synthetic_names import NAME as SYNTHETIC

CIFAR_100 = "cifar-100"

_T = TypeVar("_T")

# The notebook trains with validation_split=0.1, which Keras takes from the end of the data.
_VALIDATION_DIVISOR = 10
_RECORDS_PER_READ = 1024
# Fewer leave no image for validation.
_MIN_TRAIN_RECORDS = 10


@dataclass(frozen=True)
class CifarShard:
    """Records of one file; see `dataset.interface.Shard`.

    Attributes:
      path: Of the file.
      records: Indices in it, rising.
    """

    path: str
    records: npt.NDArray[np.int64]

    def read(self) -> Iterator[Item]:
        """See `dataset.interface.Shard`."""
        wanted = self.records
        with storage.open_file(self.path) as file:
            at = 0
            while at < len(wanted):
                first = int(wanted[at])
                end = int(np.searchsorted(wanted, first + _RECORDS_PER_READ))
                file.seek(first * binary.RECORD_BYTES)
                block = file.read((int(wanted[end - 1]) + 1 - first) * binary.RECORD_BYTES)
                for index in wanted[at:end].tolist():
                    start = (index - first) * binary.RECORD_BYTES
                    record = block[start : start + binary.RECORD_BYTES]
                    image, label, superclass = binary.decode_record(record)
                    pixels = np.frombuffer(image, np.uint8).reshape(binary.IMAGE_SHAPE)
                    yield Item(f"{self.path}:{index}", pixels, label, superclass)
                at = end


@dataclass(frozen=True)
class CifarSource:
    """A folder in the binary layout; see `dataset.interface.Source`."""

    card: DataCard
    counts: Mapping[str, Sequence[int]]
    notes: Sequence[str]
    records: Mapping[str, tuple[str, npt.NDArray[np.int64]]] = field(repr=False)
    unreadable: Sequence[Unreadable] = ()

    def shards(self, split: str) -> Sequence[CifarShard]:
        """See `dataset.interface.Source`."""
        path, indices = self.records[split]
        length = shard_length(self.card.image_size)
        return [
            CifarShard(path, indices[at : at + length]) for at in range(0, len(indices), length)
        ]


def open_cifar(location: str, options: Options, name: str | None = None) -> CifarSource:
    """Opens a folder in the binary layout.

    Labels are not checked here: see `dataset.format.check_folder`.

    Args:
      location: The folder, as a path or URI.
      options: The user's.
      name: Of the data set; None: by its class names, so that a generated folder is never taken
        for CIFAR-100, wherever it lies.

    Raises:
      DataError: A file is missing, empty or not a whole number of records.
    """
    if options.group or options.columns:
        raise DataError(f"{location} is CIFAR, which has no groups or columns: drop these options")
    digest = hashlib.sha256()
    paths = {TRAIN: f"{location}/{binary.TRAIN_FILE}", TEST: f"{location}/{binary.TEST_FILE}"}
    labels = {split: _read_labels(path, digest) for split, path in paths.items()}
    classes, groups = (
        _read_names(f"{location}/{file}", count, digest)
        for file, count in (
            (binary.FINE_NAMES_FILE, binary.NUM_FINE_CLASSES),
            (binary.COARSE_NAMES_FILE, binary.NUM_COARSE_CLASSES),
        )
    )
    end = len(labels[TRAIN]) - len(labels[TRAIN]) // _VALIDATION_DIVISOR
    ranges = {
        TRAIN: (TRAIN, np.arange(end)),
        VALIDATION: (TRAIN, np.arange(end, len(labels[TRAIN]))),
        TEST: (TEST, np.arange(len(labels[TEST]))),
    }
    records = {}
    counts = {}
    for split, (file, indices) in ranges.items():
        fine = labels[file][indices, 1]
        if options.limit:
            chosen = _first_of_each(fine, quotas(options.limit, len(classes)))
            indices, fine = indices[chosen], fine[chosen]
        records[split] = (paths[file], indices)
        counts[split] = np.bincount(fine, minlength=len(classes))[: len(classes)].tolist()
    synthesized = bool(set(classes) & set(LABEL_NAMES.fine))
    name = name or (SYNTHETIC if synthesized else CIFAR_100)
    size = binary.IMAGE_SHAPE[:2]
    official = (len(labels[TRAIN]), len(labels[TEST])) == binary.OFFICIAL_RECORDS
    card = DataCard(
        name=name,
        classes=classes,
        image_size=stored_size(size, size, options),
        resize=options.resize,
        splits={split: Split(len(records[split][1]), split == VALIDATION) for split in SPLITS},
        source=SourceInfo(
            kind=SYNTHETIC if synthesized else CIFAR_100,
            location=location,
            fingerprint=digest.hexdigest(),
            smallest=size,
            largest=size,
            unreadable=0,
            duplicates=0,
        ),
        superclasses=Superclasses(groups, _superclasses(labels[TRAIN], len(classes))),
        limit=options.limit,
        subset=bool(options.limit) or (name == CIFAR_100 and not official),
    )
    return CifarSource(card, counts, _check_counts(counts, classes, location), records)


def _check_counts(
    counts: Mapping[str, Sequence[int]], classes: Sequence[str], location: str
) -> list[str]:
    """Refuses what no model can be made of; says which classes are missing.

    Args:
      counts: Split -> images by class.
      classes: Their names.
      location: For the messages.
    """
    present = {
        split: {name for name, count in zip(classes, counts[split], strict=True) if count}
        for split in SPLITS
    }
    if len(present[TRAIN]) == 1:
        raise DataError(
            f"{location} has images of {shown(present[TRAIN])} alone: a model needs two classes "
            "at least"
        )
    if (images := sum(counts[TRAIN]) + sum(counts[VALIDATION])) < _MIN_TRAIN_RECORDS:
        raise DataError(
            f"{location} has {images} training images: give {_MIN_TRAIN_RECORDS} or more"
        )
    known = present[TRAIN] | present[VALIDATION]  # validation is a part of the training file
    if unknown := sorted(present[TEST] - known):
        raise DataError(
            f"{TEST} has images of {shown(unknown)}, of which {TRAIN} has none: give {TRAIN} some, "
            f"or take them out of {TEST}"
        )
    notes = []
    for split in SPLITS:
        if missing := [name for name in classes if name not in present[split]]:
            notes.append(
                f"{split} has no image of {len(missing)} of {len(classes)} classes: "
                f"{shown(missing)}"
            )
    return notes


def _first_of_each(labels: npt.NDArray[np.uint8], limits: Sequence[int]) -> npt.NDArray[np.int64]:
    """Positions of the first images of each class, rising; labels out of range are left out."""
    chosen = [np.flatnonzero(labels == label)[:most] for label, most in enumerate(limits)]
    return np.sort(np.concatenate(chosen))


def _read(
    path: str, digest: Digest, take: Callable[[bytes], _T], record_bytes: int = 1
) -> tuple[int, list[_T]]:
    """Reads a file once, for its digest and for what is taken of each block.

    Returns:
      Its size in bytes, and what was taken.
    """
    try:
        file = storage.open_file(path)
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; the data folder must hold {', '.join(binary.FILES)}."
        ) from None
    taken = []
    with file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        # As `dataset.format.fingerprint`.
        digest.update(f"{os.path.basename(path)} {size}\n".encode())
        while block := file.read(_RECORDS_PER_READ * record_bytes):
            digest.update(block)
            taken.append(take(block))
    return size, taken


def _read_labels(path: str, digest: Digest) -> npt.NDArray[np.uint8]:
    """Reads the labels of all records: uint8 [N, 2], coarse and fine."""

    def labels(block: bytes) -> npt.NDArray[np.uint8]:
        whole = len(block) // binary.RECORD_BYTES
        records = np.frombuffer(block, np.uint8, whole * binary.RECORD_BYTES)
        return records.reshape(-1, binary.RECORD_BYTES)[:, :2].copy()

    size, parts = _read(path, digest, labels, binary.RECORD_BYTES)
    binary.count_records(size, path)
    return np.concatenate(parts)


def _read_names(path: str, count: int, digest: Digest) -> tuple[str, ...]:
    _, parts = _read(path, digest, bytes)
    try:
        text = b"".join(parts).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): unpack it again") from None
    return binary.parse_label_names(text, count, path)


def _superclasses(labels: npt.NDArray[np.uint8], classes: int) -> tuple[int | None, ...]:
    """Which superclass goes with each class; None for one that no record has.

    Raises:
      DataError: A class has two.
    """
    result: list[int | None] = [None] * classes
    for coarse, fine in np.unique(labels, axis=0).tolist():
        # Labels out of range are DataGate's to report.
        if fine >= classes:
            continue
        if result[fine] is not None:
            raise DataError(
                f"the class {fine} has two superclasses, {result[fine]} and {coarse}: the files "
                "are damaged, get them again"
            )
        result[fine] = coarse
    return tuple(result)
