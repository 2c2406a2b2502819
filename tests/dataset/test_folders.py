import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from dataset.card import SPLITS, Superclasses
from dataset.format import DataError
from dataset.interface import Options, Source, Unreadable, stored_size
from dataset.locate import locate
from dataset.source import open_source
from tests.support.pictures import class_folders, encoded, labels, names, read, write


def open_(root: Path, **options: Any) -> Source:
    return open_source(str(root), Options(**options))


def counts(source: Source) -> tuple[int, ...]:
    return tuple(len(read(source, split)) for split in SPLITS)


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Two classes in three splits, of different images."""
    root = tmp_path / "photos"
    for at, (split, count) in enumerate({"train": 5, "valid": 2, "test": 3}.items()):
        class_folders(root / split, {"cat": count, "dog": count}, first=100 * at)
    return root


def test_given_splits(given: Path):
    source = open_(given)
    card = source.card
    assert (card.name, card.classes, card.image_size) == ("photos", ("cat", "dog"), (8, 8))
    assert (card.source.kind, card.source.location) == ("folders", str(given))
    assert labels(source, "validation") == {
        (f"valid/{name}/{number}.png", name) for name in ("cat", "dog") for number in range(2)
    }
    assert counts(source) == (10, 4, 6)
    assert {n: (s.examples, s.derived) for n, s in card.splits.items()} == {
        "train": (10, False),
        "validation": (4, False),
        "test": (6, False),
    }
    assert source.counts == {"train": [5, 5], "validation": [2, 2], "test": [3, 3]}
    item = next(item for item in read(source, "test") if item.name == "test/dog/0.png")
    assert (item.image, item.label, item.superclass) == (encoded(203), 1, None)


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev", "eval", "Val"])
def test_names_of_the_validation_folder(given: Path, name: str):
    (given / "valid").rename(given / name)
    assert len(names(open_(given), "validation")) == 4


def test_two_folders_for_one_split(given: Path):
    class_folders(given / "val", {"cat": 1, "dog": 1})
    with pytest.raises(DataError, match="two folders for validation, 'val' and 'valid'"):
        open_(given)


def test_missing_splits_are_set_apart(tmp_path: Path):
    root = class_folders(tmp_path / "set", {"a": 200, "b": 100, "c": 3})
    source = open_(root)
    train, validation, test = (names(source, split) for split in SPLITS)
    assert len(train | validation | test) == 303
    assert 225 <= len(train) <= 260 and 20 <= len(test) <= 42
    for split in SPLITS:
        assert min(source.counts[split]) >= 1
        assert source.card.splits[split].derived == (split != "train")
    # Neither new photographs nor other names move the others.
    class_folders(root, {"more": 0})
    for number in range(100):
        write(root / "a" / f"new-{number}.png", encoded(10_000 + number))
    os.rename(root / "a/0.png", root / "a/renamed.png")
    again = open_(root)
    for split, before in zip(SPLITS, (train, validation, test)):
        moved = {name.replace("a/renamed", "a/0") for name in names(again, split)}
        assert before <= moved | {name for name in before if name.startswith("c/")}


def test_validation_is_set_apart_of_train_where_test_is_given(given: Path):
    for path in sorted((given / "valid").rglob("*.png")):
        path.unlink()
    for folder in ("cat", "dog", ""):
        (given / "valid" / folder).rmdir()
    source = open_(given)
    assert counts(source)[2] == 6 and source.counts["validation"] == [1, 1]
    assert [source.card.splits[split].derived for split in SPLITS] == [False, True, False]


def test_a_duplicate_never_lands_in_two_splits(tmp_path: Path):
    root = class_folders(tmp_path / "set", {"a": 60, "b": 60})
    for number in range(60):
        write(root / "a" / f"copy-{number}.png", encoded(number))
    source = open_(root)
    for split in SPLITS:
        found = {name.replace("copy-", "") for name in names(source, split)}
        both = [name for name in names(source, split) if name.startswith("a/")]
        assert len(both) == 2 * len([name for name in found if name.startswith("a/")])
    assert source.card.source.duplicates == 0


def test_group_stays_together(tmp_path: Path):
    root = tmp_path / "set"
    for at in range(240):  # 40 patients of six photographs
        write(root / "ab"[at % 2] / f"patient{at // 6}_{at}.png", encoded(at))
    source = open_(root, group=r"(patient\d+)_")
    where = {}
    for split in SPLITS:
        assert names(source, split)
        for name in names(source, split):
            patient = name.split("/")[1].split("_")[0]
            assert where.setdefault(patient, split) == split
    # Without it, hardly any patient is in one split alone.
    assert open_(root).card.source.fingerprint != source.card.source.fingerprint
    with pytest.raises(DataError, match=r"--group is '\(', not a regular expression"):
        open_(root, group="(")


def test_duplicates_across_given_splits(given: Path):
    write(given / "train/cat/of-test.png", encoded(200))
    write(given / "valid/cat/of-test.png", encoded(200))
    source = open_(given)
    assert source.card.source.duplicates == 2
    assert counts(source) == (10, 4, 6)
    assert any("2 images are in two splits" in note for note in source.notes)
    assert counts(open_(given, keep_duplicates=True)) == (11, 5, 6)


def test_one_image_in_two_classes_is_reported(given: Path):
    write(given / "train/dog/a-cat.png", encoded(0))
    notes = open_(given).notes
    assert any("1 images are in two classes: " in note and "a-cat.png" in note for note in notes)


def test_what_systems_leave_is_skipped_and_counted(given: Path):
    for name in (
        ".DS_Store",
        "Thumbs.db",
        "train/cat/._0.png",
        "train/.ipynb_checkpoints/0.png",
        "__MACOSX/train/cat/0.png",
        "train/cat/notes.txt",
        "train/stray.png",
    ):
        write(given / name, b"Mac OS X")
    write(given / "train/cat/nosuffix", encoded(77))
    source = open_(given)
    assert source.card.classes == ("cat", "dog") and counts(source) == (11, 4, 6)
    notes = "\n".join(source.notes)
    assert "skipped 5 hidden or system files" in notes
    assert "skipped 1 files that are no images ('train/cat/notes.txt')" in notes
    assert "skipped 1 files outside of class folders ('stray.png')" in notes


def test_unreadable_files_are_listed_up_to_a_share(given: Path):
    write(given / "train/cat/empty.jpg", b"")
    write(given / "train/cat/text.png", b"<html>no image</html>")
    with pytest.raises(DataError) as raised:
        open_(given)
    assert "2 of 22 images (9.1%) cannot be read, more than --max_unreadable 0.01" in str(
        raised.value
    )
    assert "train/cat/empty.jpg: empty" in str(raised.value)
    source = open_(given, max_unreadable=0.1)
    assert sorted(item.name for item in source.unreadable) == [
        "train/cat/empty.jpg",
        "train/cat/text.png",
    ]
    assert source.card.source.unreadable == 2


def test_contents_decide_not_the_name(given: Path):
    write(given / "train/cat/is-a-png.jpg", encoded(50))
    write(given / "train/cat/is-a-gif.png", encoded(51, form="GIF"))
    source = open_(given)
    assert not source.unreadable and counts(source)[0] == 12


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/0", "a/1", "a/2", "b/"], r"classes without any image: 'b'"),
        (["a/0", "a/1", "a/2", "b/3", "b/4"], "the class 'b' has 2 different images"),
        (["a/0", "a/1", "a/2", "b/3"], "the class 'b' has one image: it needs 3 at least"),
        (["a/0", "a/1", "a/2"], r"has images of 'a' alone: a model needs two classes"),
        (["Cat/0", "cat/1"], "the classes 'Cat' and 'cat' of .* differ by case only"),
        (
            ["train/a/0", "train/a/1", "train/b/2", "train/b/3", "test/c/4"],
            "test has images of 'c', of which train has none",
        ),
        (["test/a/0", "val/a/1"], r"has 'test', 'val' and no 'train'"),
        (["cat/0", "dog/1", "test/2"], r"has 'test' and no 'train': .* or rename"),
        (["0", "1"], "holds no images in class folders: expected <class>/<image>"),
        (["a/", "b/"], "holds no images"),
    ],
)
def test_what_makes_no_model(tmp_path: Path, files: list[str], message: str):
    root = tmp_path / "set"
    for name in files:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            write(root / f"{name}.png", encoded(int(name[-1])))
    with pytest.raises(DataError, match=message):
        open_(root)


def test_missing_class_in_test_is_said(given: Path):
    for path in (given / "test/dog").iterdir():
        path.unlink()
    (given / "test/dog").rmdir()
    source = open_(given)
    assert "test has no image of 1 of 2 classes: 'dog'" in source.notes
    assert labels(source, "test") == {(f"test/cat/{n}.png", "cat") for n in range(3)}


def test_names_in_any_script(tmp_path: Path):
    names_ = ["Käse & Brot", "日本語", "my dog", "180", "90"]
    decomposed = [unicodedata.normalize("NFD", name) for name in names_]
    root = class_folders(tmp_path / "Фото", dict.fromkeys(decomposed, 4))
    source = open_(root)
    # In the order of their code points, in the composed form.
    assert source.card.classes == ("180", "90", "Käse & Brot", "my dog", "日本語")
    assert source.card.name == "Фото"
    (root / "Käse & Brot").mkdir()
    with pytest.raises(DataError, match="have one name, in two forms of Unicode"):
        open_(root)


def test_name_that_is_not_utf_8(given: Path):
    bad = os.fsencode(given / "train" / "cat") + b"/caf\xe9.png"
    with open(bad, "wb") as file:
        file.write(encoded(60))
    with pytest.raises(DataError, match=r"the name b'.*caf\\xe9\.png' is not UTF-8: rename it"):
        open_(given)


def test_links_to_folders_are_followed_once(given: Path, tmp_path: Path):
    class_folders(tmp_path, {"elsewhere": 3}, first=900)
    (given / "train/fox").symlink_to(tmp_path / "elsewhere")
    (given / "train/fox/around").symlink_to(tmp_path / "elsewhere")
    (given / "train/fox/gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_(given)
    assert source.counts["train"] == [5, 5, 3]
    assert any("skipped 1 broken links" in note for note in source.notes)


def test_superclasses(given: Path):
    path = given / "superclasses.txt"
    path.write_text('cat,"felines, small"\ndog,canines\n', encoding="utf-8")
    source = open_(given)
    assert source.card.superclasses == Superclasses(("canines", "felines, small"), (1, 0))
    assert {(item.label, item.superclass) for item in read(source, "train")} == {(0, 1), (1, 0)}
    for text, message in (
        ("cat,a\ncat,b\ndog,a\n", "gives the class 'cat' two superclasses, 'a' and 'b'"),
        ("cat,a\n", "has no line for 'dog'"),
        ("cat,a\ndog,a\nfox,b\n", "names 'fox', for which there is no folder"),
        ("cat\n", "line 1 is 'cat': give class,superclass"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            open_(given)


def test_size_to_store(given: Path):
    # All have 8 x 8.
    assert open_(given).card.image_size == (8, 8)
    assert open_(given, preset_size=32).card.image_size == (32, 32)  # too small for a preset
    assert open_(given, preset_size=4).card.image_size == (4, 4)
    assert open_(given, image_size=(16, 24)).card.image_size == (16, 24)
    write(given / "train/cat/wide.png", encoded(70, (10, 30)))
    card = open_(given, preset_size=32).card
    assert (card.image_size, card.source.smallest, card.source.largest) == (
        (32, 32),
        (8, 8),
        (10, 30),
    )


def test_images_of_one_size_that_fits_are_stored_as_they_are():
    assert stored_size((20, 24), (20, 24), Options(preset_size=32)) == (20, 24)
    assert stored_size((20, 24), (20, 24), Options(preset_size=16)) == (16, 16)


def test_limit_is_balanced(tmp_path: Path):
    root = class_folders(tmp_path / "set", {"a": 100, "b": 50})
    source = open_(root, limit=5)
    assert source.counts["train"] == [3, 2] and source.card.subset
    assert names(source, "train") <= names(open_(root), "train")
    with pytest.raises(DataError, match="the limit is 1 images of each split, and there are 2"):
        open_(root, limit=1)


def test_order_and_fingerprint_follow_the_contents(given: Path):
    first = open_(given)
    order = [item.name for item in read(first, "train")]
    assert order != sorted(order)  # so that any part of it is a sample of all classes
    again = open_(given)
    assert [item.name for item in read(again, "train")] == order
    assert again.card == first.card
    write(given / "train/cat/0.png", encoded(999))
    assert open_(given).card.source.fingerprint != first.card.source.fingerprint


def test_what_the_user_is_told(given: Path, tmp_path: Path):
    class_folders(given / "train", {"fox": 20}, first=500)
    lines: list[str] = []
    dataset = locate(str(given), tmp_path / "work", report=lines.append)
    assert (dataset.location, dataset.name) == (str(given), "photos")
    assert lines == [
        f"data: class folders, from {given}",
        "data: train 30, validation 4, test 6 images of 8 x 8 pixels",
        "data: 3 classes of 5 to 20 images in train (cat to fox), imbalance ratio 4",
        "data: validation is the folder 'valid'",
        "data: validation has no image of 1 of 3 classes: 'fox'",
        "data: test has no image of 1 of 3 classes: 'fox'",
    ]
    assert not (tmp_path / "work").exists()


def test_a_file_that_is_gone_when_it_is_read_is_unreadable(given: Path):
    source = open_(given)
    (given / "test/cat/0.png").unlink()
    items = [item for shard in source.shards("test") for item in shard.read()]
    assert [item for item in items if isinstance(item, Unreadable)] == [
        Unreadable("test/cat/0.png", "not to be read: No such file or directory", 0)
    ]
