"""CIFAR-10 in its official forms, made of random pixels."""

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dataset.card import SPLITS
from dataset.cifar import open_cifar
from dataset.format import DataError
from dataset.interface import Options
from dataset.locate import locate
from tests.support.pictures import read

NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
BATCHES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
EACH = 20


def records() -> dict[str, np.ndarray]:
    """Labels and planes of each file, uint8 [20, 3073]."""
    random = np.random.default_rng(0)
    result = {}
    for name in BATCHES:
        result[name] = random.integers(0, 256, (EACH, 3073), np.uint8)
        result[name][:, 0] = np.arange(EACH) % 10
    return result


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The binary and the python form as folders and as archives, each alone in a folder."""
    root = tmp_path_factory.mktemp("forms")
    binary = root / "a/cifar-10-batches-bin"
    python = root / "b/cifar-10-batches-py"
    binary.mkdir(parents=True)
    python.mkdir(parents=True)
    for name, content in records().items():
        (binary / f"{name}.bin").write_bytes(content.tobytes())
        batch = {
            b"batch_label": b"training batch 1 of 5",
            b"labels": content[:, 0].tolist(),
            b"data": np.ascontiguousarray(content[:, 1:]),
            b"filenames": [b"a.png"] * EACH,
        }
        (python / name).write_bytes(pickle.dumps(batch, protocol=2))
    (binary / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    (binary / "readme.html").write_text("<html>")
    meta = {b"num_cases_per_batch": 10000, b"label_names": list(NAMES), b"num_vis": 3072}
    (python / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    for folder, target in (
        (binary, "c/cifar-10-binary.tar.gz"),
        (python, "d/cifar-10-python.tar.gz"),
    ):
        (root / target).parent.mkdir()
        with tarfile.open(root / target, "w:gz", compresslevel=1) as tar:
            tar.add(folder, folder.name)
    return root


@pytest.mark.parametrize(
    "data",
    [
        *("a", "b", "c", "d", "a/cifar-10-batches-bin", "b/cifar-10-batches-py"),
        *("c/cifar-10-binary.tar.gz", "d/cifar-10-python.tar.gz"),
    ],
)
def test_every_form_gives_the_same_data(forms: Path, tmp_path: Path, data: str):
    lines: list[str] = []
    dataset = locate(str(forms / data), tmp_path / "work", report=lines.append)
    assert any("CIFAR-10, a subset: 100 train and 20 test records" in line for line in lines)
    source = open_cifar(dataset.location, Options())
    card = source.card
    assert (card.name, card.source.kind, card.classes) == ("cifar-10", "cifar-10", NAMES)
    assert card.superclasses is None and card.subset
    assert [card.splits[split].examples for split in SPLITS] == [90, 10, 20]
    planes = np.concatenate(list(records().values()))
    rows = [item for split in SPLITS for item in read(source, split)]
    for item, record in zip(rows, planes, strict=True):
        assert item.label == record[0] and item.superclass is None
        expected = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
        np.testing.assert_array_equal(item.image, expected)
    if not data.startswith("a"):
        assert Path(dataset.location).name == f"cifar-10-{dataset.fingerprint[:12]}"


def test_limit_is_over_all_files(forms: Path):
    source = open_cifar(str(forms / "a/cifar-10-batches-bin"), Options(limit=30))
    assert source.counts["train"] == [3] * 10
    names = [os.path.basename(item.name) for item in read(source, "train")]
    assert names[:2] == ["data_batch_1.bin:0", "data_batch_1.bin:1"]
    assert names[-1] == "data_batch_2.bin:9"


def test_it_is_not_taken_without_being_named(forms: Path, tmp_path: Path):
    """The reference is CIFAR-100: what Keras has of another data set is not looked at."""
    dataset = locate(
        None,
        tmp_path / "work",
        search_dir=tmp_path / "nothing",
        keras_cache=forms / "b",
        download=False,
        synthetic_records=(200, 100),
        report=lambda line: None,
    )
    assert dataset.name == "synthetic"


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin", "batches.meta.txt"])
def test_missing_file(forms: Path, tmp_path: Path, name: str):
    folder = tmp_path / "bin"
    folder.mkdir()
    for path in (forms / "a/cifar-10-batches-bin").iterdir():
        if path.name != name:
            (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=f"lacks {name}: unpack the whole of cifar-10-binary"):
        locate(str(folder), tmp_path / "work")


def test_classes_that_make_no_model(forms: Path, tmp_path: Path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for path in (forms / "a/cifar-10-batches-bin").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in BATCHES[:5]:
        path = folder / f"{name}.bin"
        content = np.fromfile(path, np.uint8).reshape(-1, 3073)
        content[:, 0] %= 5
        content.tofile(path)
    with pytest.raises(DataError, match=r"test has images of 'dog', .* of which train has none"):
        locate(str(folder), tmp_path / "work")
    for name in BATCHES[:5]:
        path = folder / f"{name}.bin"
        content = np.fromfile(path, np.uint8).reshape(-1, 3073)
        content[:, 0] = 0
        content.tofile(path)
    with pytest.raises(DataError, match="alone: a model needs two classes"):
        locate(str(folder), tmp_path / "work")
