"""Writes a data set in other forms: class folders, CSV, JSON lines or Parquet.

python -m dataset.export SOURCE FOLDER --as folders
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dataset.card import SPLITS, DataCard
from dataset.files import new_folder
from dataset.format import DataError
from dataset.interface import Item, Source, Unreadable
from dataset.source import open_source

_ROW_GROUP = 1000


def export(source: Source, folder: str | os.PathLike[str], form: str) -> Path:
    """Writes a data set, with its splits as they are, as PNG files or in Parquet.

    Args:
      source: The data set.
      folder: The folder to make.
      form: Of `FORMS`.

    Returns:
      What to give as DATA: the folder, or the manifest in it.

    Raises:
      DataError: `folder` is in use, or writing fails.
    """
    target = Path(folder)
    with new_folder(target) as partial:
        written = _WRITERS[form](source, partial)
    return target / written


def _items(source: Source) -> Iterator[tuple[str, int, Item, bytes]]:
    """All images: split, number in it, item, contents of an image file."""
    for split in SPLITS:
        number = 0
        for shard in source.shards(split):
            for item in shard.read():
                if isinstance(item, Unreadable):
                    raise DataError(f"{item.name} is {item.reason}: replace it")
                yield split, number, item, _encoded(item)
                number += 1


def _encoded(item: Item) -> bytes:
    if isinstance(item.image, bytes):
        return item.image
    buffer = io.BytesIO()
    Image.fromarray(item.image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _superclass(card: DataCard, item: Item) -> str | None:
    return card.superclass_of[item.label] or None if item.superclass is not None else None


def _write_folders(source: Source, folder: Path) -> str:
    card = source.card
    for split in SPLITS:
        for name in card.classes:
            (folder / split / name).mkdir(parents=True)
    for split, number, item, content in _items(source):
        (folder / split / card.classes[item.label] / f"{number:06}.png").write_bytes(content)
    for path in folder.glob("*/*"):
        if not any(path.iterdir()):
            path.rmdir()
    if card.superclasses:
        with open(folder / "superclasses.txt", "w", encoding="utf-8", newline="") as file:
            pairs = zip(card.classes, card.superclass_of)
            csv.writer(file).writerows(pair for pair in pairs if pair[1])
    return ""


def _write_rows(source: Source, folder: Path) -> Iterator[dict[str, str]]:
    for split in SPLITS:
        (folder / "images" / split).mkdir(parents=True)
    for split, number, item, content in _items(source):
        path = f"images/{split}/{number:06}.png"
        (folder / path).write_bytes(content)
        row = {"path": path, "label": source.card.classes[item.label], "split": split}
        superclass = _superclass(source.card, item)
        yield row | ({"superclass": superclass} if superclass else {})


def _write_csv(source: Source, folder: Path) -> str:
    with open(folder / "manifest.csv", "w", encoding="utf-8", newline="") as file:
        columns = ["path", "label", "split", *(["superclass"] if source.card.superclasses else [])]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(_write_rows(source, folder))
    return "manifest.csv"


def _write_jsonl(source: Source, folder: Path) -> str:
    with open(folder / "manifest.jsonl", "w", encoding="utf-8") as file:
        file.writelines(
            json.dumps(row, ensure_ascii=False) + "\n" for row in _write_rows(source, folder)
        )
    return "manifest.jsonl"


def _write_parquet(source: Source, folder: Path) -> str:
    """As the Hugging Face hub has CIFAR-100: `img`, `fine_label` and `coarse_label`."""
    card = source.card
    labels = {"fine_label" if card.superclasses else "label": card.classes}
    if card.superclasses:
        labels["coarse_label"] = card.superclasses.names
    features: dict[str, Any] = {"img": {"_type": "Image"}}
    for column, names in labels.items():
        features[column] = {"_type": "ClassLabel", "names": list(names)}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("img", image), *((column, pa.int64()) for column in labels)],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    (folder / "data").mkdir()
    for split, items in groupby(_items(source), key=lambda found: found[0]):
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            while some := list(islice(items, _ROW_GROUP)):
                rows: list[dict[str, Any]] = [
                    {"img": {"bytes": content, "path": None}}
                    | dict(zip(labels, (item.label, item.superclass)))
                    for _, _, item, content in some
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema))
    return ""


_WRITERS: dict[str, Callable[[Source, Path], str]] = {
    "folders": _write_folders,
    "csv": _write_csv,
    "jsonl": _write_jsonl,
    "parquet": _write_parquet,
}
FORMS = tuple(_WRITERS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.export", description="Write a data set in another form."
    )
    parser.add_argument("source", help="a folder in CIFAR's binary layout, or any other source")
    parser.add_argument("folder", type=Path, help="the folder to make")
    parser.add_argument("--as", dest="form", choices=FORMS, required=True)
    options = parser.parse_args(argv)
    try:
        print(f"wrote {export(open_source(options.source), options.folder, options.form)}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
