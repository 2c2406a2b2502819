"""Whole runs of the executor on images of the user's own."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base

from dataset import images, synthetic
from dataset.card import SPLITS
from dataset.export import export
from dataset.format import DataError
from dataset.interface import Options
from dataset.source import open_source
from tests.support.ingest import files, ingest, read_card, read_rows
from tests.support.pictures import class_folders, encoded, pixels, write


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """60 photographs of two sizes in two classes, and one that is cut off."""
    root = class_folders(tmp_path / "photos", {"cat": 30, "dog": 28})
    for number in (1, 2):
        write(root / f"dog/wide-{number}.png", encoded(900 + number, (8, 20)))
    write(root / "cat/cut.jpg", encoded(990, (64, 64), "JPEG")[:1500])
    return root


def test_photographs_in_folders(photos: Path, tmp_path: Path):
    options = Options(max_unreadable=0.05, image_size=(8, 8))
    examples = ingest(photos, tmp_path / "out", options=options, dataset_name="my photos")
    card = read_card(examples)
    assert (card.name, card.classes, card.shape) == ("my photos", ("cat", "dog"), (8, 8, 3))
    assert (card.source.smallest, card.source.largest) == ((8, 8), (64, 64))
    report = json.loads(Path(examples.uri, "unreadable.json").read_text())
    assert report == [{"file": "cat/cut.jpg", "reason": "a truncated JPEG"}]
    assert card.source.unreadable == 1
    rows = {split: read_rows(examples, split) for split in SPLITS}
    assert {split: len(part) for split, part in rows.items()} == {
        split: card.splits[split].examples for split in SPLITS
    }
    assert sum(map(len, rows.values())) == 60
    expected = {(pixels(at).tobytes(), int(at >= 30), None) for at in range(58)} | {
        (images.resize(pixels(900 + at, (8, 20)), (8, 8)).tobytes(), 1, None) for at in (1, 2)
    }
    assert {tuple(row) for part in rows.values() for row in part} == expected
    assert sorted(os.listdir(examples.uri)) == [
        *("Split-test", "Split-train", "Split-validation", "dataset.json", "unreadable.json")
    ]
    # The same data in another place, and with files made in another order, give the same bytes.
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    again = ingest(moved, tmp_path / "again", options=options, dataset_name="my photos")
    for split in SPLITS:
        for path, other in zip(files(examples, split), files(again, split), strict=True):
            assert Path(path).read_bytes() == Path(other).read_bytes()


def test_more_unreadable_images_than_allowed(photos: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"1 of 61 images \(1\.6%\).*\n  cat/cut\.jpg: a truncated"):
        ingest(photos, tmp_path / "out", dataset_name="photos")


def test_a_class_of_which_nothing_can_be_read(photos: Path, tmp_path: Path):
    for number in range(3):
        write(photos / f"fox/{number}.jpg", encoded(995 + number, (64, 64), "JPEG")[:1500])
    with pytest.raises(DataError, match="no image of 'fox' in train can be read"):
        ingest(photos, tmp_path / "out", dataset_name="p", options=Options(max_unreadable=0.5))


@pytest.mark.parametrize("form", ["folders", "csv", "parquet"])
def test_synthetic_set_in_other_forms(tmp_path: Path, form: str):
    folder = synthetic.generate(tmp_path / "set", train=400, test=200)
    location = export(open_source(str(folder)), tmp_path / form, form)
    original, written = (
        ingest(data, tmp_path / f"of {name}", options=Options(preset_size=32))
        for name, data in (("binary", folder), (form, location))
    )
    for split in SPLITS:
        assert sorted(read_rows(original, split)) == sorted(read_rows(written, split))
    before, after = read_card(original), read_card(written)
    assert (before.classes, before.image_size) == (after.classes, after.image_size)
    assert before.superclasses.names == after.superclasses.names


def test_any_format_becomes_rgb(tmp_path: Path):
    """Images of every format and mode, upright and resized as the served graph does."""
    picture = Image.fromarray(pixels(77, (40, 30)))
    turned = Image.Exif()
    turned[Base.Orientation] = 6
    root = class_folders(tmp_path / "photos", {"cat": 10, "dog": 10})
    saved: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "plain.png": (picture, {}),
        "grey.png": (picture.convert("L"), {}),
        "deep.png": (Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(40, 30) * 50), {}),
        "palette.png": (picture.convert("P"), {}),
        "transparent.png": (picture.convert("RGBA"), {}),
        "plain.jpg": (picture, {}),
        "progressive.jpg": (picture, {"progressive": True}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "turned.jpg": (picture, {"exif": turned}),
        "first.gif": (picture, {}),
        "photo.bmp": (picture, {}),
        "photo.webp": (picture, {}),
    }
    cases = {}
    for name, (image, how) in saved.items():
        image.save(root / "cat" / name, **how)
        cases[name] = images.decode((root / "cat" / name).read_bytes())
    assert cases["turned.jpg"].shape == (30, 40, 3)
    options = Options(image_size=(24, 16), resize="pad")
    examples = ingest(root, tmp_path / "out", options=options, dataset_name="photos")
    stored = {row.image for split in SPLITS for row in read_rows(examples, split)}
    for name, decoded in cases.items():
        assert images.resize(decoded, (24, 16), "pad").tobytes() in stored, name
    assert np.frombuffer(next(iter(stored)), np.uint8).size == 24 * 16 * 3
