"""Sources whose images are files of their own: class folders and manifests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dataset import storage
from dataset.card import DataCard
from dataset.index import Plan, Row, not_read
from dataset.interface import Item, Unreadable, shard_length


@dataclass(frozen=True)
class FilesShard:
    """Image files; see `dataset.interface.Shard`."""

    rows: Sequence[Row]

    def read(self) -> Iterator[Item | Unreadable]:
        """See `dataset.interface.Shard`."""
        for row in self.rows:
            try:
                yield Item(row.name, storage.read(row.place), row.label, row.superclass)
            except OSError as error:
                yield Unreadable(row.name, not_read(error), row.label)


@dataclass(frozen=True)
class FilesSource:
    """A plan whose places are paths or URIs; see `dataset.interface.Source`."""

    plan: Plan

    @property
    def card(self) -> DataCard:
        """See `dataset.interface.Source`."""
        return self.plan.card

    @property
    def counts(self) -> Mapping[str, Sequence[int]]:
        """See `dataset.interface.Source`."""
        return self.plan.counts

    @property
    def notes(self) -> Sequence[str]:
        """See `dataset.interface.Source`."""
        return self.plan.notes

    @property
    def unreadable(self) -> Sequence[Unreadable]:
        """See `dataset.interface.Source`."""
        return self.plan.unreadable

    def shards(self, split: str) -> Sequence[FilesShard]:
        """See `dataset.interface.Source`."""
        rows = self.plan.rows[split]
        length = shard_length(self.card.image_size)
        return [FilesShard(rows[at : at + length]) for at in range(0, len(rows), length)]
