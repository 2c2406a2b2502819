"""The same data set in every form gives the same pixels, labels and splits."""

import os
from pathlib import Path

import numpy as np
import pytest

from dataset import images, synthetic
from dataset.card import SPLITS
from dataset.export import FORMS, export
from dataset.format import DataError
from dataset.interface import Options, Source
from dataset.locate import locate
from dataset.source import open_source
from tests.support.pictures import read

Rows = set[tuple[bytes, str, str | None]]


def rows(source: Source, split: str) -> Rows:
    card = source.card
    return {
        (
            np.asarray(
                images.decode(item.image) if isinstance(item.image, bytes) else item.image
            ).tobytes(),
            card.classes[item.label],
            None if item.superclass is None else card.superclasses.names[item.superclass],
        )
        for item in read(source, split)
    }


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = synthetic.generate(tmp_path_factory.mktemp("binary") / "set", train=600, test=200)
    return open_source(str(folder))


@pytest.mark.parametrize("form", FORMS)
def test_synthetic_set(binary: Source, tmp_path: Path, form: str):
    location = export(binary, tmp_path / "out", form)
    source = open_source(str(location))
    assert source.card.source.kind == {"csv": "manifest", "jsonl": "manifest"}.get(form, form)
    assert source.card.name == "synthetic"
    assert source.card.classes == binary.card.classes
    assert source.card.superclasses.names == binary.card.superclasses.names
    for split in SPLITS:
        assert rows(source, split) == rows(binary, split)
        assert source.card.splits[split].examples == binary.card.splits[split].examples
        assert not source.card.splits[split].derived
    with pytest.raises(DataError, match="exists already"):
        export(binary, tmp_path / "out", form)


@pytest.mark.parametrize("form", FORMS)
def test_real_images(tmp_path: Path, form: str):
    data = os.environ.get("CIFAR100_DATA")
    if not data:
        pytest.skip("CIFAR100_DATA does not name the real data")
    original = open_source(locate(data, tmp_path / "work").location)
    location = export(original, tmp_path / "out", form)
    # It has a few images in two splits, and keeps them as an archive.
    source = open_source(str(location), Options(keep_duplicates=True))
    assert any("images are in two splits" in note for note in source.notes)
    for split in SPLITS:
        assert len(read(source, split)) == len(read(original, split))
        assert rows(source, split) == rows(original, split)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--train", "300", "--test", "100", "--as", "folders"]
    assert synthetic.main([str(tmp_path / "set"), *arguments]) == 0
    assert sorted(os.listdir(tmp_path / "set")) == [
        "superclasses.txt",
        "test",
        "train",
        "validation",
    ]
    assert os.listdir(tmp_path) == ["set"]
    assert synthetic.main([str(tmp_path / "set"), *arguments]) == 1
    assert "exists already" in capsys.readouterr().err
