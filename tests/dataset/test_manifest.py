import csv
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from dataset.card import SPLITS, Superclasses
from dataset.format import DataError
from dataset.interface import Options, Source
from dataset.source import open_source
from tests.support.pictures import class_folders, encoded, labels, names, read, write

Rows = list[dict[str, Any]]


def write_manifest(path: Path, rows: Rows) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
        else:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if "tsv" in path.name else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    return path


def open_(path: Path, **options: Any) -> Source:
    return open_source(str(path), Options(**options))


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """Twelve images of two classes, in three splits, in one folder."""
    result: Rows = []
    for at in range(12):
        write(tmp_path / f"img/{at}.png", encoded(at))
        split = ("train", "train", "val", "test")[at // 3]
        label, superclass = (("a cat", "beast"), ("日本", "place"))[at % 2]
        result.append(
            {"path": f"img/{at}.png", "label": label, "superclass": superclass, "split": split}
        )
    return result


@pytest.mark.parametrize("name", ["set.csv", "set.tsv", "set.jsonl", "manifest.csv"])
def test_forms(tmp_path: Path, rows: Rows, name: str):
    path = write_manifest(tmp_path / name, rows)
    source = open_(path)
    card = source.card
    assert (card.source.kind, card.name, card.classes) == ("manifest", path.stem, ("a cat", "日本"))
    assert card.superclasses == Superclasses(("beast", "place"), (0, 1))
    assert [card.splits[split].examples for split in SPLITS] == [6, 3, 3]
    expected = {(row["path"], row["label"]) for row in rows if row["split"] == "val"}
    assert labels(source, "validation") == expected
    item = next(item for item in read(source, "test") if item.name == "img/9.png")
    assert (item.image, item.label, item.superclass) == (encoded(9), 1, 1)


def test_in_a_folder_the_manifest_wins(tmp_path: Path, rows: Rows):
    write_manifest(tmp_path / "metadata.csv", rows)
    class_folders(tmp_path, {"fox": 2}, first=50)
    source = open_(tmp_path)
    assert source.card.source.kind == "manifest" and source.card.classes == ("a cat", "日本")
    assert [note for note in source.notes if "fox" in note] == [
        "skipped 2 images that the manifest does not name ('fox/0.png', 'fox/1.png')"
    ]
    write_manifest(tmp_path / "labels.jsonl", rows)
    with pytest.raises(DataError, match=r"has 'metadata\.csv', 'labels\.jsonl': name the one"):
        open_(tmp_path)


@pytest.mark.parametrize("column", ["file_name", "Filename", "image", "URL"])
def test_columns_are_found(tmp_path: Path, rows: Rows, column: str):
    renamed = [{column: row["path"], "Category": row["label"], "n": 1} for row in rows]
    source = open_(write_manifest(tmp_path / "set.csv", renamed))
    assert source.card.classes == ("a cat", "日本")
    assert source.card.superclasses is None and source.card.splits["test"].derived


def test_columns_are_named(tmp_path: Path, rows: Rows):
    renamed = [{"bild": row["path"], "art": row["label"], "label": "x"} for row in rows]
    path = write_manifest(tmp_path / "set.csv", renamed)
    with pytest.raises(DataError, match=r"no column for the path \(it has 'bild', 'art', "):
        open_(path)
    source = open_(path, columns={"path": "bild", "label": "art"})
    assert source.card.classes == ("a cat", "日本")
    with pytest.raises(DataError, match=r"has no column 'species' .*correct --columns label="):
        open_(path, columns={"path": "bild", "label": "species"})


def test_numbers_are_names(tmp_path: Path, rows: Rows):
    numbered = [{**row, "label": 10 + 190 * (row["label"] == "日本")} for row in rows]
    assert open_(write_manifest(tmp_path / "a.jsonl", numbered)).card.classes == ("10", "200")


def test_group_is_a_column_or_found_in_the_path(tmp_path: Path):
    rows = []
    for at in range(240):
        write(tmp_path / f"{at}.png", encoded(at))
        rows.append({"path": f"{at}.png", "label": "ab"[at % 2], "patient": f"p{at // 6}"})
    path = write_manifest(tmp_path / "set.csv", rows)
    source = open_(path, group="patient")
    where: dict[str, str] = {}
    for split in SPLITS:
        assert names(source, split)
        for name in names(source, split):
            patient = rows[int(name[:-4])]["patient"]
            assert where.setdefault(patient, split) == split


def test_names_in_another_form_of_unicode(tmp_path: Path, rows: Rows):
    """As a Mac's zip archive has them."""
    for row in rows:
        old = tmp_path / row["path"]
        row["path"] = f"Köln/{old.stem}-é.png"
        write(tmp_path / unicodedata.normalize("NFD", row["path"]), old.read_bytes())
    source = open_(write_manifest(tmp_path / "set.csv", rows))
    assert [len(names(source, split)) for split in SPLITS] == [6, 3, 3]
    folder = next(tmp_path.glob("K*"))
    write(folder / unicodedata.normalize("NFC", "7-é.png"), encoded(7))
    with pytest.raises(DataError, match=r"has two files .*, in two forms of Unicode"):
        open_(tmp_path / "set.csv")


def test_uris_and_absolute_paths(tmp_path: Path, rows: Rows):
    pytest.importorskip("fsspec")
    for row in rows[:6]:
        row["path"] = str(tmp_path / row["path"])
    for row in rows[6:]:
        row["path"] = f"file://{tmp_path / row['path']}"
    source = open_(write_manifest(tmp_path / "set.csv", rows))
    assert [len(read(source, split)) for split in SPLITS] == [6, 3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "img/gone.png"}, r"1 of the files .*do not exist: 'img/gone\.png \(line 5\)'"),
        ({"path": ""}, r"set\.csv, line 5 has no path"),
        ({"label": " "}, r"set\.csv, line 5 has no label"),
        ({"label": ""}, r"set\.csv, line 5 has no label"),
        ({"split": "holdout"}, r"line 5 has the split 'holdout': use train, validation or test"),
        ({"superclass": "thing"}, r"class '日本' has two superclasses, '.*' and '.*' \(of"),
        ({"superclass": ""}, r"'img/3\.png' has no superclass, where others have one"),
        ({"path": "img/2.png"}, r"names 'img/2\.png' twice, in lines 4 and 5, with other values"),
        ({"split": ""}, "some images have a split and others have none, such as 'img/3.png'"),
    ],
)
def test_wrong_rows(tmp_path: Path, rows: Rows, change: dict[str, str], message: str):
    rows[3] |= change
    path = write_manifest(tmp_path / "set.csv", rows)
    with pytest.raises(DataError, match=message):
        open_(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"path,label\n", "has no rows"),
        ("a.csv", b"path,label\na.png,b,c\n", "line 2 has more or fewer fields than the"),
        ("a.csv", b"path,label\na.png\n", "line 2 has more or fewer fields than the"),
        ("a.csv", "path,label\né,b\n".encode("latin-1"), "is not UTF-8 text"),
        ("a.jsonl", b'{"path": "a", "label": "b"}\n{"path', "line 2 is not JSON"),
        (
            "a.jsonl",
            b'{"path": "a", "label": "b"}\n{"path": "c", "label": "b", "split": "test"}\n',
            "line 2 has 'split', which line 1 does not have",
        ),
        ("a.jsonl", b"[1]\n", "line 1 is no object"),
        ("a.jsonl", b'{"path": ["a"], "label": "b"}\n', r"'path' is \['a'\]: give a text"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, name: str, content: bytes, message: str):
    with pytest.raises(DataError, match=message):
        open_(write(tmp_path / name, content))


def test_excel_writes_semicolons_and_a_mark(tmp_path: Path, rows: Rows):
    lines = ["path;label", *(f"{row['path']};{row['label']}" for row in rows)]
    (tmp_path / "set.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    assert open_(tmp_path / "set.csv").card.classes == ("a cat", "日本")


def test_unreadable_files(tmp_path: Path, rows: Rows):
    (tmp_path / "img/0.png").write_bytes(b"")
    path = write_manifest(tmp_path / "set.csv", rows)
    with pytest.raises(DataError, match=r"1 of 12 images \(8\.3%\) cannot be read"):
        open_(path)
    assert [item.reason for item in open_(path, max_unreadable=0.1).unreadable] == ["empty"]
