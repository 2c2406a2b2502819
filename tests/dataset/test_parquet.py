import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset.card import SPLITS, Superclasses
from dataset.format import DataError
from dataset.interface import Options, Source
from dataset.source import open_source
from tests.support.pictures import encoded, names, read

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["zebra", "ant", "bee"]  # the hub's order is the order of the labels


def write_file(
    path: Path, rows: list[dict[str, Any]], labels: dict[str, list[str]], **types: pa.DataType
) -> None:
    features = {
        column: {"_type": "ClassLabel", "names": names_} for column, names_ in labels.items()
    }
    kinds = {"img": IMAGE, **dict.fromkeys(labels, pa.int64()), **types}
    schema = pa.schema(
        list(kinds.items()),
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=4)


def rows(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {
            "img": {"bytes": encoded(at), "path": f"{at}.png"},
            "fine_label": at % 3,
            "coarse_label": (at % 3) // 2,
        }
        for at in range(first, first + count)
    ]


LABELS = {"fine_label": NAMES, "coarse_label": ["big", "small"]}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """As the hub has CIFAR-100: two files of train, one of test."""
    root = tmp_path / "animals"
    write_file(root / "data/train-00000-of-00002.parquet", rows(0, 30), LABELS)
    write_file(root / "data/train-00001-of-00002.parquet", rows(30, 30), LABELS)
    write_file(root / "data/test-00000-of-00001.parquet", rows(60, 9), LABELS)
    (root / "README.md").write_text("---")
    return root


def open_(path: Path, **options: Any) -> Source:
    return open_source(str(path), Options(**options))


def test_as_the_hub_stores_it(shards: Path):
    source = open_(shards)
    card = source.card
    assert (card.name, card.source.kind, card.classes) == ("animals", "parquet", tuple(NAMES))
    assert card.superclasses == Superclasses(("big", "small"), (0, 0, 1))
    assert card.splits["validation"].derived and not card.splits["test"].derived
    assert card.splits["test"].examples == 9
    items = [item for split in SPLITS for item in read(source, split)]
    numbers = {int(item.name.split()[1][:-4]) for item in items}
    assert numbers == set(range(69))
    for item in items:
        at = int(item.name.split()[1][:-4])
        assert (item.image, item.label, item.superclass) == (encoded(at), at % 3, at % 3 // 2)
    # In the order of the files, so that each row group is read once.
    train = [int(item.name.split()[1][:-4]) for item in read(source, "train")]
    assert train == sorted(train)


def test_one_file_and_folders_for_splits(shards: Path, tmp_path: Path):
    one = open_(shards / "data/train-00000-of-00002.parquet")
    assert sum(len(read(one, split)) for split in SPLITS) == 30
    for split, first in (("train", 0), ("validation", 40), ("test", 60)):
        write_file(tmp_path / f"hub/all/{split}/0000.parquet", rows(first, 30), LABELS)
    source = open_(tmp_path / "hub", keep_duplicates=True)
    assert [len(read(source, split)) for split in SPLITS] == [30, 30, 30]
    assert open_(tmp_path / "hub").card.source.duplicates == 10


def test_columns_of_other_types(tmp_path: Path):
    path = tmp_path / "set.parquet"
    write_file(
        path,
        [
            {"img": None, "jpg": encoded(at), "kind": f"k{at % 2}", "fold": "train", "who": at // 6}
            for at in range(60)
        ],
        {},
        jpg=pa.binary(),
        kind=pa.string(),
        fold=pa.string(),
        who=pa.int64(),
    )
    with pytest.raises(DataError, match=r"has 2 columns of images .*--columns image="):
        open_(path)
    with pytest.raises(DataError, match=r"has no column for the label .*--columns label="):
        open_(path, columns={"image": "jpg"})
    source = open_(path, columns={"image": "jpg", "label": "kind", "split": "fold"}, group="who")
    assert source.card.classes == ("k0", "k1") and source.card.superclasses is None
    where: dict[int, str] = {}
    for split in SPLITS:
        for name in names(source, split):
            assert where.setdefault(int(name.split(":")[1]) // 6, split) == split


def test_unreadable_rows(shards: Path):
    bad = rows(100, 2)
    bad[0]["img"] = {"bytes": None, "path": "gone.png"}
    bad[1]["img"] = None
    write_file(shards / "data/train-extra.parquet", bad, LABELS)
    source = open_(shards, max_unreadable=0.1)
    assert [(item.name, item.reason) for item in source.unreadable] == [
        ("data/train-extra.parquet:0 gone.png", "empty"),
        ("data/train-extra.parquet:1", "empty"),
    ]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-1, r"train-x\.parquet:0 has the label -1, there are names of 0 to 2"),
        (3, "has the label 3"),
        (None, "has the label None: give"),
    ],
)
def test_labels_out_of_range(shards: Path, label: int | None, message: str):
    write_file(shards / "data/train-x.parquet", [rows(9, 1)[0] | {"fine_label": label}], LABELS)
    with pytest.raises(DataError, match=message):
        open_(shards)


def test_files_that_do_not_fit(shards: Path):
    path = shards / "data/train-00001-of-00002.parquet"
    write_file(path, rows(0, 3), LABELS | {"fine_label": ["a", "b", "c"]})
    with pytest.raises(DataError, match="has other columns or class names than"):
        open_(shards)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"00001-of-00002\.parquet is no Parquet file, or damaged"):
        open_(shards)
