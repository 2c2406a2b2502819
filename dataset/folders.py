"""Class folders: `train/<class>/...`, with validation and test beside it or not, or `<class>/...`.

Whether a file is an image is told by its contents; a file with the suffix of an image that is none
counts as unreadable, other files are skipped. `superclasses.txt` beside the folders may name each
class's superclass: a line `class,superclass` for each.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset import images, index, storage
from dataset.files_source import FilesSource
from dataset.format import DataError
from dataset.index import normalized
from dataset.interface import SPLIT_NAMES, Options, group_of
from dataset.splitting import Candidate, shown

KIND = "folders"
SUPERCLASSES_FILES = ("superclasses.txt", "superclasses.csv")
# Of file managers, archivers and editors; whatever begins with a dot is skipped, too.
_JUNK = frozenset(("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "icon\r"))
# How image files begin, for those whose names do not say that they are some.
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"RIFF")


class Skipped:
    """Counts what is passed over in a folder, and keeps the first names."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        """Adds one."""
        self.counts[kind] += 1
        names = self._names.setdefault(kind, [])
        if len(names) < 3:
            names.append(name)

    @property
    def notes(self) -> list[str]:
        """A line for each kind."""
        return [
            f"skipped {count:,} {kind} ({', '.join(map(repr, self._names[kind]))}"
            + (", ...)" if count > len(self._names[kind]) else ")")
            for kind, count in self.counts.items()
        ]


def open_folders(location: str, options: Options, name: str) -> FilesSource:
    """Opens class folders.

    Args:
      location: The folder.
      options: The user's.
      name: Of the data set.

    Raises:
      DataError: A model cannot be made of it; the message says why.
    """
    root = Path(location)
    if options.columns:
        raise DataError(f"{location} holds class folders, which have no columns: drop --columns")
    skipped = Skipped()
    folders = _class_folders(root, skipped)
    labels = _labels(folders, root)
    superclasses = _read_superclasses(root, set(labels.values()))
    pattern = compile_group(options.group)
    empty = set(folders)

    def candidates() -> Iterator[Candidate]:
        for split, folder in folders:
            label = labels[split, folder]
            for path in walk(folder, root, skipped):
                empty.discard((split, folder))
                relative = os.path.relpath(path, root)
                group = group_of(pattern, relative) if pattern else None
                yield Candidate(relative, path, label, superclasses.get(label), split, group)

    found = list(index.examine(candidates(), storage.read))
    if empty and len(empty) < len(folders):
        names = sorted(os.path.relpath(folder, root) for _, folder in empty)
        raise DataError(
            f"{location} has classes without any image: {shown(names)}: add images, or remove the "
            "folders"
        )
    taken = {split: os.path.basename(os.path.dirname(path)) for split, path in folders if split}
    notes = [f"{split} is the folder {name!r}" for split, name in taken.items() if name != split]
    notes += skipped.notes
    return FilesSource(index.make_plan(KIND, location, name, found, options, notes=notes))


def compile_group(group: str | None) -> re.Pattern[str] | None:
    """Compiles `Options.group`.

    Raises:
      DataError: It is not a regular expression.
    """
    try:
        return re.compile(group) if group else None
    except re.error as error:
        raise DataError(
            f"--group is {group!r}, not a regular expression ({error}): give one that finds in a "
            "path what belongs together, such as '^(.*)_[0-9]+'"
        ) from None


def is_junk(name: str) -> bool:
    """Tells whether a file or folder is one that systems leave in any folder."""
    return name.startswith(".") or name.lower() in _JUNK


def walk(folder: str | Path, root: Path, skipped: Skipped) -> Iterator[str]:
    """Goes through the image files of a folder, at any depth, in the order of their names.

    Args:
      folder: Where to begin.
      root: What names are relative to.
      skipped: To count what is passed over.

    Yields:
      Paths.

    Raises:
      DataError: The name of an image is not UTF-8.
    """
    seen = set()
    pending = [str(folder)]
    while pending:
        current = pending.pop()
        real = os.path.realpath(current)
        if real in seen:  # a link to a folder above
            continue
        seen.add(real)
        deeper = []
        for entry in _scan(current):
            relative = os.path.relpath(entry.path, root)
            if is_junk(entry.name):
                skipped.add("hidden or system files", relative)
            elif entry.is_dir():
                deeper.append(entry.path)
            elif not entry.is_file():
                skipped.add("broken links and special files", relative)
            elif _is_image(entry.path):
                check_name(entry.path)
                yield entry.path
            else:
                skipped.add("files that are no images", relative)
        pending += reversed(deeper)


def check_name(path: str) -> None:
    """Refuses a name that could not be written down.

    Raises:
      DataError: It is not UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"the name {os.fsencode(path)!r} is not UTF-8: rename it (convmv renames whole folders)"
        ) from None


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}: check its permissions") from None


def _is_image(path: str) -> bool:
    """By its suffix or else by its first bytes."""
    if path.lower().endswith(images.SUFFIXES):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(8).startswith(_MAGIC)
    except OSError:
        return False


def _class_folders(root: Path, skipped: Skipped) -> list[tuple[str | None, str]]:
    """Each class's folder in each split; the split is None where there are none."""
    children = _children(root, skipped)
    splits = [child for child in children if child.name.lower() in SPLIT_NAMES]
    if not splits:
        return [(None, child.path) for child in children]
    by_split: dict[str, str] = {}
    for child in splits:
        split = SPLIT_NAMES[child.name.lower()]
        if split in by_split:
            other = os.path.basename(by_split[split])
            raise DataError(
                f"{root} has two folders for {split}, {other!r} and {child.name!r}: keep one"
            )
        by_split[split] = child.path
    others = [child.name for child in children if child not in splits]
    if "train" not in by_split:
        names = shown(child.name for child in splits)
        raise DataError(
            f"{root} has {names} and no 'train': put the classes into a folder 'train', or rename "
            "what is a class and no split"
        )
    for name in others:
        skipped.add("folders beside train", name)
    return [
        (split, child.path)
        for split, folder in by_split.items()
        for child in _children(Path(folder), skipped)
    ]


def _children(folder: Path, skipped: Skipped) -> list[os.DirEntry[str]]:
    """The folders in a folder."""
    result = []
    for entry in _scan(str(folder)):
        if is_junk(entry.name):
            skipped.add("hidden or system files", entry.name)
        elif entry.is_dir():
            result.append(entry)
        elif entry.name not in SUPERCLASSES_FILES:
            skipped.add("files outside of class folders", entry.name)
    return result


def _labels(
    folders: Sequence[tuple[str | None, str]], root: Path
) -> dict[tuple[str | None, str], str]:
    """Names of the classes."""
    if not folders:
        raise DataError(
            f"{root} holds no images in class folders: expected <class>/<image>, or "
            "train/<class>/<image>"
        )
    result = {}
    by_name: dict[tuple[str | None, str], str] = {}
    for split, folder in folders:
        check_name(folder)
        name = os.path.basename(folder)
        label = normalized(name)
        other = by_name.setdefault((split, label), folder)
        if other != folder:
            raise DataError(
                f"the folders {other!r} and {folder!r} "
                "have one name, in two forms of Unicode or with blanks: put their images into one"
            )
        result[split, folder] = label
    return result


def _read_superclasses(root: Path, classes: set[str]) -> dict[str, str]:
    """Class -> superclass; empty without such a file."""
    path = next((root / name for name in SUPERCLASSES_FILES if (root / name).is_file()), None)
    if path is None:
        return {}
    result: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None
    for number, row in enumerate(rows, start=1):
        fields = [normalized(field) for field in row]
        if len(fields) != 2 or not all(fields):
            raise DataError(f"{path}: line {number} is {','.join(row)!r}: give class,superclass")
        label, superclass = fields
        if result.setdefault(label, superclass) != superclass:
            raise DataError(
                f"{path} gives the class {label!r} two superclasses, {result[label]!r} and "
                f"{superclass!r}: keep one"
            )
    if unknown := sorted(set(result) - classes):
        raise DataError(f"{path} names {shown(unknown)}, for which there is no folder")
    if missing := sorted(classes - set(result)):
        raise DataError(f"{path} has no line for {shown(missing)}: give each class a superclass")
    return result
