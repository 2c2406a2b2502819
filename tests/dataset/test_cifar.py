"""Records of which no model can be made are refused, and missing classes are named."""

from pathlib import Path

import numpy as np
import pytest

from dataset import synthetic
from dataset.cifar import open_cifar
from dataset.format import TEST_FILE, TRAIN_FILE, DataError, write_label_names, write_records
from dataset.interface import Options

NAMES = synthetic.LABEL_NAMES


def write(folder: Path, train: list[int], test: list[int]) -> Path:
    """Writes records of these classes; a class's superclass is its label's fifth."""
    write_label_names(folder, NAMES)
    for file, labels in ((TRAIN_FILE, train), (TEST_FILE, test)):
        images = np.zeros((len(labels), 32, 32, 3), np.uint8)
        write_records(folder / file, images, labels, [label // 5 for label in labels])
    return folder


def notes(folder: Path) -> list[str]:
    return list(open_cifar(str(folder), Options()).notes)


def test_missing_classes_are_counted_and_named(tmp_path: Path):
    half = list(range(50)) * 4
    found = notes(write(tmp_path, half, half))
    first, second = NAMES.fine[50:52]
    assert found[0].startswith(f"train has no image of 50 of 100 classes: {first!r}, {second!r}, ")
    assert [note.partition(" of 100")[0] for note in found[1:]] == [
        "validation has no image of 80",
        "test has no image of 50",
    ]


def test_a_test_split_of_other_classes_is_refused(tmp_path: Path):
    write(tmp_path, list(range(50)) * 4, list(range(50, 100)))
    first = sorted(NAMES.fine[50:])[0]
    with pytest.raises(DataError, match=f"test has images of {first!r}, .* train has none: give"):
        notes(tmp_path)


def test_a_single_class_is_refused(tmp_path: Path):
    write(tmp_path, [7] * 100, [7] * 10)
    with pytest.raises(DataError, match=f"images of '{NAMES.fine[7]}' alone: a model needs two"):
        notes(tmp_path)


def test_fewer_than_ten_training_records_are_refused(tmp_path: Path):
    write(tmp_path, list(range(9)), list(range(9)))
    with pytest.raises(DataError, match="has 9 training images: give 10 or more"):
        notes(tmp_path)


def test_two_superclasses_of_a_class_are_refused_with_both(tmp_path: Path):
    write(tmp_path, list(range(20)) * 2, [0])
    path = tmp_path / TRAIN_FILE
    content = bytearray(path.read_bytes())
    assert content[1] == 0  # the first record's class
    content[0] = 19
    path.write_bytes(content)
    message = (
        "'checkered_blue_circle' has two superclasses, 'checkered_circles' and 'striped_triangles'"
    )
    with pytest.raises(DataError, match=message):
        notes(tmp_path)
