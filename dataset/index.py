"""From a list of images to a plan: classes, splits, what is left out, and the card.

What class folders, manifests and Parquet files have in common. Contents are read once, one image at
a time for each thread, for their digest and size; no pixel is decoded.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

from dataset import images, splitting
from dataset.card import SPLITS, TEST, TRAIN, VALIDATION, DataCard, SourceInfo, Split, Superclasses
from dataset.format import DataError
from dataset.interface import Options, Unreadable, check_unreadable, quotas, stored_size
from dataset.splitting import Candidate, Entry, shown
from dataset.synthetic_names import LABEL_NAMES
from dataset.synthetic_names import NAME as SYNTHETIC

_THREADS = 8  # reading over a network waits most of the time
_SHOWN = 5


class Row(NamedTuple):
    """An image of the plan: what a shard has to know."""

    name: str
    place: Any
    label: int
    superclass: int | None


@dataclass(frozen=True)
class Plan:
    """What goes where; fields as in `dataset.interface.Source`.

    Attributes:
      rows: By split, ordered by the digests of the contents: any part of a split is a sample of it.
    """

    card: DataCard
    counts: Mapping[str, Sequence[int]]
    notes: Sequence[str]
    unreadable: Sequence[Unreadable]
    rows: Mapping[str, Sequence[Row]]


def inspect(candidate: Candidate, content: bytes) -> Entry | Unreadable:
    """Takes the digest and size of an image file's contents."""
    try:
        size = images.size(content)
    except images.UnreadableImage as error:
        return Unreadable(candidate.name, error.reason)
    return Entry(candidate, hashlib.sha256(content).digest()[:16], size)


def examine(
    candidates: Iterable[Candidate], read: Callable[[Any], bytes]
) -> Iterator[Entry | Unreadable]:
    """Inspects candidates in several threads, in their order.

    Args:
      candidates: Any number of them.
      read: Gives the contents at a candidate's place.

    Raises:
      FileNotFoundError: From `read`.
    """

    def one(candidate: Candidate) -> Entry | Unreadable:
        try:
            return inspect(candidate, read(candidate.place))
        except FileNotFoundError:
            raise
        except OSError as error:
            return Unreadable(candidate.name, not_read(error))

    remaining = iter(candidates)
    with ThreadPoolExecutor(_THREADS) as pool:
        while batch := list(islice(remaining, 1024)):
            yield from pool.map(one, batch)


def not_read(error: OSError) -> str:
    """The reason of an `Unreadable` whose bytes cannot be had."""
    return f"not to be read: {error.strerror or error}"


def make_plan(
    kind: str,
    location: str,
    name: str,
    found: Iterable[Entry | Unreadable],
    options: Options,
    *,
    classes: Sequence[str] | None = None,
    superclasses: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Assigns labels and splits and checks that a model can be made of it.

    Args:
      kind: Of the source.
      location: Of the source.
      name: Of the data set.
      found: All images.
      options: The user's.
      classes: Names in the order of their labels, where the source has one; else as text.
      superclasses: The same of superclasses.
      notes: What the source has to say itself.

    Raises:
      DataError: A model cannot be made of it; the message says why.
    """
    entries: list[Entry] = []
    unreadable: list[Unreadable] = []
    for item in found:
        if isinstance(item, Entry):
            entries.append(item)
        else:
            unreadable.append(item)
    total = len(entries) + len(unreadable)
    if not total:
        raise DataError(f"{location} holds no images ({', '.join(images.FORMATS)} are read)")
    check_unreadable(unreadable, total, options)
    entries.sort(key=lambda entry: (entry.digest, entry.candidate.name))
    names = _class_names(entries, classes, location)
    labels = {label: index for index, label in enumerate(names)}
    superclass_names, of_class = _superclasses(entries, names, superclasses)
    notes = [*notes, *_unreadable_notes(unreadable, total), *_conflicts(entries)]
    given = {entry.candidate.split for entry in entries}
    splits = splitting.given_splits(entries) if None not in given else {TRAIN: entries}
    if None in given and len(given) > 1:
        example = next(e.candidate.name for e in entries if e.candidate.split is None)
        raise DataError(f"some images have a split and others have none, such as {example!r}")
    derived = [split for split in SPLITS if split not in splits]
    splits = splitting.derive(splits, derived, len(names), labels) if derived else splits
    splits, duplicates, more = splitting.without_duplicates(splits, options, bool(options.group))
    notes += more
    notes += _check_classes(splits, names, derived)
    indices = {superclass: index for index, superclass in enumerate(superclass_names)}
    rows = {split: [_row(entry, labels, indices) for entry in splits[split]] for split in SPLITS}
    if options.limit:
        rows = {split: _limited(part, options.limit, len(names)) for split, part in rows.items()}
    counts = {split: _count(part, len(names)) for split, part in rows.items()}
    sizes = {entry.size for entry in entries}
    smallest = min(sizes, key=lambda size: (size[0] * size[1], size))
    largest = max(sizes, key=lambda size: (size[0] * size[1], size))
    if set(names) & set(LABEL_NAMES.fine):
        name = SYNTHETIC  # wherever it was copied to
    card = DataCard(
        name=name,
        classes=names,
        image_size=stored_size(smallest, largest, options),
        resize=options.resize,
        splits={split: Split(len(rows[split]), split in derived) for split in SPLITS},
        source=SourceInfo(
            kind=kind,
            location=location,
            fingerprint=_fingerprint(entries, unreadable, names),
            smallest=smallest,
            largest=largest,
            unreadable=len(unreadable),
            duplicates=duplicates,
        ),
        superclasses=Superclasses(superclass_names, of_class) if superclass_names else None,
        limit=options.limit,
        subset=bool(options.limit),
    )
    return Plan(card, counts, notes, unreadable, rows)


def normalized(label: str) -> str:
    """A name as it is compared and stored: Unicode's form C, without blanks around it."""
    return unicodedata.normalize("NFC", label.strip())


def _class_names(
    entries: Sequence[Entry], given: Sequence[str] | None, location: str
) -> tuple[str, ...]:
    present = {entry.candidate.label for entry in entries}
    names = tuple(given) if given else tuple(sorted(present))
    by_case: dict[str, str] = {}
    for name in names:
        other = by_case.setdefault(name.casefold(), name)
        if other != name:
            raise DataError(
                f"the classes {other!r} and {name!r} of {location} differ by case only: give both "
                "one name, or two that differ"
            )
    if len(present) < 2:
        raise DataError(
            f"{location} has images of {shown(sorted(present))} alone: a model needs two classes "
            "at least"
        )
    return names


def _superclasses(
    entries: Sequence[Entry], names: Sequence[str], given: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """Names of the superclasses, none if there are none, and the index of each class's."""
    found: dict[str, str] = {}
    lacking = None
    for entry in entries:
        label, superclass = entry.candidate.label, entry.candidate.superclass
        if superclass is None:
            lacking = entry.candidate.name
        elif found.setdefault(label, superclass) != superclass:
            raise DataError(
                f"the class {label!r} has two superclasses, {found[label]!r} and {superclass!r} "
                f"(of {entry.candidate.name!r}): give it one"
            )
    if not found:
        return (), ()
    if lacking:
        raise DataError(f"{lacking!r} has no superclass, where others have one: give it one")
    result = tuple(given) if given else tuple(sorted(set(found.values())))
    at = {name: index for index, name in enumerate(result)}
    return result, tuple(at[found[name]] if name in found else None for name in names)


def _conflicts(entries: Sequence[Entry]) -> list[str]:
    """Says which images have the same contents and other classes; entries are in their order."""
    pairs = [
        f"{a.candidate.name!r} = {b.candidate.name!r}"
        for a, b in pairwise(entries)
        if a.digest == b.digest and a.candidate.label != b.candidate.label
    ]
    if not pairs:
        return []
    more = ", ..." if len(pairs) > 3 else ""
    return [f"{len(pairs):,} images are in two classes: {', '.join(pairs[:3])}{more}"]


def _check_classes(
    splits: Mapping[str, Sequence[Entry]], names: Sequence[str], derived: Sequence[str]
) -> list[str]:
    """Refuses classes that train lacks; says which others are missing."""
    present = {
        split: {entry.candidate.label for entry in entries} for split, entries in splits.items()
    }
    for split in (TEST, VALIDATION):
        if unknown := sorted(present[split] - present[TRAIN]):
            raise DataError(
                f"{split} has images of {shown(unknown)}, of which {TRAIN} has none: give {TRAIN} "
                f"some, or take them out of {split}"
            )
        if not splits[split]:
            raise DataError(f"no image is left for {split}: give it some, or more images in all")
    notes = []
    for split in SPLITS:
        missing = [name for name in names if name not in present[split]]
        if missing and (split == TRAIN or set(missing) & present[TRAIN]):
            notes.append(
                f"{split} has no image of {len(missing)} of {len(names)} classes: {shown(missing)}"
            )
    return notes


def _row(entry: Entry, labels: Mapping[str, int], superclasses: Mapping[str, int]) -> Row:
    candidate = entry.candidate
    superclass = superclasses[candidate.superclass] if candidate.superclass else None
    return Row(candidate.name, candidate.place, labels[candidate.label], superclass)


def _limited(rows: Sequence[Row], limit: int, classes: int) -> list[Row]:
    left = quotas(limit, classes)
    kept = []
    for row in rows:
        if left[row.label]:
            left[row.label] -= 1
            kept.append(row)
    return kept


def _count(rows: Iterable[Row], classes: int) -> list[int]:
    found = Counter(row.label for row in rows)
    return [found[label] for label in range(classes)]


def _unreadable_notes(unreadable: Sequence[Unreadable], total: int) -> list[str]:
    if not unreadable:
        return []
    listed = "; ".join(f"{item.name}: {item.reason}" for item in unreadable[:_SHOWN])
    more = "; ..." if len(unreadable) > _SHOWN else ""
    return [f"{len(unreadable):,} of {total:,} images cannot be read, left out ({listed}{more})"]


def _fingerprint(
    entries: Sequence[Entry], unreadable: Sequence[Unreadable], names: Sequence[str]
) -> str:
    """SHA-256 of all that decides about the examples; entries are in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"class {name}\0".encode())
    for entry in entries:
        c = entry.candidate
        fields = (c.name, c.label, c.superclass, c.split, c.group)
        digest.update(entry.digest + repr(fields).encode("utf-8", "surrogateescape"))
    for item in sorted(unreadable):
        digest.update(f"unreadable {item.name}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
