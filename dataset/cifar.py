"""CIFAR's binary layouts as a source: in place, in the order of the records."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TypeVar

import numpy as np
import numpy.typing as npt

from dataset import format as binary
from dataset import storage
from dataset.card import SPLITS, TEST, TRAIN, VALIDATION, DataCard, SourceInfo, Split, Superclasses
from dataset.format import DataError, Layout
from dataset.hashing import Digest
from dataset.interface import Item, Options, Unreadable, quotas, shard_length, stored_size
from dataset.splitting import shown
from dataset.synthetic_names import LABEL_NAMES
from dataset.synthetic_names import NAME as SYNTHETIC

KIND = "cifar"

_T = TypeVar("_T")

# The notebook trains with validation_split=0.1, which Keras takes from the end of the data.
_VALIDATION_DIVISOR = 10
_RECORDS_PER_READ = 1024
# Fewer leave no image for validation.
_MIN_TRAIN_RECORDS = 10


@dataclass(frozen=True)
class CifarShard:
    """Records; see `dataset.interface.Shard`.

    Attributes:
      layout: Of the files.
      files: Each with the indices of its records, rising.
    """

    layout: Layout
    files: Sequence[tuple[str, npt.NDArray[np.int64]]]

    def read(self) -> Iterator[Item]:
        """See `dataset.interface.Shard`."""
        for path, wanted in self.files:
            with storage.open_file(path) as file:
                for index, record in _records(file, wanted, self.layout.record_bytes):
                    planes = record[-binary.IMAGE_BYTES :].reshape(3, -1)
                    pixels = np.ascontiguousarray(planes.T).reshape(binary.IMAGE_SHAPE)
                    labels = record[: -binary.IMAGE_BYTES].tolist()
                    superclass = labels[0] if len(labels) > 1 else None
                    yield Item(f"{path}:{index}", pixels, labels[-1], superclass)


def _records(
    file: IO[bytes], wanted: npt.NDArray[np.int64], size: int
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Reads records at rising indices, many at a time where they are close together."""
    at = 0
    while at < len(wanted):
        first = int(wanted[at])
        end = int(np.searchsorted(wanted, first + _RECORDS_PER_READ))
        file.seek(first * size)
        block = file.read((int(wanted[end - 1]) + 1 - first) * size)
        for index in wanted[at:end].tolist():
            yield index, np.frombuffer(block, np.uint8, size, (index - first) * size)
        at = end


@dataclass(frozen=True)
class CifarSource:
    """A folder in a binary layout; see `dataset.interface.Source`."""

    layout: Layout
    card: DataCard
    counts: Mapping[str, Sequence[int]]
    notes: Sequence[str]
    records: Mapping[str, tuple[Sequence[str], npt.NDArray[np.int64], npt.NDArray[np.int64]]] = (
        field(repr=False)
    )
    unreadable: Sequence[Unreadable] = ()

    def shards(self, split: str) -> Sequence[CifarShard]:
        """See `dataset.interface.Source`."""
        paths, files, indices = self.records[split]
        length = shard_length(self.card.image_size)
        shards = []
        for at in range(0, len(indices), length):
            part, rows = files[at : at + length], indices[at : at + length]
            of_file = [(paths[number], rows[part == number]) for number in np.unique(part)]
            shards.append(CifarShard(self.layout, of_file))
        return shards


def open_cifar(location: str, options: Options, name: str | None = None) -> CifarSource:
    """Opens a folder in a binary layout.

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
    layout = _layout(location)
    digest = hashlib.sha256()
    train = [f"{location}/{file}" for file in layout.train]
    # Which file a record of train is in, and its index there.
    per_file = [_read_labels(path, digest, layout) for path in train]
    labels = {
        TRAIN: np.concatenate(per_file),
        TEST: _read_labels(f"{location}/{layout.test}", digest, layout),
    }
    in_file = np.concatenate([np.full(len(part), at) for at, part in enumerate(per_file)])
    in_file_index = np.concatenate([np.arange(len(part)) for part in per_file])
    names = [
        _read_names(f"{location}/{file}", count, digest, layout)
        for _, count, file in reversed(layout.labels)
    ]
    classes = names[0]
    end = len(labels[TRAIN]) - len(labels[TRAIN]) // _VALIDATION_DIVISOR
    ranges = {
        TRAIN: (TRAIN, np.arange(end)),
        VALIDATION: (TRAIN, np.arange(end, len(labels[TRAIN]))),
        TEST: (TEST, np.arange(len(labels[TEST]))),
    }
    records = {}
    counts = {}
    for split, (part, indices) in ranges.items():
        label = labels[part][indices, -1]
        if options.limit:
            chosen = _first_of_each(label, quotas(options.limit, len(classes)))
            indices, label = indices[chosen], label[chosen]
        if part == TRAIN:
            records[split] = (train, in_file[indices], in_file_index[indices])
        else:
            records[split] = ([f"{location}/{layout.test}"], np.zeros_like(indices), indices)
        counts[split] = np.bincount(label, minlength=len(classes))[: len(classes)].tolist()
    synthesized = bool(set(classes) & set(LABEL_NAMES.fine))
    name = name or (SYNTHETIC if synthesized else layout.name)
    size = binary.IMAGE_SHAPE[:2]
    official = (len(labels[TRAIN]), len(labels[TEST])) == layout.official
    superclasses = None
    if len(names) > 1:
        superclasses = Superclasses(names[1], _superclasses(labels[TRAIN], classes, names[1]))
    card = DataCard(
        name=name,
        classes=classes,
        image_size=stored_size(size, size, options),
        resize=options.resize,
        splits={split: Split(len(records[split][2]), split == VALIDATION) for split in SPLITS},
        source=SourceInfo(
            kind=SYNTHETIC if synthesized else layout.name,
            location=location,
            fingerprint=digest.hexdigest(),
            smallest=size,
            largest=size,
            unreadable=0,
            duplicates=0,
        ),
        superclasses=superclasses,
        limit=options.limit,
        subset=bool(options.limit) or (name == layout.name and not official),
    )
    return CifarSource(layout, card, counts, _check_counts(counts, classes, location), records)


def _layout(location: str) -> Layout:
    """By the files that are there; CIFAR-100 where there are none."""
    exists = storage.is_file if storage.is_uri(location) else os.path.isfile
    for layout in binary.LAYOUTS:
        if any(exists(f"{location}/{file}") for file in (*layout.train, layout.test)):
            return layout
    return binary.CIFAR_100


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
    path: str, digest: Digest, take: Callable[[bytes], _T], layout: Layout
) -> tuple[int, list[_T]]:
    """Reads a file once, for its digest and for what is taken of each block.

    Returns:
      Its size in bytes, and what was taken.
    """
    try:
        file = storage.open_file(path)
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; the data folder must hold {', '.join(layout.files)}."
        ) from None
    taken = []
    with file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        # As `dataset.format.fingerprint`.
        digest.update(f"{os.path.basename(path)} {size}\n".encode())
        while block := file.read(_RECORDS_PER_READ * layout.record_bytes):
            digest.update(block)
            taken.append(take(block))
    return size, taken


def _read_labels(path: str, digest: Digest, layout: Layout) -> npt.NDArray[np.uint8]:
    """Reads the labels of all records: uint8 [N, labels of a record]."""

    def labels(block: bytes) -> npt.NDArray[np.uint8]:
        whole = len(block) // layout.record_bytes
        records = np.frombuffer(block, np.uint8, whole * layout.record_bytes)
        return records.reshape(-1, layout.record_bytes)[:, : len(layout.labels)].copy()

    size, parts = _read(path, digest, labels, layout)
    binary.count_records(size, path, layout)
    return np.concatenate(parts)


def _read_names(path: str, count: int, digest: Digest, layout: Layout) -> tuple[str, ...]:
    _, parts = _read(path, digest, bytes, layout)
    try:
        text = b"".join(parts).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): unpack it again") from None
    return binary.parse_label_names(text, count, path)


def _superclasses(
    labels: npt.NDArray[np.uint8], classes: Sequence[str], names: Sequence[str]
) -> tuple[int | None, ...]:
    """Which superclass goes with each class; None for one that no record has.

    Raises:
      DataError: A class has two.
    """
    result: list[int | None] = [None] * len(classes)
    for coarse, fine in np.unique(labels, axis=0).tolist():
        # Labels out of range are DataGate's to report.
        if fine >= len(classes) or coarse >= len(names):
            continue
        known = result[fine]
        if known is not None:
            raise DataError(
                f"the class {classes[fine]!r} has two superclasses, {names[known]!r} and "
                f"{names[coarse]!r}: the files are damaged, get them again"
            )
        result[fine] = coarse
    return tuple(result)
