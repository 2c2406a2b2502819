"""CIFAR's binary layouts: reading, writing and checking them.

A folder holds `train.bin`, `test.bin` and two files of class names, one name a line. A record of
3,074 bytes is the coarse label, the fine label, then 1,024 red, 1,024 green and 1,024 blue values,
each plane row-major. CIFAR-10 has one label and its training records in five files. Source:
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dataset.hashing import add_file

IMAGE_SHAPE = (32, 32, 3)  # height, width, channels
IMAGE_BYTES = 3072
RECORD_BYTES = 2 + IMAGE_BYTES
NUM_FINE_CLASSES = 100
NUM_COARSE_CLASSES = 20

TRAIN_FILE = "train.bin"
TEST_FILE = "test.bin"
FINE_NAMES_FILE = "fine_label_names.txt"
COARSE_NAMES_FILE = "coarse_label_names.txt"
FILES = (TRAIN_FILE, TEST_FILE, FINE_NAMES_FILE, COARSE_NAMES_FILE)

OFFICIAL_TRAIN_RECORDS = 50_000
OFFICIAL_TEST_RECORDS = 10_000
OFFICIAL_RECORDS = (OFFICIAL_TRAIN_RECORDS, OFFICIAL_TEST_RECORDS)

_PLANE_BYTES = IMAGE_BYTES // 3


class DataError(ValueError):
    """The data are missing, damaged or unsafe; the message says what, the value and what to do."""


@dataclass(frozen=True)
class Layout:
    """What tells the data sets apart.

    Attributes:
      name: Of the data set.
      labels: Of the bytes before a record's pixels: name, number of classes, and their names' file.
      train: Files of the training records, in their order.
      test: File of the test records.
      official: Number of training and of test records in the author's own files.
    """

    name: str
    labels: tuple[tuple[str, int, str], ...]
    train: tuple[str, ...]
    test: str
    official: tuple[int, int]

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return len(self.labels) + IMAGE_BYTES

    @property
    def files(self) -> tuple[str, ...]:
        """All files of a folder, records first."""
        # The class's names before its superclass's.
        return (*self.train, self.test, *(file for _, _, file in reversed(self.labels)))


CIFAR_100 = Layout(
    "cifar-100",
    (
        ("coarse", NUM_COARSE_CLASSES, COARSE_NAMES_FILE),
        ("fine", NUM_FINE_CLASSES, FINE_NAMES_FILE),
    ),
    (TRAIN_FILE,),
    TEST_FILE,
    OFFICIAL_RECORDS,
)
CIFAR_10 = Layout(
    "cifar-10",
    (("class", 10, "batches.meta.txt"),),
    tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test_batch.bin",
    OFFICIAL_RECORDS,
)
LAYOUTS = (CIFAR_100, CIFAR_10)


class LabelNames(NamedTuple):
    """Class names by label."""

    fine: tuple[str, ...]
    coarse: tuple[str, ...]


class RecordCounts(NamedTuple):
    """How many records each file of a folder holds."""

    train: int
    test: int


def decode_record(record: bytes) -> tuple[bytes, int, int]:
    """Decodes one record.

    Args:
      record: 3,074 bytes as they are in the file (planar, coarse label first).

    Returns:
      The image as 3,072 bytes in row-major height, width, channel order; the fine label; the
      coarse label. Labels are not range-checked: that is `check_folder`'s and the schema's part.

    Raises:
      DataError: If the record has another length.
    """
    if len(record) != RECORD_BYTES:
        raise DataError(
            f"a record has {len(record):,} bytes instead of {RECORD_BYTES:,}: "
            "the file is truncated or is not in CIFAR-100 binary format"
        )
    planes = np.frombuffer(record, np.uint8, offset=2).reshape(3, _PLANE_BYTES)
    return planes.T.tobytes(), record[1], record[0]


def read_records(
    path: str | os.PathLike[str],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Reads a whole file of records into memory.

    Args:
      path: A `train.bin` or `test.bin`.

    Returns:
      Images, uint8 [N, 32, 32, 3]; fine labels, int64 [N]; coarse labels, int64 [N].

    Raises:
      DataError: If the file is missing, empty or not a whole number of records.
    """
    records = _map_records(Path(path))
    planes = records[:, 2:].reshape(-1, 3, *IMAGE_SHAPE[:2])  # (N, 3, 32, 32)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))  # (N, 32, 32, 3)
    return images, records[:, 1].astype(np.int64), records[:, 0].astype(np.int64)


def write_records(
    path: str | os.PathLike[str],
    images: npt.NDArray[np.uint8],
    fine: npt.ArrayLike,
    coarse: npt.ArrayLike,
) -> None:
    """Writes records in the binary layout, to a temporary name first.

    Args:
      path: The file to write; replaced if it exists.
      images: Pixels, uint8 [N, 32, 32, 3].
      fine: Fine labels, integers [N], each 0 to 255 (the format's range, not the data set's).
      coarse: Coarse labels, likewise.

    Raises:
      ValueError: If shapes or types do not fit, or a label does not fit one byte.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(f"images must be uint8 [N, 32, 32, 3], got {images.dtype} {images.shape}")
    planes = images.transpose(0, 3, 1, 2).reshape(-1, IMAGE_BYTES)
    write_planes(path, planes, {"coarse": coarse, "fine": fine})


def write_planes(
    path: str | os.PathLike[str], planes: npt.NDArray[np.uint8], labels: Mapping[str, npt.ArrayLike]
) -> None:
    """Writes records whose images are colour planes already; else as `write_records`.

    Args:
      path: The file to write; replaced if it exists.
      planes: Colour planes, uint8 [N, 3072], each row 1,024 red, 1,024 green and 1,024 blue values.
      labels: For each byte before the pixels, a name and the labels, integers [N], each 0 to 255.

    Raises:
      ValueError: If shapes or types do not fit, or a label does not fit one byte.
    """
    planes = np.asarray(planes)
    if planes.dtype != np.uint8 or planes.shape[1:] != (IMAGE_BYTES,):
        raise ValueError(f"planes must be uint8 [N, 3072], got {planes.dtype} {planes.shape}")
    records = np.empty((len(planes), len(labels) + IMAGE_BYTES), np.uint8)
    records[:, len(labels) :] = planes
    for column, (name, given) in enumerate(labels.items()):
        values = np.asarray(given)
        if values.shape != planes.shape[:1]:
            raise ValueError(f"{len(planes)} images but {name} labels of shape {values.shape}")
        if values.size and (values.min() < 0 or values.max() > 255):
            raise ValueError(f"{name} labels must be 0 to 255, got {values.min()}..{values.max()}")
        records[:, column] = values
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(records.data)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_names(path: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Writes a file of class names, one name a line."""
    Path(path).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def write_label_names(folder: str | os.PathLike[str], names: LabelNames) -> None:
    """Writes the two files of class names, one name a line."""
    for file, labels in ((FINE_NAMES_FILE, names.fine), (COARSE_NAMES_FILE, names.coarse)):
        write_names(Path(folder, file), labels)


def read_label_names(folder: str | os.PathLike[str]) -> LabelNames:
    """Reads the class names of a binary folder.

    Args:
      folder: A folder in the binary layout.

    Returns:
      100 fine and 20 coarse names; a name's position is its label.

    Raises:
      DataError: If a file is missing, has another number of lines, or a name is blank or repeated.
    """
    return LabelNames(
        fine=read_names(Path(folder, FINE_NAMES_FILE), NUM_FINE_CLASSES),
        coarse=read_names(Path(folder, COARSE_NAMES_FILE), NUM_COARSE_CLASSES),
    )


def count_records(size: int, path: str, layout: Layout = CIFAR_100) -> int:
    """Returns how many records a file of this size holds.

    Args:
      size: The file's size in bytes.
      path: Its path, for the message alone: the file may lie anywhere.
      layout: Of the records.

    Returns:
      The number of records, at least 1.

    Raises:
      DataError: If the file is empty or not a whole number of records.
    """
    if size == 0:
        raise DataError(f"{path} is empty: copy or unpack the data set again")
    count, remainder = divmod(size, layout.record_bytes)
    if remainder:
        raise DataError(
            f"{path} has {size:,} bytes, which is {count:,} records of {layout.record_bytes:,} "
            f"bytes and {remainder:,} bytes over: probably truncated, copy or unpack it again"
        )
    return count


def parse_label_names(text: str, count: int, path: str) -> tuple[str, ...]:
    """Parses a file of class names, one name a line.

    A blank line is refused and not skipped, except at the end: all names below it would belong to
    other labels.

    Args:
      text: The file's contents.
      count: How many classes there are.
      path: The file's path, for the message alone: the file may lie anywhere.

    Returns:
      `count` names, without surrounding blanks; a name's position is its label.

    Raises:
      DataError: If there are more or fewer names, or a name is blank or repeated.
    """
    names = tuple(line.strip() for line in text.rstrip().split("\n"))
    for index, name in enumerate(names):
        if not name:
            raise DataError(
                f"{path}: line {index + 1} is blank, where a class name should be: write it there, "
                "as the names below it belong to the labels that follow"
            )
        if name in names[:index]:
            raise DataError(
                f"{path}: line {index + 1} repeats the class name {name!r} of line "
                f"{names.index(name) + 1}: give each class a name of its own"
            )
    if len(names) != count:
        raise DataError(
            f"{path} has {len(names)} lines instead of {count}: give each class a line with its "
            "name, in the order of the labels, or unpack the file again"
        )
    return names


def layout_of(folder: str | os.PathLike[str], default: Layout = CIFAR_100) -> Layout:
    """Tells by the files of records which data set a folder holds, whole or not."""
    for layout in LAYOUTS:
        if any(Path(folder, name).is_file() for name in (*layout.train, layout.test)):
            return layout
    return default


def check_folder(folder: str | os.PathLike[str]) -> RecordCounts:
    """Checks that a folder is a sound data set in a binary layout; fewer records are legal.

    Args:
      folder: A folder in a binary layout.

    Returns:
      The number of training and test records.

    Raises:
      DataError: For a missing, empty or truncated file, a label out of range or unusable names.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"data folder {folder} {what}: give the folder with {TRAIN_FILE} in it")
    layout = layout_of(folder)
    missing = [name for name in layout.files if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder} lacks {', '.join(missing)}: unpack the whole of {layout.name}-binary.tar.gz "
            f"(a folder holds {', '.join(layout.files)})"
        )
    for _, count, file in layout.labels:
        read_names(folder / file, count)
    train = sum(_check_records(folder / name, layout) for name in layout.train)
    return RecordCounts(train, _check_records(folder / layout.test, layout))


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Digests a folder's files, with their names and sizes.

    Args:
      folder: A folder in the binary layout.

    Returns:
      64 hexadecimal digits (SHA-256), equal for two folders exactly if the files' contents are.
    """
    digest = hashlib.sha256()
    for name in layout_of(folder).files:
        path = Path(folder, name)
        digest.update(f"{name} {path.stat().st_size}\n".encode())
        add_file(digest, path)
    return digest.hexdigest()


def _map_records(path: Path, layout: Layout = CIFAR_100) -> npt.NDArray[np.uint8]:
    """Maps a file of records as uint8 [N, bytes of a record] without reading it."""
    if not path.is_file():
        raise DataError(f"{path} does not exist: give a folder with {TRAIN_FILE} and {TEST_FILE}")
    count = count_records(path.stat().st_size, str(path), layout)
    return np.memmap(path, np.uint8, mode="r", shape=(count, layout.record_bytes))


def _check_records(path: Path, layout: Layout) -> int:
    records = _map_records(path, layout)
    for column, (kind, limit, _) in reversed(list(enumerate(layout.labels))):
        labels = records[:, column]
        if labels.max() >= limit:
            index = int(np.argmax(labels >= limit))
            raise DataError(
                f"{path}: record {index:,} has {kind} label {labels[index]}, but labels run from "
                f"0 to {limit - 1}: the file is damaged or holds records of another data set "
                "(CIFAR-10's are one byte shorter than CIFAR-100's)"
            )
    return len(records)


def read_names(path: Path, count: int) -> tuple[str, ...]:
    """Reads a file of class names; see `parse_label_names`.

    Raises:
      DataError: It is missing or no text, or see there.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: it names the {count} classes") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): unpack it again") from None
    return parse_label_names(text, count, str(path))
