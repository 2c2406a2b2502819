"""Which image is in which split: given, or derived from the contents, and none in two."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dataset.card import TEST, TRAIN, VALIDATION
from dataset.format import DataError
from dataset.interface import Options

# Of the images, to each split that is derived.
_DERIVED_SHARE = 0.1


class Candidate(NamedTuple):
    """An image as its source lists it.

    Attributes:
      name: For people, relative to the location.
      place: Where to read it, of the source's own kind.
      label: Name of its class.
      superclass: Name of its superclass, if any.
      split: Of `SPLITS`; None where the source does not say.
      group: Images of one group stay in one split; None: it is its own.
    """

    name: str
    place: Any
    label: str
    superclass: str | None = None
    split: str | None = None
    group: str | None = None


class Entry(NamedTuple):
    """A candidate that is an image: 16 bytes of its contents' SHA-256, height and width."""

    candidate: Candidate
    digest: bytes
    size: tuple[int, int]


def shown(names: Iterable[str], most: int = 5) -> str:
    """The first of some names and how many there are besides."""
    everything = list(names)
    more = len(everything) - most
    text = ", ".join(repr(name) for name in everything[:most])
    return text + (f" and {more:,} more" if more > 0 else "")


def given_splits(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Groups images by the splits that they all have.

    Raises:
      DataError: None is in train.
    """
    splits: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        assert entry.candidate.split
        splits[entry.candidate.split].append(entry)
    if TRAIN not in splits:
        raise DataError(
            f"there are images of {' and '.join(sorted(splits))} alone: a model needs {TRAIN}, too"
        )
    return dict(splits)


def derive(
    splits: Mapping[str, list[Entry]],
    derived: Sequence[str],
    num_classes: int,
    labels: Mapping[str, int],
) -> dict[str, list[Entry]]:
    """Sets parts of train apart, by the hash of their contents or of their group.

    Whether an image is in a split depends on its own hash alone, but for classes of which a split
    would have none: it then gets the one of the highest hash.
    """
    groups = _groups(splits[TRAIN])
    of_class: dict[int, set[bytes]] = defaultdict(set)
    for entry, group in zip(splits[TRAIN], groups):
        of_class[labels[entry.candidate.label]].add(group)
    where = {group: _by_hash(group, derived) for group in set(groups)}
    for label, name in enumerate(labels):
        members = sorted(of_class[label], reverse=True)
        if members and len(members) <= len(derived):
            raise DataError(
                f"the class {name!r} has {_count_of(len(members))}: it needs "
                f"{len(derived) + 1} at least, one for each of {', '.join((TRAIN, *derived))}"
            )
        for split in (TEST, VALIDATION, TRAIN):
            if members and split in (TRAIN, *derived):
                _ensure(split, members, where, of_class.values())
    result = {**splits, TRAIN: [], **{split: [] for split in derived}}
    for entry, group in zip(splits[TRAIN], groups):
        result[where[group]].append(entry)
    return result


def _ensure(
    split: str,
    members: Sequence[bytes],
    where: dict[bytes, str],
    classes: Iterable[set[bytes]],
) -> None:
    """Moves a group of a class into a split that has none of the class, from where there are more.

    Args:
      split: The split.
      members: The class's groups, in falling order.
      where: Each group's split.
      classes: Each class's groups: none may lose its last one in a split.
    """
    if any(where[group] == split for group in members):
        return

    def spare(group: bytes) -> bool:
        return all(
            sum(where[other] == where[group] for other in groups) > 1
            for groups in classes
            if group in groups
        )

    # Without a group to spare, the check of the classes says what is missing.
    if moved := next(filter(spare, members), None):
        where[moved] = split


def _by_hash(group: bytes, derived: Sequence[str]) -> str:
    left = 1 - int.from_bytes(group[:8], "big") / 2**64
    for split in (TEST, VALIDATION):
        if split in derived:
            if left <= _DERIVED_SHARE:
                return split
            left -= _DERIVED_SHARE
    return TRAIN


def _groups(entries: Sequence[Entry]) -> list[bytes]:
    """A digest for each entry: of its group's name or else its contents; equal contents are in one
    group."""
    parent: dict[tuple[bool, bytes], tuple[bool, bytes]] = {}

    def find(key: tuple[bool, bytes]) -> tuple[bool, bytes]:
        while (up := parent.setdefault(key, key)) != key:
            key = up
        return key

    for entry in entries:
        if entry.candidate.group is not None:
            name = hashlib.sha256(entry.candidate.group.encode()).digest()[:16]
            # A name comes first: new images of a group do not move the others.
            first, second = sorted((find((True, entry.digest)), find((False, name))))
            parent[second] = first
    return [find((True, entry.digest))[1] for entry in entries]


def without_duplicates(
    splits: Mapping[str, list[Entry]], options: Options, grouped: bool
) -> tuple[dict[str, list[Entry]], int, list[str]]:
    """Takes out of train, and then of validation, what a later split has; says how many."""
    seen: dict[bytes, str] = {}
    result: dict[str, list[Entry]] = {}
    removed: list[tuple[str, str]] = []
    for split in (TEST, VALIDATION, TRAIN):
        kept = []
        for entry in splits[split]:
            other = seen.get(entry.digest)
            if other is not None:
                removed.append((entry.candidate.name, other))
            if other is None or options.keep_duplicates:
                kept.append(entry)
        seen.update((entry.digest, entry.candidate.name) for entry in kept)
        result[split] = kept
    notes = []
    if removed:
        pairs = ", ".join(f"{name!r} = {other!r}" for name, other in removed[:3])
        what = "kept (--keep_duplicates)" if options.keep_duplicates else "left out of the first"
        notes.append(
            f"{len(removed):,} images are in two splits, with the same contents: {what} "
            f"({pairs}{', ...' if len(removed) > 3 else ''})"
        )
    if grouped:
        in_splits: dict[str, set[str]] = defaultdict(set)
        for split, entries in result.items():
            for entry in entries:
                if entry.candidate.group is not None:
                    in_splits[entry.candidate.group].add(split)
        torn = sorted(group for group, where in in_splits.items() if len(where) > 1)
        if torn:
            notes.append(f"{len(torn):,} groups are in two given splits: {shown(torn)}")
    return result, 0 if options.keep_duplicates else len(removed), notes


def _count_of(images_: int) -> str:
    return "one image" if images_ == 1 else f"{images_} different images (or groups of them)"
