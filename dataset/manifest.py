"""A manifest: CSV, TSV or JSON lines of paths, labels and maybe superclasses and splits.

Paths are relative to the file, absolute, or URIs. A folder with a manifest of one of the usual
names in it is read by that, whatever folders are there; images that it does not name are left out.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from dataset import index, storage
from dataset.files_source import FilesSource
from dataset.folders import Skipped, check_name, compile_group, walk
from dataset.format import DataError
from dataset.index import normalized
from dataset.interface import SPLIT_NAMES, Options, group_of
from dataset.splitting import Candidate, shown

KIND = "manifest"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
_STEMS = ("metadata", "manifest", "labels")
# In a folder; `metadata` is what the Hugging Face hub's image folders have.
NAMES = tuple(f"{stem}{suffix}" for stem in _STEMS for suffix in SUFFIXES)
# Names of columns that are found by themselves, in any case.
COLUMNS = {
    "path": (
        *("path", "file", "file_name", "filename", "filepath", "file_path", "image_path"),
        *("image", "img", "uri", "url"),
    ),
    "label": ("label", "class", "class_name", "category", "target", "fine_label"),
    "superclass": ("superclass", "supercategory", "coarse_label"),
    "split": ("split", "subset", "set", "partition"),
}
_KNOWN = tuple(COLUMNS.values())


class Line(NamedTuple):
    """A row with its place in the file."""

    number: int
    fields: Mapping[str, Any]


def find_manifest(folder: str) -> str | None:
    """Path of the manifest in a folder; None without one.

    Raises:
      DataError: There are two.
    """
    found = [name for name in NAMES if os.path.isfile(os.path.join(folder, name))]
    if len(found) > 1:
        raise DataError(f"{folder} has {shown(found)}: name the one that counts")
    return os.path.join(folder, found[0]) if found else None


def open_manifest(location: str, options: Options, name: str) -> FilesSource:
    """Opens a manifest, or a folder that has one.

    Args:
      location: By path or URI.
      options: The user's.
      name: Of the data set.

    Raises:
      DataError: A row is wrong, or a model cannot be made of it; the message says why.
    """
    in_folder = not storage.is_uri(location) and os.path.isdir(location)
    path = (find_manifest(location) if in_folder else None) or location
    lines = read_lines(path)
    first = next(lines, None)
    if first is None:
        raise DataError(f"{path} has no rows: give a row for each image")
    columns = find_columns(list(first.fields), options, ("path", "label"), path)
    by_column = options.group in first.fields
    pattern = None if by_column else compile_group(options.group)
    resolver = _Resolver(path)
    candidates = []
    rows: dict[str, tuple[int, list[str]]] = {}
    repeated = 0
    for line in chain([first], lines):
        where = f"{path}, line {line.number}"
        for column in line.fields.keys() - first.fields.keys():
            if column == options.group or any(column.lower() in names for names in _KNOWN):
                raise DataError(
                    f"{where} has {column!r}, which line {first.number} does not have: give it in "
                    "each line"
                )
        given = {what: _field(line, column, where) for what, column in columns.items()}
        file = given["path"]
        if not file or not given["label"]:
            raise DataError(f"{where} has no {'label' if file else 'path'}: complete or remove it")
        place = resolver.resolve(file)
        values = list(given.values())
        number, known = rows.setdefault(place, (line.number, values))
        if known is not values:
            if known[1:] != values[1:]:
                raise DataError(
                    f"{path} names {file!r} twice, in lines {number} and {line.number}, with "
                    "other values: keep one"
                )
            repeated += 1
            continue
        group = _field(line, str(options.group), where) if by_column else None
        candidates.append(
            Candidate(
                file,
                place,
                normalized(given["label"]),
                normalized(given["superclass"]) if given.get("superclass") else None,
                parse_split(given.get("split"), where),
                group_of(pattern, file) if pattern else group,
            )
        )
    missing = [
        f"{item.name} (line {rows[item.place][0]})"
        for item in candidates
        if not storage.is_uri(item.place) and not os.path.isfile(item.place)
    ]
    if missing:
        raise DataError(
            f"{len(missing):,} of the files that {path} names do not exist: {shown(missing)}: "
            "paths are relative to the manifest; correct them, or remove these lines"
        )
    notes = [f"{repeated:,} lines of {path} are there twice"] if repeated else []
    if in_folder:
        notes += _orphans(Path(location), {item.place for item in candidates})
    found = index.examine(candidates, read_of(path))
    return FilesSource(index.make_plan(KIND, location, name, found, options, notes=notes))


def read_of(path: str) -> Any:
    """Reads the files that a manifest names."""

    def read(place: str) -> bytes:
        try:
            return storage.read(place)
        except FileNotFoundError:
            raise DataError(f"{place}, which {path} names, does not exist: correct it") from None

    return read


def read_lines(path: str) -> Iterator[Line]:
    """Reads the rows of a CSV, TSV or JSON lines file.

    Raises:
      DataError: It cannot be read, or a line is none.
    """
    try:
        text = storage.read(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: name a manifest") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None
    if path.lower().endswith((".jsonl", ".ndjson")):
        yield from _json_lines(text, path)
    else:
        yield from _csv_lines(text, path)


def _json_lines(text: str, path: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}): correct it") from None
        if not isinstance(fields, dict):
            raise DataError(f"{path}, line {number} is no object {{...}}: give one in each line")
        yield Line(number, fields)


def _csv_lines(text: str, path: str) -> Iterator[Line]:
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}, line {reader.line_num} has more or fewer fields than the first line "
                    f"({header.strip()!r}): quote what has a {delimiter!r} in it"
                )
            yield Line(reader.line_num, row)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}: correct it") from None


def find_columns(
    present: Sequence[str], options: Options, needed: Iterable[str], where: str
) -> dict[str, str]:
    """Finds the columns for what a source needs: path, image, label, superclass and split.

    Args:
      present: Names of the columns.
      options: The user's, which may name some.
      needed: What must be there.
      where: They are from, for the message.

    Returns:
      What -> the column's name.

    Raises:
      DataError: One that the user named, or that is needed, is not there.
    """
    have = f"it has {shown(present, most=20)}"
    for what, column in options.columns.items():
        if column not in present:
            raise DataError(f"{where} has no column {column!r} ({have}): correct --columns {what}=")
    found = {}
    for what in {**COLUMNS, **options.columns}:
        names = [column for column in present if column.lower() in COLUMNS.get(what, ())]
        if what in options.columns:
            found[what] = options.columns[what]
        elif names:
            found[what] = min(names, key=lambda column: COLUMNS[what].index(column.lower()))
    for what in needed:
        if what not in found:
            raise DataError(
                f"{where} has no column for the {what} ({have}): name it with --columns {what}=..."
            )
    return found


def parse_split(value: str | None, where: str) -> str | None:
    """Reads a split's name; None where there is none.

    Raises:
      DataError: It is none of those known.
    """
    if not value:
        return None
    split = SPLIT_NAMES.get(value.strip().lower())
    if split is None:
        raise DataError(f"{where} has the split {value!r}: use train, validation or test")
    return split


def _field(line: Line, column: str, where: str) -> str:
    value = line.fields.get(column)
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value).strip()
    raise DataError(f"{where}: {column!r} is {value!r}: give a text or a whole number")


def _orphans(folder: Path, named: set[str]) -> list[str]:
    skipped = Skipped()
    for path in walk(folder, folder, skipped):
        if path not in named:
            skipped.add("images that the manifest does not name", os.path.relpath(path, folder))
    return [note for note in skipped.notes if "no images" not in note]


class _Resolver:
    """Finds the files that a manifest names, also where the disk has the other form of Unicode."""

    def __init__(self, path: str):
        self._uri = storage.is_uri(path)
        self._base = posixpath.dirname(path) if self._uri else os.path.dirname(path)
        self._listed: dict[str, dict[str, str]] = {}

    def resolve(self, file: str) -> str:
        """Path or URI of a file; as it is written where there is none."""
        if storage.is_uri(file):
            return file
        if self._uri:
            return f"{self._base}/{file}"
        check_name(file)
        path = os.path.normpath(os.path.join(self._base, os.path.expanduser(file)))
        return path if os.path.exists(path) else self._by_form(path)

    def _by_form(self, path: str) -> str:
        """The same path with each part as the disk has it."""
        if os.path.exists(path) or path == os.path.dirname(path):
            return path
        folder = self._by_form(os.path.dirname(path))
        name = unicodedata.normalize("NFC", os.path.basename(path))
        return os.path.join(folder, self._names(folder).get(name, os.path.basename(path)))

    def _names(self, folder: str) -> dict[str, str]:
        if folder not in self._listed:
            result: dict[str, str] = {}
            for name in os.listdir(folder) if os.path.isdir(folder) else ():
                other = result.setdefault(unicodedata.normalize("NFC", name), name)
                if other != name:
                    raise DataError(
                        f"{folder} has two files {name!r}, in two forms of Unicode: rename one"
                    )
            self._listed[folder] = result
        return self._listed[folder]
