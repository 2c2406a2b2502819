"""Parquet files as the Hugging Face hub stores image data sets, read row group by row group.

An image is a struct of `bytes` and `path`, or the bytes alone; a label is the index of a name in
the schema's metadata (the hub's ClassLabel), another number, or a text. The split is a column's, or
in the names of files and folders: `data/train-00000-of-00002.parquet`, `all/test/0000.parquet`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dataset import index, storage
from dataset.files_source import FilesSource
from dataset.folders import compile_group
from dataset.format import DataError
from dataset.index import Row, normalized
from dataset.interface import SPLIT_NAMES, Item, Options, Unreadable, group_of, shard_length
from dataset.manifest import find_columns, parse_split
from dataset.splitting import Candidate, Entry

KIND = "parquet"
SUFFIX = ".parquet"
# Rows that are in memory at a time.
_BATCH = 256


class Place(NamedTuple):
    """Where a row is."""

    path: str
    group: int
    row: int


@dataclass(frozen=True)
class ParquetShard:
    """Rows in the order of their places; see `dataset.interface.Shard`."""

    rows: Sequence[Row]
    column: str

    def read(self) -> Iterator[Item]:
        """See `dataset.interface.Shard`."""
        wanted: dict[tuple[str, int], dict[int, Row]] = {}
        for row in self.rows:
            wanted.setdefault((row.place.path, row.place.group), {})[row.place.row] = row
        for (path, group), rows in wanted.items():
            for number, fields in _rows(path, group, [self.column]):
                if found := rows.get(number):
                    content = _content(fields[self.column])
                    yield Item(found.name, content, found.label, found.superclass)


@dataclass(frozen=True)
class ParquetSource(FilesSource):
    """A plan whose places are rows; see `dataset.interface.Source`.

    Attributes:
      column: Of the images.
    """

    column: str

    def shards(self, split: str) -> Sequence[ParquetShard]:  # type: ignore[override]
        """See `dataset.interface.Source`; in the order of the files, which are read once."""
        rows = sorted(self.plan.rows[split], key=lambda row: row.place)
        length = shard_length(self.card.image_size)
        return [
            ParquetShard(rows[at : at + length], self.column) for at in range(0, len(rows), length)
        ]


class _Schema(NamedTuple):
    """What all files have in common: what -> column, and names of classes by column."""

    columns: Mapping[str, str]
    names: Mapping[str, tuple[str, ...] | None]


def open_parquet(location: str, options: Options, name: str) -> ParquetSource:
    """Opens a Parquet file, or all those in a folder.

    Args:
      location: By path or URI.
      options: The user's.
      name: Of the data set.

    Raises:
      DataError: A column is missing or a row is wrong, or a model cannot be made of it.
    """
    files = find_files(location)
    schemas = [_read_schema(path, options) for path in files]
    for path, schema in zip(files, schemas):
        if schema != schemas[0]:
            raise DataError(f"{path} has other columns or class names than {files[0]}: name one")
    schema = schemas[0]

    def found() -> Iterator[Entry | Unreadable]:
        for path in files:
            shown = os.path.relpath(path, location) if path != location else os.path.basename(path)
            yield from _entries(path, shown, schema, options)

    plan = index.make_plan(
        KIND,
        location,
        name,
        found(),
        options,
        classes=schema.names["label"],
        superclasses=schema.names.get("superclass"),
    )
    return ParquetSource(plan, schema.columns["image"])


def find_files(location: str) -> list[str]:
    """Lists Parquet files: that one, or those in a folder at any depth, in the order of names."""
    if location.lower().endswith(SUFFIX):
        return [location]
    if storage.is_uri(location):
        files = storage.find(location)
    else:
        files = [
            os.path.join(folder, name)
            for folder, folders, names in os.walk(location)
            if not folders.sort()
            for name in names
        ]
    return sorted(
        path
        for path in files
        if path.lower().endswith(SUFFIX) and not os.path.basename(path).startswith((".", "_"))
    )


def is_parquet(folder: str, depth: int = 2) -> bool:
    """Tells whether a folder has Parquet files near its top, without listing millions of images."""
    deeper = []
    with os.scandir(folder) as entries:
        for entry in islice(entries, 1000):
            if entry.name.lower().endswith(SUFFIX):
                return True
            if entry.is_dir():
                deeper.append(entry.path)
    return depth > 0 and any(is_parquet(path, depth - 1) for path in deeper)


def _read_schema(path: str, options: Options) -> _Schema:
    with _open(path) as file:
        schema = file.schema_arrow
    named = {name: column for name, column in options.columns.items() if name != "path"}
    images = [field.name for field in schema if _is_image(field.type)]
    if "image" not in named:
        if len(images) != 1:
            have = f"{len(images)} columns of images" if images else "no column of images"
            raise DataError(
                f"{path} has {have} (its columns are {', '.join(schema.names)}): name the one with "
                "the bytes of image files with --columns image=..."
            )
        named["image"] = images[0]
    columns = find_columns(schema.names, _with_columns(options, named), ("label",), path)
    columns.pop("path", None)
    features = _features(schema)
    names: dict[str, tuple[str, ...] | None] = {
        what: _class_names(features.get(columns[what]))
        for what in ("label", "superclass")
        if what in columns
    }
    return _Schema(columns, names)


def _with_columns(options: Options, columns: Mapping[str, str]) -> Options:
    return Options(columns=columns, group=options.group)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind[at].name == "bytes" for at in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """The hub's description of the columns; empty without one."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(feature: Any) -> tuple[str, ...] | None:
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, dict):  # index -> name
        names = [names[key] for key in sorted(names, key=int)]
    return tuple(normalized(str(name)) for name in names) if names else None


def _entries(
    path: str, shown: str, schema: _Schema, options: Options
) -> Iterator[Entry | Unreadable]:
    """Inspects all rows of a file."""
    columns = schema.columns
    with _open(path) as file:
        groups, present = file.num_row_groups, file.schema_arrow.names
    by_column = options.group in present
    pattern = None if by_column else compile_group(options.group)
    wanted = {*columns.values(), *([str(options.group)] if by_column else [])}
    of_file = None if "split" in columns else _split_of(shown)
    number = 0
    for group in range(groups):
        for row, fields in _rows(path, group, sorted(wanted)):
            where = f"{shown}:{number}"
            number += 1
            image = fields[columns["image"]]
            name = image.get("path") if isinstance(image, dict) else None
            label = _label(fields[columns["label"]], schema.names["label"], where)
            superclass = split = None
            if "superclass" in columns:
                value = fields[columns["superclass"]]
                superclass = _label(value, schema.names["superclass"], where)
            if "split" in columns:
                value = fields[columns["split"]]
                split = parse_split(None if value is None else str(value), where)
            if by_column:
                of_group = None if (value := fields[str(options.group)]) is None else str(value)
            else:
                of_group = group_of(pattern, name or where) if pattern else None
            candidate = Candidate(
                f"{where} {name}" if name else where,
                Place(path, group, row),
                label,
                superclass,
                split or of_file,
                of_group,
            )
            yield index.inspect(candidate, _content(image))


def _split_of(path: str) -> str | None:
    """The last split that a path names."""
    words = re.findall(r"[a-z]+", path.lower())
    return next((SPLIT_NAMES[word] for word in reversed(words) if word in SPLIT_NAMES), None)


def _label(value: Any, names: Sequence[str] | None, where: str) -> str:
    if isinstance(value, int) and names is not None:
        if 0 <= value < len(names):
            return names[value]
        raise DataError(f"{where} has the label {value}, there are names of 0 to {len(names) - 1}")
    if isinstance(value, str | int) and str(value).strip():
        return normalized(str(value))
    raise DataError(f"{where} has the label {value!r}: give a text or a whole number")


def _content(image: Any) -> bytes:
    content = image.get("bytes") if isinstance(image, dict) else image
    return content or b""


def _rows(path: str, group: int, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a row group with their numbers in it."""
    with _open(path) as file:
        number = 0
        try:
            batches = file.iter_batches(_BATCH, row_groups=[group], columns=list(columns))
            for batch in batches:
                for fields in batch.to_pylist():
                    yield number, fields
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}, row group {group} is damaged ({error}): get the file again"
            ) from None


def _open(path: str) -> pq.ParquetFile:
    try:
        # Closed with the last reference to it.
        return pq.ParquetFile(storage.open_file(path))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: name a Parquet file or a folder of some") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file, or damaged ({error}): get it again") from None
